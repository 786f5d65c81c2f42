"""A minute's tour: a private daemon pulls a model from a Hub server on loopback, chats, and leaves nothing behind.

Nothing here is special: each step is an `lm` command that is printed before it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "data" / "stories260K.gguf"
LM = Path(sys.executable).parent / "lm"

MODELFILE = '''\
FROM hf.co/demo/stories
SYSTEM """Once upon a time"""
TEMPLATE """{% for m in messages %}{{ m.content }}{{ ", " if m.role == "system" else " " }}{% endfor %}"""
PARAMETER temperature 0.6
PARAMETER seed 7
PARAMETER num_predict 80
'''


def say(text: str) -> None:
    """Print a line of the tour itself."""
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


def lm(env: dict[str, str], *args: str, stdin: str | None = None) -> None:
    """Show an `lm` command and run it; the tour ends at the first that fails."""
    say(f"$ lm {shlex.join(args)}")
    subprocess.run([LM, *args], input=stdin, text=True, env=env, check=True)  # noqa: S603 - our own command


@contextlib.contextmanager
def hub_server() -> Iterator[str]:
    """Serve the model over the Hub's protocol; yields the endpoint."""
    command = [sys.executable, "-m", "tests.support.hub", "--repo", f"demo/stories={MODEL}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:  # noqa: S603
        try:
            assert server.stdout is not None
            yield str(json.loads(server.stdout.readline())["endpoint"])
        finally:
            server.terminate()


def main() -> int:
    """Run the tour."""
    with tempfile.TemporaryDirectory(prefix="lm-demo-") as home, hub_server() as endpoint:
        env = dict(os.environ) | {"LMD_HOME": home, "HF_ENDPOINT": endpoint, "LMD_HTTP_LISTEN": "127.0.0.1:0"}
        env.pop("HF_TOKEN", None)
        say(f"A private home ({home}) and a Hub server on loopback ({endpoint}).")
        try:
            tour(env, Path(home))
        except subprocess.CalledProcessError as error:
            say(f"the tour stops here: `lm` ended with status {error.returncode}")
            return 1
        finally:
            stop(env)
    say("Done; nothing is left behind. Next: `pip install .` and `lm run llama3`.")
    return 0


def tour(env: dict[str, str], home: Path) -> None:
    """Go through the commands; raise at the first that fails."""
    lm(env, "pull", "hf.co/demo/stories")
    lm(env, "run", "hf.co/demo/stories", "Once upon a time", "-o", "temperature=0", "-o", "num_predict=60")
    say("A chat model of our own, from a Modelfile:")
    say(MODELFILE.rstrip())
    (home / "Modelfile").write_text(MODELFILE)
    lm(env, "create", "storyteller", "-f", str(home / "Modelfile"))
    lm(env, "run", "storyteller", "there was a little dog")
    lm(env, "ls")
    lm(env, "ps")
    lm(env, "rm", "storyteller", "hf.co/demo/stories")
    lm(env, "gc", "--dry-run")


def stop(env: dict[str, str]) -> None:
    """End the daemon, if the tour came as far as starting one."""
    say("$ lm serve --stop")
    subprocess.run([LM, "serve", "--stop"], env=env, check=False)  # noqa: S603 - our own command


if __name__ == "__main__":
    sys.exit(main())
