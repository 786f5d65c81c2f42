"""Reads what a model is to be made of: the body of `POST /api/create` as a Modelfile."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmd.daemon.http.ollama.failures import Refusal, told
from lmd.daemon.http.ollama.manage_replies import blob_digest, cut
from lmd.daemon.http.ollama.manage_requests import CreateBody, MessageBody
from lmd.daemon.ollama_level import API_LEVEL, is_met
from lmd.registry.digest import PREFIX, Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.filenames import why_hostile
from lmd.registry.lm_config import MAX_FILES, MAX_MESSAGES, Message
from lmd.registry.modelfile import MESSAGE_ROLES, Adapter, From, Modelfile, why_not
from lmd.registry.parameters import IGNORED, ParameterValue, validate

#: Field → what would have to be there for it to have the effect its user expects.
_NOT_HERE = {
    "draft_quantize": "drafts are not quantized; upload a file that is quantized already",
    "renderer": "there are no built-in renderers; leave it out, and the model's own chat template renders",
    "parser": "there are no built-in parsers by name; leave it out, and the model's own chat template decides",
    "info": "metadata of the weights cannot be overridden",
    "remote_host": "there are no remote models",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make: *files* holds the blob of each FROM, DRAFT or ADAPTER of the Modelfile that is a file."""

    modelfile: Modelfile
    files: Mapping[str, Digest]


def recipe_of(body: CreateBody) -> Recipe:
    """Return what a request asks to make. Raises: Refusal."""
    for field, why in _NOT_HERE.items():
        if getattr(body, field):
            raise Refusal(400, f"{field}: {why}")
    _check_required(body.requires or "")
    files, drafts = _files(body.files, "files"), _files(body.draft_files, "draft_files")
    adapters = _files(body.adapters, "adapters")
    lists = {"files": files, "draft_files": drafts, "adapters": adapters}
    for (one, some), (other, others) in itertools.combinations(lists.items(), 2):
        if twice := some.keys() & others.keys():
            raise Refusal(400, f'the file "{cut(min(twice))}" is in {one} and in {other}; rename one')
    if not body.from_ and not files:
        raise Refusal(400, "neither 'from' or 'files' was specified")
    sources = list(files)
    if body.from_ and body.from_ not in files:
        sources.insert(0, _model_name(body.from_))
    modelfile = Modelfile(
        from_=tuple(From(source) for source in sources),
        parameters=_parameters(body.parameters or {}),
        template=_template(body.template),
        system=body.system,
        licenses=_licenses(body.license),
        messages=_messages(body.messages or ()),
        drafts=tuple(From(name) for name in drafts) if drafts else None,
        adapters=tuple(Adapter(From(name)) for name in adapters) if adapters else None,
        requires=body.requires.removeprefix("v") if body.requires else None,
    )
    return Recipe(modelfile, {**files, **drafts, **adapters})


def _check_required(version: str) -> None:
    if not version:
        return
    met = is_met(version)
    if met is None:
        raise Refusal(400, f'requires: "{version[:40]}" is no version')
    if not met:
        raise Refusal(400, f"the model requires Ollama {version}, and this daemon answers as {API_LEVEL}")


def _files(files: Mapping[str, str] | None, field: str) -> dict[str, Digest]:
    if files is not None and len(files) > MAX_FILES:
        raise Refusal(400, f"{field}: a model has at most {MAX_FILES} files")
    read: dict[str, Digest] = {}
    for name, digest in (files or {}).items():
        why = why_hostile(name)
        if name.startswith(PREFIX):
            why = "looks like a digest"
        if why:
            plain = why in ("is empty", "is not a plain relative path")
            raise Refusal(400, "file path must be relative" if plain else f"{field}: a file's name {why}")
        read[name] = blob_digest(digest)
    return read


def _model_name(text: str) -> str:
    """Refuse paths: the daemon opens no files for HTTP clients."""
    if text.startswith(("/", "./", "../", "~")) or text.lower().startswith("file:"):
        raise Refusal(400, "from: files are not read from paths; send the file to /api/blobs and name it in `files`")
    if text.startswith(PREFIX):
        return str(blob_digest(text))
    return text


def _parameters(values: Mapping[str, object]) -> dict[str, ParameterValue]:
    wanted = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    try:
        return validate(wanted)
    except InvalidRequest as error:
        raise Refusal(400, told(error)) from error


def _template(text: str | None) -> str | None:
    if text and (problem := why_not(text)) is not None:
        raise Refusal(400, f"template error: {problem}")
    return text


def _licenses(value: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or ()
    if len(texts) > MAX_FILES:
        raise Refusal(400, f"license: at most {MAX_FILES} texts are kept")
    return tuple(text for text in texts if text)


def _messages(messages: Sequence[MessageBody]) -> tuple[Message, ...]:
    if len(messages) > MAX_MESSAGES:
        raise Refusal(400, f"messages: a model keeps at most {MAX_MESSAGES}")
    for message in messages:
        if message.role.lower() not in MESSAGE_ROLES:
            raise Refusal(400, 'message role must be one of "system", "user", or "assistant"')
        if message.images:
            raise Refusal(400, "messages: images in the messages of a model are not supported")
    return tuple(Message(message.role.lower(), message.content or "") for message in messages)
