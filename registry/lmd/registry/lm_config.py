"""``lmd.json``: what a model is beyond its files, and what ModelPack has no field for.

It is a layer of the manifest like the weights, so its digest, and with it the model's, changes with every word of it.

    {"version": 1,
     "files": [{"digest": "sha256:…", "filename": "x.gguf", "role": "weights"}],
     "origin": {"ref": "hf.co/org/repo:F16", "commit": "…", "quantize": "Q4_K_M", "quantized_from": "sha256:…"},
     "template": "…", "system": "…", "parameters": {"temperature": 0.5}, "messages": [{"role": …, "content": …}],
     "licenses": ["MIT"], "requires": "0.14.0"}

Keys without a value are left out. Readers ignore keys they do not know; a change that old readers would misunderstand
raises the version. Version 2 adds files of the role "adapter", with their `scale` unless it is 1; what has none is
written as version 1, so that the digests of models do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

from lmd.registry import strict_json
from lmd.registry.digest import Digest
from lmd.registry.filenames import why_hostile
from lmd.registry.parameters import ParameterValue, validate
from lmd.registry.strict_json import Json, fail

VERSION = 2
"""The newest version that is understood; what needs nothing of it is written as version 1."""
MEMBER_NAME = "lmd.json"
"""The name the layer has in a manifest; no other file of a model may have it."""
FileRole = Literal["weights", "projector", "draft", "adapter"]
FILE_ROLES: tuple[str, ...] = get_args(FileRole)
MESSAGE_ROLES = ("system", "user", "assistant", "tool")
MAX_FILES = 256
MAX_MESSAGES = 4096
MAX_SCALE = 100.0
"""The largest scale of an adapter, either way; beyond it there is nothing but noise."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; *role* is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the files came from: the resolved reference and the repository's commit; "" when not known.

    For weights that were quantized here: *quantize* is the type, *quantized_from* the digest of the (first) file they
    were made of, *imatrix* that of the importance matrix.
    """

    ref: str = ""
    commit: str = ""
    quantize: str = ""
    quantized_from: str = ""
    imatrix: str = ""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What one blob of the model is for, and the name it had at its source.

    *scale* says how strongly an adapter applies, 1 as it was trained; it is 1 for all other files.
    """

    digest: Digest
    filename: str
    role: FileRole
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LmConfig:
    """The content of ``lmd.json``.

    *template* and *system* are None when the model sets none; the chat template in the GGUF header applies then.
    *requires* is the release of Ollama whose behaviour the model needs; None when it says nothing.
    """

    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    licenses: tuple[str, ...] = ()
    files: tuple[FileEntry, ...] = ()
    origin: Origin = Origin()
    requires: str | None = None

    def to_bytes(self) -> bytes:
        """The canonical JSON: equal values give equal bytes."""
        content: dict[str, object] = {
            "version": 2 if any(entry.role == "adapter" for entry in self.files) else 1,
            "files": [_file_json(entry) for entry in self.files],
            "origin": {key: text for key, text in asdict(self.origin).items() if text},
            "template": self.template,
            "system": self.system,
            "parameters": dict(self.parameters),
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
            "licenses": list(self.licenses),
            "requires": self.requires,
        }
        return strict_json.dump({key: value for key, value in content.items() if value not in (None, "", [], {})})

    @classmethod
    def parse(cls, data: bytes) -> LmConfig:
        """Read ``lmd.json``.

        Raises:
            InvalidRequest: when it is not one, or of a version that is not known.
        """
        content = strict_json.load_object(data, MEMBER_NAME)
        version = content.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
            fail(MEMBER_NAME, f"is of a version that is not known; {VERSION} is the newest")
        origin = _object(content.get("origin", {}), "origin")
        return cls(
            template=_optional_text(content, "template"),
            system=_optional_text(content, "system"),
            parameters=validate(_object(content.get("parameters", {}), "parameters")),
            messages=tuple(_message(item) for item in _list(content, "messages", MAX_MESSAGES)),
            licenses=tuple(_text(item, "licenses") for item in _list(content, "licenses", MAX_FILES)),
            files=tuple(_file(item) for item in _list(content, "files", MAX_FILES)),
            origin=Origin(**{item.name: _text(origin.get(item.name, ""), "origin") for item in fields(Origin)}),
            requires=_optional_text(content, "requires"),
        )


def _file_json(entry: FileEntry) -> dict[str, object]:
    content: dict[str, object] = {"digest": str(entry.digest), "filename": entry.filename, "role": entry.role}
    return content if entry.scale == 1 else {**content, "scale": entry.scale}


def _message(item: Json) -> Message:
    turn = _object(item, "messages")
    message = Message(_text(turn.get("role"), "messages"), _text(turn.get("content"), "messages"))
    if message.role not in MESSAGE_ROLES:
        fail(MEMBER_NAME, "has a message of an unknown role")
    return message


def _file(item: Json) -> FileEntry:
    entry = _object(item, "files")
    digest = Digest.parse(_text(entry.get("digest"), "files"))
    filename = _text(entry.get("filename"), "files")
    role = entry.get("role")
    if why := why_hostile(filename):
        fail(MEMBER_NAME, f"has a file whose name {why}")
    for known in get_args(FileRole):
        if role == known:
            return FileEntry(digest, filename, known, _scale(entry) if known == "adapter" else 1.0)
    fail(MEMBER_NAME, "has a file of an unknown role")


def _scale(entry: dict[str, Json]) -> float:
    value = entry.get("scale", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_SCALE <= value <= MAX_SCALE:
        fail(MEMBER_NAME, f"has an adapter without a scale from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(value)


def _list(content: dict[str, Json], key: str, max_items: int) -> list[Json]:
    value = content.get(key, [])
    if not isinstance(value, list) or len(value) > max_items:
        fail(MEMBER_NAME, f"does not have a list of at most {max_items} items as `{key}`")
    return value


def _object(value: Json, key: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        fail(MEMBER_NAME, f"does not have an object in `{key}`")
    return value


def _text(value: Json, key: str) -> str:
    if not isinstance(value, str):
        fail(MEMBER_NAME, f"does not have text in `{key}`")
    return value


def _optional_text(content: dict[str, Json], key: str) -> str | None:
    return _text(content[key], key) if key in content else None
