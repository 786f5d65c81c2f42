"""Making models: from a Modelfile, or from files that are in the store."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lmd.registry.adapting import check_adapter
from lmd.registry.digest import Digest
from lmd.registry.drafting import check_draft
from lmd.registry.errors import GgufInvalid, InvalidRequest
from lmd.registry.gguf import GgufHeader
from lmd.registry.lm_config import LmConfig
from lmd.registry.manifest import BuiltManifest, FileLayer, build_manifest
from lmd.registry.merging import merge, shard_sets, with_merged
from lmd.registry.model_store import ModelStore, Tag, TagT, read_blob_header
from lmd.registry.modelfile import Modelfile
from lmd.registry.recipe_files import gather
from lmd.registry.ref import NameRef, parse_ref
from lmd.registry.shards import in_shard_order
from lmd.registry.strict_json import MAX_BYTES

_NOT_PLAIN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def create_model(
    store: ModelStore[TagT],
    name: str,
    modelfile: Modelfile,
    *,
    files: Mapping[str, Digest] | None = None,
    base: Tag | None = None,
    draft: Tag | None = None,
    note: str = "create",
    expected: Digest | None = None,
    cancelled: threading.Event | None = None,
) -> TagT:
    """Create or replace the model *name* from a Modelfile; see `gather_parts` for its parts.

    Shards among *files* become one file. With *expected*, the name must point to that manifest until then; it may be
    one that a pull gave, too.

    The same Modelfile and files always give the same manifest. On failure the name is as it was.

    Raises:
        InvalidRequest: when *name* is not a plain name, a directive cannot be used, or QUANTIZE is asked for, which
            needs a process of its own.
        GgufInvalid: when a file is no GGUF, is of a kind that cannot be a model, or shards are missing.
        BlobMissing: when a blob is not in the store.
        TagChanged: when the name points to another manifest than *expected*.
        PullCancelled: when *cancelled* was set while shards were merged.
        DiskFull: when there is no room for the file that they make.
    """
    target = parse_ref(name)
    if target.digest is not None or not (isinstance(target, NameRef) or expected is not None):
        raise InvalidRequest(
            f"a model cannot be created as `{name}`",
            field="name",
            hint="choose a name such as `mario` or `me/mario:v2`",
        )
    if modelfile.quantize is not None:
        raise InvalidRequest(
            f"QUANTIZE {modelfile.quantize}: nothing is quantized here",
            field="quantize",
            hint="use `lm create`, or name weights that are quantized already",
        )
    parts, lm = gather_parts(store, modelfile, files=files, base=base, draft=draft)
    with store.lease(f"merge {name}") as lease:
        sets = shard_sets(store, parts, set((files or {}).values()))
        merged = [merge(store, shards, lease, cancelled=cancelled) for shards in sets]
        parts = with_merged(parts, merged)
        return build_from_files(store, target.name, parts, lm=lm, note=note, expected=expected)


def gather_parts(
    store: ModelStore[TagT],
    modelfile: Modelfile,
    *,
    files: Mapping[str, Digest] | None = None,
    base: Tag | None = None,
    draft: Tag | None = None,
) -> tuple[list[FileLayer], LmConfig]:
    """Return the files and settings that a Modelfile adds up to, for `build_from_files`.

    *files* maps the arguments that are files to the blobs stored for them, and *base* and *draft* are the models that
    the names after FROM and DRAFT stand for; see `gather`. The template, system prompt, parameters and licences of the
    base are inherited where the Modelfile has none of its own (parameters one by one, licences are added), its messages
    unless there are new ones.

    Raises:
        InvalidRequest: when a directive cannot be used.
        GgufInvalid: when a file is no GGUF, or of a kind that cannot be a model.
        BlobMissing: when a blob is not in the store.
    """
    gathered = gather(store, modelfile, files or {}, base, draft)
    return gathered.files, _merge(gathered.inherited, modelfile)


def build_from_files(
    store: ModelStore[TagT],
    name: str,
    files: Sequence[FileLayer],
    *,
    lm: LmConfig | None = None,
    headers: Sequence[GgufHeader] | None = None,
    note: str = "pull",
    expected: Digest | None = None,
) -> TagT:
    """Make a manifest of files that are in the store, and point *name* (a canonical name) at it.

    *headers* are those of the weights among *files*, in their order; None reads them. Shards may come in any order.
    Line ends in the texts of *lm* become plain line feeds and control characters go, so that a Modelfile can hold them.

    Raises:
        GgufInvalid: when the weights are not one complete model.
        InvalidRequest: when a file's name cannot be stored, the draft cannot draft for the weights, or an adapter does
            not fit them.
        BlobMissing: when a blob is not in the store.
    """
    weights = [file for file in files if file.role == "weights"]
    drafts = [file for file in files if file.role == "draft"]
    others = [file for file in files if file.role not in ("weights", "draft")]
    with store.lease(f"build {name}") as lease:
        lease.add(*(file.digest for file in files))
        if headers is None:
            headers = [read_blob_header(store, file.digest) for file in weights]
        ordered = in_shard_order(weights, headers)
        _check_others(store, others, [header for _, header in ordered])
        if drafts:
            drafts = _checked_drafts(store, drafts, ordered)
        texts = _with_plain_texts(lm or LmConfig())
        _check_size(texts)
        built = build_manifest(
            [*(file for file, _ in ordered), *others, *drafts],
            texts,
            [header for _, header in ordered],
        )
        lease.add(built.digest, *built.manifest.blob_digests())
        return _publish(store, name, built, note, expected)


def _check_others(store: ModelStore[Tag], others: Sequence[FileLayer], weights: Sequence[GgufHeader]) -> None:
    """Make sure that projectors and adapters are what they are said to be, and that adapters fit the weights."""
    for file in others:
        header = read_blob_header(store, file.digest)
        kind = header.kind
        if file.role == "projector" and kind != "mmproj":
            raise GgufInvalid(f"`{file.filename}` is of the kind `{ascii(kind[:40])[1:-1]}`, not a projector")
        if file.role == "adapter":
            check_adapter(file.filename, header, weights)
    adapters = [file.digest for file in others if file.role == "adapter"]
    if len(set(adapters)) != len(adapters):
        raise InvalidRequest("two adapters are the same file", field="adapter", hint="name it once, with one scale")
    if sum(file.role == "projector" for file in others) > 1:
        raise InvalidRequest("a model has one projector at most", field="projector", hint="leave all but one out")


def _checked_drafts(
    store: ModelStore[Tag], drafts: Sequence[FileLayer], weights: Sequence[tuple[FileLayer, GgufHeader]]
) -> list[FileLayer]:
    """Return the files of the draft in the order of their shards. Raises as `build_from_files`."""
    ordered = in_shard_order(drafts, [read_blob_header(store, file.digest) for file in drafts])
    first, header = ordered[0]
    target, target_header = weights[0]
    if {file.digest for file in drafts} & {file.digest for file, _ in weights}:
        raise InvalidRequest(
            "DRAFT names the model itself", field="draft", hint="draft with a smaller model of the same family"
        )
    check_draft(store, target_header, target.digest, header, first.digest)
    return [file for file, _ in ordered]


def _publish(store: ModelStore[TagT], name: str, built: BuiltManifest, note: str, expected: Digest | None) -> TagT:
    for blob in built.extra_blobs:
        store.put_bytes(blob)
    return store.set_tag(name, store.put_manifest(built.manifest_bytes), note=note, expected=expected)


def _merge(base: LmConfig, modelfile: Modelfile) -> LmConfig:
    """What the model gets: the Modelfile's word before the base's, and an empty word for none."""
    template = base.template if modelfile.template is None else modelfile.template
    system = base.system if modelfile.system is None else modelfile.system
    return LmConfig(
        template=template or None,
        system=system or None,
        parameters={**base.parameters, **modelfile.parameters},
        messages=modelfile.messages or base.messages,
        licenses=tuple(dict.fromkeys((*base.licenses, *modelfile.licenses))),
        origin=base.origin,
        requires=modelfile.requires or base.requires,
    )


def _with_plain_texts(lm: LmConfig) -> LmConfig:
    return replace(
        lm,
        template=_plain_text(lm.template or "") or None,
        system=_plain_text(lm.system or "") or None,
        licenses=tuple(text for license_text in lm.licenses if (text := _plain_text(license_text))),
        messages=tuple(replace(message, content=_plain_text(message.content)) for message in lm.messages),
    )


def _check_size(lm: LmConfig) -> None:
    """Refuse texts that together are larger than what a manifest holds, by the largest of them."""
    size_bytes = len(lm.to_bytes())
    if size_bytes <= MAX_BYTES:
        return
    texts = {
        "license": lm.licenses,
        "message": tuple(message.content for message in lm.messages),
        "template": (lm.template or "",),
        "system": (lm.system or "",),
    }
    largest = max(texts, key=lambda name: sum(map(len, texts[name])))
    raise InvalidRequest(
        f"the texts of the model have {size_bytes} bytes together, most of them {largest.upper()}; "
        f"at most {MAX_BYTES} are allowed",
        field=largest,
        hint="shorten it, or name where it can be read",
    )


def _plain_text(text: str) -> str:
    return _NOT_PLAIN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
