"""Making models: from a Modelfile, or from files that are in the store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmd.registry.digest import Digest
from lmd.registry.drafting import check_draft
from lmd.registry.errors import GgufInvalid, InvalidRequest
from lmd.registry.filenames import plain_basename
from lmd.registry.gguf import GgufHeader
from lmd.registry.lm_config import FileRole, LmConfig
from lmd.registry.manifest import BuiltManifest, FileLayer, Manifest, build_manifest
from lmd.registry.model_store import ModelStore, Tag, TagT, read_blob_header
from lmd.registry.modelfile import From, Modelfile
from lmd.registry.ref import NameRef, parse_ref

_ROLES: dict[str, FileRole] = {"model": "weights", "mmproj": "projector"}
_NOT_PLAIN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(slots=True)
class _Sources:
    """What the FROM lines add up to: the files they name themselves, and the model they build on.

    *bare* says that the model is named by its digest, so that nothing but its weights and projector is taken from it.
    """

    files: list[FileLayer] = field(default_factory=list)
    bare: bool = False
    base_files: list[FileLayer] = field(default_factory=list)
    inherited: LmConfig = field(default_factory=LmConfig)


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
) -> TagT:
    """Create or replace the model *name* from a Modelfile.

    Each FROM is one of these:

    - a key of *files*, which maps the arguments that are files to the blobs stored for them. Several shards may be
      given in any order, and a projector;
    - ``sha256:…`` of a GGUF blob of the store: the same, without a name;
    - ``sha256:…`` of a manifest of the store: its files and origin, and nothing else of it;
    - anything else names a stored model, which the caller has resolved to *base*. Its template, system prompt,
      parameters and licences are inherited where the Modelfile has none of its own (parameters one by one, licences
      are added), its messages unless there are new ones.

    The arguments of DRAFT are read in the same way, a name standing for *draft*, and give weights only; the base's
    draft is inherited by name when there is no DRAFT. A blob that is a draft of the base keeps the name it has there.

    With *expected*, the name must point to that manifest until then; it may be one that a pull gave, too.

    The same Modelfile and files always give the same manifest. On failure the name is as it was.

    Raises:
        InvalidRequest: when *name* is not a plain name, or a FROM or DRAFT cannot be used.
        GgufInvalid: when a file is no GGUF, is of a kind that cannot be a model, or shards are missing.
        BlobMissing: when a blob is not in the store.
        TagChanged: when the name points to another manifest than *expected*.
    """
    target = parse_ref(name)
    if target.digest is not None or not (isinstance(target, NameRef) or expected is not None):
        raise InvalidRequest(
            f"a model cannot be created as `{name}`",
            field="name",
            hint="choose a name such as `mario` or `me/mario:v2`",
        )
    sources = _Sources()
    for source in modelfile.from_:
        _add_source(store, sources, source, files or {}, base)
    _add_drafts(store, sources, modelfile.drafts, files or {}, draft)
    lm = _merge(sources.inherited, modelfile)
    return build_from_files(store, target.name, _all_files(sources), lm=lm, note=note, expected=expected)


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
        InvalidRequest: when a file's name cannot be stored, or the draft cannot draft for the weights.
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
        _check_projectors(store, others)
        if drafts:
            drafts = _checked_drafts(store, drafts, ordered)
        built = build_manifest(
            [*(file for file, _ in ordered), *others, *drafts],
            _with_plain_texts(lm or LmConfig()),
            [header for _, header in ordered],
        )
        lease.add(built.digest, *built.manifest.blob_digests())
        return _publish(store, name, built, note, expected)


def in_shard_order(weights: Sequence[FileLayer], headers: Sequence[GgufHeader]) -> list[tuple[FileLayer, GgufHeader]]:
    """Pair the weights with their headers in the order of the shards, and make sure that they are one whole model.

    Raises:
        GgufInvalid: naming the file that is too many, missing, or of another kind.
    """
    if not weights:
        raise GgufInvalid("no file has a model's weights")
    pairs = sorted(zip(weights, headers, strict=True), key=lambda pair: pair[1].split_no)
    for file, header in pairs:
        if header.kind != "model":
            raise GgufInvalid(f"`{file.filename}` is of the kind `{ascii(header.kind[:40])[1:-1]}`, not a model")
        if header.split_count != len(pairs):
            what = f"file {header.split_no + 1} of {header.split_count}" if header.split_count > 1 else "a whole model"
            raise GgufInvalid(f"`{file.filename}` is {what}, but {len(pairs)} were given")
    numbers = [header.split_no for _, header in pairs]
    if numbers != list(range(len(pairs))):
        raise GgufInvalid(f"the files are the parts {', '.join(str(n + 1) for n in numbers)} of {len(pairs)}")
    if not pairs[0][1].architecture:
        raise GgufInvalid("it does not say its architecture")
    if not any(header.tensors for _, header in pairs):
        raise GgufInvalid("it has no tensors, only metadata")
    return pairs


def _check_projectors(store: ModelStore[Tag], others: Sequence[FileLayer]) -> None:
    for file in others:
        kind = read_blob_header(store, file.digest).kind
        if file.role == "projector" and kind != "mmproj":
            raise GgufInvalid(f"`{file.filename}` is of the kind `{ascii(kind[:40])[1:-1]}`, not a projector")


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


def _add_source(
    store: ModelStore[Tag], sources: _Sources, source: From, files: Mapping[str, Digest], base: Tag | None
) -> None:
    digest = files.get(source.value, source.digest)
    if digest is None:
        if base is None:
            raise InvalidRequest(
                f"FROM `{ascii(source.value[:100])[1:-1]}` is no file and no model that is here",
                field="from",
                hint="pull the model first, or give the path of a GGUF file",
            )
        manifest = store.get_manifest(base.manifest)
        _add_model(sources, manifest, manifest.lm)
        return
    if source.value not in files and _is_manifest(store, digest):
        manifest = store.get_manifest(digest)
        _add_model(sources, manifest, LmConfig(origin=manifest.lm.origin))
        sources.bare = True
        return
    filename = plain_basename(source.value) if source.value in files else f"{digest.short}.gguf"
    kind = read_blob_header(store, digest).kind
    role = _ROLES.get(kind)
    if role is None:
        raise GgufInvalid(f"`{filename}` is of the kind `{ascii(kind[:40])[1:-1]}`, which is not supported yet")
    sources.files.append(FileLayer(digest, store.blob_size(digest), filename, role))


def _add_drafts(
    store: ModelStore[Tag],
    sources: _Sources,
    drafts: Sequence[From] | None,
    files: Mapping[str, Digest],
    named: Tag | None,
) -> None:
    """Replace the base's draft by what DRAFT says (None: it says nothing)."""
    known = {file.digest: file for file in sources.base_files if file.role == "draft"}
    if drafts is not None or sources.bare:
        sources.base_files = [file for file in sources.base_files if file.role != "draft"]
    for source in drafts or ():
        digest = files.get(source.value, source.digest)
        if digest is None:
            if named is None:
                raise InvalidRequest(
                    f"DRAFT `{ascii(source.value[:100])[1:-1]}` is no file and no model that is here",
                    field="draft",
                    hint="pull the model first, or give the path of a GGUF file",
                )
            sources.files += _weights_of(store.get_manifest(named.manifest))
        elif digest in known:
            sources.files.append(known[digest])
        elif source.value in files:
            filename = plain_basename(source.value)
            sources.files.append(FileLayer(digest, store.blob_size(digest), filename, "draft"))
        elif _is_manifest(store, digest):
            sources.files += _weights_of(store.get_manifest(digest))
        else:
            sources.files.append(FileLayer(digest, store.blob_size(digest), f"{digest.short}.gguf", "draft"))


