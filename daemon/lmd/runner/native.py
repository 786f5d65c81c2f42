"""The low-level llama.cpp bindings, without what their package drags in.

`import llama_cpp` runs the package's `__init__`, which imports numpy, jinja2 and the high-level class: a third of a
second and 40 MB that a runner has no use for, and a template engine that must not live in this process. So the package
is registered without running it, and only `llama_cpp.llama_cpp` (ctypes declarations) is executed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from typing import Any

_PACKAGE = "llama_cpp"

ENVIRONMENT = {
    # OpenMP's default spinning collapses as soon as anything else wants a core; 1000 rounds keep nine tenths of the
    # idle speed (measured: 35 of 39 tok/s alone, 17.6 instead of 0.5 beside another busy process on two cores).
    "GOMP_SPINCOUNT": "1000",
    # numpy's linear algebra, which nothing here uses, would start a thread for every core.
    "OPENBLAS_NUM_THREADS": "1",
    # An abort in ggml forks a debugger for a stack trace unless told not to.
    "GGML_NO_BACKTRACE": "1",
}


def load_bindings() -> Any:
    """Import and return the module of llama.cpp's C API.

    Sets the environment first: libgomp reads it once, when it is loaded. What the user has set already stays.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if _PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("llama-cpp-python is not installed", name=_PACKAGE)
        package = types.ModuleType(_PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.llama_cpp")


def engine_version() -> str:
    """Return the version of llama-cpp-python."""
    return importlib.metadata.version("llama-cpp-python")
