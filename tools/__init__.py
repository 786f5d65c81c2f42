"""Tools of the repository: the demo and the checks behind `make check`."""
