"""Serve repositories from the command line: `python -m tests.support.hub --repo test/stories=/path`.

Prints one line of JSON with `endpoint` and `cdn` when it is ready, and serves until SIGTERM, SIGINT, or the end of
its standard input when `--until-stdin-ends` is given.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

from tests.support.hub.server import HubServer


def main() -> None:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.hub", description="A Hub on loopback.")
    parser.add_argument("--repo", action="append", default=[], metavar="ORG/NAME=PATH", help="a file or a directory")
    parser.add_argument("--private", action="append", default=[], metavar="ORG/NAME", help="hide it without a token")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME", help="ask for a token")
    parser.add_argument("--token", action="append", default=[], help="a token that may read everything")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefix", default="", help="a path before everything, as mirrors have")
    parser.add_argument("--until-stdin-ends", action="store_true")
    options = parser.parse_args()

    hub = HubServer(port=options.port, prefix=options.prefix)
    hub.tokens |= set(options.token)
    for entry in options.repo:
        repo_id, _, where = entry.partition("=")
        path = Path(where)
        if not repo_id or not path.exists():
            parser.error(f"--repo {entry}: not ORG/NAME=PATH of something that exists")
        sources = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        files: dict[str, Path | bytes] = {str(source.relative_to(base)): source for source in sources}
        repo = hub.add_repo(repo_id, files, private=repo_id in options.private, gated=repo_id in options.gated)
        repo.allowed |= set(options.token)

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    if options.until_stdin_ends:
        threading.Thread(target=_end_with_stdin, args=(ended,), daemon=True).start()
    with hub:
        sys.stdout.write(json.dumps({"endpoint": hub.endpoint, "cdn": hub.cdn}) + "\n")
        sys.stdout.flush()
        ended.wait()


def _end_with_stdin(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


if __name__ == "__main__":
    main()
