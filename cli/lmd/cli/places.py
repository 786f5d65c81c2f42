"""Where the client keeps its own few files: the log of a daemon it starts, and the history of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def state_dir(env: Mapping[str, str]) -> Path:
    """Return the user's state directory: `LMD_HOME`, else below the XDG state directory."""
    home = env.get("LMD_HOME", "")
    if home:
        return Path(home).absolute()
    from platformdirs import user_state_path

    return user_state_path("lmd")


def log_file(env: Mapping[str, str]) -> Path:
    """Return where the output of a daemon started by `lm` goes."""
    home = env.get("LMD_HOME", "")
    if home:
        return Path(home).absolute() / "log" / "lmd.log"
    from platformdirs import user_log_path

    return user_log_path("lmd") / "lmd.log"


def history_file(env: Mapping[str, str]) -> Path:
    """Return the file that remembers what was typed in chats."""
    return state_dir(env) / "prompt_history"
