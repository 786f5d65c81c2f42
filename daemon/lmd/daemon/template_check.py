"""Has the Jinja templates of Modelfiles compiled before a model is made of them.

A template is a program that came from outside, and compiling it is work of its choosing. So a render process does it,
as confined as the one that a runner has, and with a limit of time.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys

from lmd.registry.errors import InvalidRequest
from lmd.registry.modelfile import is_go_template
from lmd.runner.wire import WireClosed, WireError, frame, read_frame

_TIMEOUT_S = 10.0
_TAG_OK = b"P"
#: Text without any of these is no program.
_MARKS = ("{{", "{%", "{#")


def check_template(template: str | None) -> None:
    """Refuse a Jinja template that does not compile; takes a sixth of a second where there is one.

    Blocks, so it is for threads. Raises: InvalidRequest.
    """
    if not template or is_go_template(template) or not any(mark in template for mark in _MARKS):
        return
    fault = _fault(template)
    if fault:
        raise InvalidRequest(
            f"the template does not compile: {fault}",
            field="template",
            hint="lines count from that of TEMPLATE; leave TEMPLATE out to use the one in the GGUF file",
        )


def _fault(template: str) -> str:
    """Return what the render process says against a template; "" when it compiles."""
    # What it could write does not matter: nothing is rendered.
    setup = {"template": template, "bos_token": "", "eos_token": "", "max_bytes": 1 << 20}
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(_TIMEOUT_S)
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - this program's own interpreter
                [sys.executable, "-P", "-m", "lmd.runner.render", "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            read_frame(ours)  # It is ready.
            ours.sendall(frame(json.dumps(setup).encode()))
            answer = read_frame(ours)
        except TimeoutError:
            return f"it takes longer than {_TIMEOUT_S:g} s"
        except (WireClosed, WireError, ConnectionError):
            return "it ends the process that compiles it"
        finally:
            process.kill()
            process.wait()
    return "" if answer.startswith(_TAG_OK) else answer[1:].decode(errors="replace")
