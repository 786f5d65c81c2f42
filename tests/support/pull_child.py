"""One pull in a process of its own, for tests that kill it: prints a line of JSON for each event.

Usage: python -m tests.support.pull_child STORE ENDPOINT REF
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from lmd.registry.aliases import AliasTable
from lmd.registry.pull import Puller, PullEvent
from lmd.registry.ref import parse_ref
from lmd.registry.store import Store


def main() -> None:
    """Pull, and print what happens."""
    root, endpoint, ref = sys.argv[1:4]

    def report(event: PullEvent) -> None:
        fields = {"state": event.state.name, "completed": event.completed_bytes, "resumed": event.resumed_bytes}
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    with Store.open(Path(root)) as store:
        puller = Puller(store, AliasTable.load(None), endpoint=endpoint, user_agent="lmd-test/0")
        try:
            tag = puller.pull(parse_ref(ref), token=None, on_event=report, cancelled=threading.Event())
        finally:
            puller.close()
        sys.stdout.write(json.dumps({"state": "TAG", "manifest": str(tag.manifest)}) + "\n")


if __name__ == "__main__":
    main()
