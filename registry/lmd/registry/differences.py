"""What is different between two versions of a model, in one line for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields

from lmd.registry.digest import Digest
from lmd.registry.lm_config import FILE_ROLES, LmConfig
from lmd.registry.manifest import Manifest
from lmd.registry.parameters import ParameterValue, format_value

MAX_CHANGES = 4
_MAX_VALUE_CHARACTERS = 24
#: What has a description of its own, or says nothing that people set.
_DESCRIBED = frozenset({"parameters", "template", "system", "messages", "files", "origin"})


def summarize(before: Manifest, after: Manifest) -> str:
    """Tell what *after* has that *before* has not and the other way round, such as "temperature 0.5 to 0.7, system".

    Names the most important first, and no more than a few; empty when there is nothing to tell.
    """
    changes = [*_files(before, after), *_texts(before.lm, after.lm), *_parameters(before.lm, after.lm)]
    changes += _others(before.lm, after.lm)
    if len(changes) > MAX_CHANGES:
        changes[MAX_CHANGES - 1 :] = [f"{len(changes) - MAX_CHANGES + 1} more"]
    return ", ".join(changes)


def _files(before: Manifest, after: Manifest) -> Iterator[str]:
    for role in FILE_ROLES:
        old, new = _named(before, role), _named(after, role)
        if old != new:
            yield f"{role} {'added' if not old else 'removed' if not new else 'changed'}"


def _named(manifest: Manifest, role: str) -> list[tuple[Digest, float]]:
    return [(layer.digest, layer.scale) for layer in manifest.files if layer.role == role]


def _texts(before: LmConfig, after: LmConfig) -> Iterator[str]:
    for name, old, new in (("template", before.template, after.template), ("system", before.system, after.system)):
        if (old or "") != (new or ""):
            yield f"{name} {_text_change(old or '', new or '')}"
    if len(before.messages) != len(after.messages):
        yield f"messages {len(before.messages)} to {len(after.messages)}"
    elif before.messages != after.messages:
        yield "messages changed"


def _text_change(old: str, new: str) -> str:
    if not old:
        return "added"
    if not new:
        return "removed"
    lines = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    removed = added = 0
    for tag, i1, i2, j1, j2 in lines.get_opcodes():
        if tag != "equal":
            removed, added = removed + i2 - i1, added + j2 - j1
    return f"+{added} -{removed}"


def _parameters(before: LmConfig, after: LmConfig) -> Iterator[str]:
    for name in sorted({*before.parameters, *after.parameters}):
        old, new = before.parameters.get(name), after.parameters.get(name)
        if old == new:
            continue
        if old is None or new is None:
            yield f"{name} {_value(new)}" if new is not None else f"{name} unset"
        else:
            yield f"{name} {_value(old)} to {_value(new)}"


def _value(value: ParameterValue | None) -> str:
    if value is None:
        return ""
    text = " ".join(f'"{item}"' for item in value) if isinstance(value, tuple) else format_value(value)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 1]}…"


def _others(before: LmConfig, after: LmConfig) -> Iterator[str]:
    for field in fields(LmConfig):
        if field.name not in _DESCRIBED and getattr(before, field.name) != getattr(after, field.name):
            yield f"{field.name} changed"
