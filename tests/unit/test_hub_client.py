"""What `huggingface_hub` may do in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmd.registry.addresses import origin_of
from lmd.registry.cancel import CancelScope
from lmd.registry.http import Http, HttpOptions
from lmd.registry.sources import hub_env
from tests.support.hub import HubServer


def test_the_package_is_imported_late_and_with_our_settings(tmp_path: Path) -> None:
    """In a process of its own, because the package reads its settings once."""
    script = f"""
import sys
from pathlib import Path
import lmd.registry.pull
from lmd.registry.sources import hub_env
assert "huggingface_hub" not in sys.modules
hub_env.prepare(Path({str(tmp_path / "first")!r}))
hub_env.prepare(Path({str(tmp_path / "second")!r}))
from huggingface_hub import constants
assert constants.HF_HOME == {str(tmp_path / "first" / "hf")!r}, constants.HF_HOME
assert constants.HF_HUB_DISABLE_XET and constants.HF_HUB_DISABLE_TELEMETRY
assert constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_errands_to_other_servers_do_not_leave(tmp_path: Path) -> None:
    hub_env.prepare(tmp_path)
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from lmd.registry.sources import hub_client

    http = Http(HttpOptions("lmd-test/0"))
    with HubServer() as hub, HubServer() as other, CancelScope(threading.Event()) as cancel:
        with pytest.raises(httpx2.ConnectError):
            HfApi(endpoint=hub.endpoint, token=False).model_info("a/b")
        with hub_client.using(http, origin_of(hub.endpoint), cancel):
            with pytest.raises(RepositoryNotFoundError):
                HfApi(endpoint=hub.endpoint, token=False).model_info("a/b")
            with pytest.raises(httpx2.ConnectError):
                HfApi(endpoint=other.endpoint, token=False).model_info("a/b")
        assert len(hub.requests) == 1
        assert hub.requests[0].headers["user-agent"] == "lmd-test/0"
        assert other.requests == []
        http.close()