def _weights_of(manifest: Manifest) -> list[FileLayer]:
    """The weights of a model, as the files of a draft."""
    return [
        FileLayer(layer.digest, layer.size_bytes, layer.filename or f"{layer.digest.short}.gguf", "draft")
        for layer in manifest.weights
    ]


def _is_manifest(store: ModelStore[Tag], digest: Digest) -> bool:
    with store.open_blob(digest) as blob:
        return blob.read(1) == b"{"


def _add_model(sources: _Sources, manifest: Manifest, inherited: LmConfig) -> None:
    if sources.base_files:
        raise InvalidRequest("a model is made of one other model at most", field="from", hint="leave one FROM out")
    sources.base_files = [
        FileLayer(layer.digest, layer.size_bytes, layer.filename or f"{layer.digest.short}.gguf", layer.role)
        for layer in manifest.files
        if layer.role
    ]
    sources.inherited = inherited


def _all_files(sources: _Sources) -> list[FileLayer]:
    """The base's files and the others; a projector or draft of one's own takes the place of the base's."""
    own_roles = {file.role for file in sources.files}
    if sources.base_files and "weights" in own_roles:
        raise InvalidRequest(
            "FROM names both a model and weights", field="from", hint="a model already has its weights; leave one out"
        )
    return [*(file for file in sources.base_files if file.role not in own_roles), *sources.files]


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
    )


def _with_plain_texts(lm: LmConfig) -> LmConfig:
    return replace(
        lm,
        template=_plain_text(lm.template or "") or None,
        system=_plain_text(lm.system or "") or None,
        licenses=tuple(text for license_text in lm.licenses if (text := _plain_text(license_text))),
        messages=tuple(replace(message, content=_plain_text(message.content)) for message in lm.messages),
    )


def _plain_text(text: str) -> str:
    return _NOT_PLAIN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
