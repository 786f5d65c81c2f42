"""Writes the reference of the configuration, and a complete sample, from the settings themselves.

`python -m lmd.daemon.config_docs reference` and `… example` print them; a test keeps the files in docs/ the same.
"""

from __future__ import annotations

import sys
import textwrap

from lmd.daemon.config import SECTIONS, describe, settable_keys
from lmd.daemon.config_file import variable_of

_INTRODUCTION = """\
# Configuration

`lmd` works without a configuration file. To change something, write a TOML file with the keys below; every one is
optional. [config.example.toml](config.example.toml) holds them all with their defaults. `lmd --check-config` tells
whether a file is good and where it is not; mistakes end the daemon with exit status 2 before it touches anything.

Later wins: the default, the file, the environment variable named below each key, the command line.

## Places

| | `LMD_HOME` or `--home` set | system unit | otherwise |
|---|---|---|---|
| file | `$LMD_HOME/config.toml` | `/etc/lmd/config.toml` | `$XDG_CONFIG_HOME/lmd/config.toml` (`~/.config`) |
| state | `$LMD_HOME` | `/var/lib/lmd` | `$XDG_DATA_HOME/lmd` (`~/.local/share`) |
| runtime: sockets | `$LMD_HOME/run` | `/run/lmd` | `$XDG_RUNTIME_DIR/lmd`, or `/tmp/lmd-UID` |
| logs | `$LMD_HOME/log` | the journal | `$XDG_STATE_HOME/lmd/log` (`~/.local/state`) |

The system unit's places are what systemd says in `CONFIGURATION_DIRECTORY`, `STATE_DIRECTORY`, `RUNTIME_DIRECTORY`
and `LOGS_DIRECTORY`. `--config` or `LMD_CONFIG` names another configuration file.

## Other variables

| variable | meaning |
|---|---|
| `LMD_SOCKET` | the public socket, for clients and daemon alike; `LMD_SERVER_SOCKET` wins over it in the daemon |
| `HF_ENDPOINT` | the Hub; `LMD_PULL_ENDPOINT` wins over it |
| `HF_TOKEN` | the Hub token. It is taken out of the environment at once, is never logged, and no runner sees it |
| `CREDENTIALS_DIRECTORY` | set by systemd; a credential named `hf_token` is the token when `HF_TOKEN` is unset |
| `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY` | proxies for pulls; lower-case names too, which win |

## Values

A duration is text such as `"30s"`, `"5m"`, `"1h30m"`, `"250ms"`, `"2d"`; where it is allowed, `"-1"` is for ever.
A size is text such as `"512MiB"` (1024²) or `"2GB"` (1000³). Bare numbers are refused where a unit is missing.
"""


def render_reference() -> str:
    """Return docs/reference/configuration.md."""
    parts = [_INTRODUCTION]
    section = ""
    for key in settable_keys():
        if key[0] != section:
            section = key[0]
            heading = f"`[{section}]`" if len(key) == 2 else "Top level"
            about = f"\n{SECTIONS[section].__doc__}\n" if len(key) == 2 else ""
            parts.append(f"## {heading}\n{about}")
        doc, legal, default = describe(key)
        default = default if default.startswith("`") or " " in default else f"`{default}`"
        facts = f"- default: {default}\n- legal: {legal}\n- variable: `{variable_of(key)}`"
        parts.append(f"### `{'.'.join(key)}`\n\n{textwrap.fill(doc, 118)}\n\n{facts}\n")
    return "\n".join(parts)


def render_example() -> str:
    """Return docs/reference/config.example.toml: every key with its default, commented out."""
    lines = ["# Every setting of lmd with its default. Remove the `#` before a key to change it."]
    section = ""
    for key in settable_keys():
        if len(key) == 2 and key[0] != section:
            section = key[0]
            lines += ["", f"[{section}]", f"# {SECTIONS[section].__doc__}"]
        doc, legal, default = describe(key)
        lines += ["", *textwrap.wrap(doc, 100, initial_indent="# ", subsequent_indent="# "), f"# Legal: {legal}."]
        if default.startswith("`") or " " in default or default == "none":
            lines += [f"# Default: {default.replace('`', '')}.", f'#{key[-1]} = "/path/to/{key[-1]}"']
        else:
            lines.append(f"#{key[-1]} = {default}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the document that the command line names."""
    documents = {"reference": render_reference, "example": render_example}
    sys.stdout.write(documents[sys.argv[1]]())


if __name__ == "__main__":
    main()
