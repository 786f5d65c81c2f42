"""The commands of `lm`: what `lm --help` says of each without loading it.

A test compares this table with the commands themselves.
"""

from __future__ import annotations

#: Sections of `lm --help`; for each command its name and short help. The module is `commands/<name>.py`.
SECTIONS: dict[str, dict[str, str]] = {
    "Models": {
        "pull": "Download a model into the store",
        "ls": "List the models of the store",
        "show": "Show what a model is",
        "create": "Create a model from a Modelfile",
        "quantize": "Make a model with smaller weights of a model",
        "edit": "Change a model's Modelfile in an editor",
        "history": "List the versions of a model",
        "diff": "Show what differs between two models",
        "rollback": "Go back to an earlier version of a model",
        "cp": "Give a model a second name",
        "rm": "Remove models",
    },
    "Running": {
        "run": "Chat with a model, or answer one prompt",
        "embed": "Turn texts into vectors",
        "rerank": "Rank documents by how well they answer a query",
        "tokenize": "Show the tokens that a model reads",
        "load": "Load models into memory",
        "pin": "Keep models in memory",
        "unpin": "Let pinned models leave memory again",
        "ps": "List the models in memory",
        "stop": "Unload models from memory",
        "fit": "Tell whether a model fits in memory",
        "lease": "Run a command with memory that models leave to it",
    },
    "Daemon": {
        "serve": "Run the daemon in the foreground",
        "status": "Show the daemon and its devices",
        "devices": "List what models can be loaded on",
        "du": "Show what takes space in the store",
        "gc": "Free disk space that nothing needs",
        "version": "Show the versions of both sides",
        "completion": "Print a shell's completion script",
    },
}

COMMANDS: dict[str, str] = {name: text for section in SECTIONS.values() for name, text in section.items()}
