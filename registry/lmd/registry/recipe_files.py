"""The files that a Modelfile names with FROM, DRAFT, ADAPTER and PROJECTOR, and those of the model it builds on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmd.registry.digest import Digest
from lmd.registry.errors import BlobMissing, GgufInvalid, InvalidRequest
from lmd.registry.filenames import plain_basename
from lmd.registry.lm_config import FileRole, LmConfig
from lmd.registry.manifest import FileLayer, Manifest
from lmd.registry.model_store import ModelStore, Tag, read_blob_header
from lmd.registry.modelfile import Adapter, From, Modelfile
from lmd.registry.removed import FilesGone, removed_model

_ROLES: dict[str, FileRole] = {"model": "weights", "mmproj": "projector"}


@dataclass(slots=True)
class Gathered:
    """What a Modelfile adds up to: its *own* files, those of the model it builds on, and what that hands down.

    *bare* says that the model is named by its digest, so that nothing but its weights and projector is taken from it.
    """

    own: list[FileLayer] = field(default_factory=list)
    bare: bool = False
    base_files: list[FileLayer] = field(default_factory=list)
    inherited: LmConfig = field(default_factory=LmConfig)

    @property
    def files(self) -> list[FileLayer]:
        """The base's files and the others; a projector or draft of one's own takes the place of the base's."""
        own_roles = {file.role for file in self.own}
        if self.base_files and "weights" in own_roles:
            raise InvalidRequest(
                "FROM names both a model and weights",
                field="from",
                hint="a model already has its weights; leave one out",
            )
        return [*(file for file in self.base_files if file.role not in own_roles), *self.own]

    def known(self, role: FileRole) -> dict[Digest, FileLayer]:
        """The base's files of a role by their digests; they keep their names."""
        return {file.digest: file for file in self.base_files if file.role == role}

    def drop(self, role: FileRole) -> None:
        """Take the base's files of a role away."""
        self.base_files = [file for file in self.base_files if file.role != role]


def gather(
    store: ModelStore[Tag],
    modelfile: Modelfile,
    files: Mapping[str, Digest],
    base: Tag | None,
    draft: Tag | None,
) -> Gathered:
    """Find the files that a Modelfile names.

    Each FROM is one of these:

    - a key of *files*, which maps the arguments that are files to the blobs stored for them. Several shards may be
      given in any order, and a projector;
    - the folder of several keys of *files* (see `keys_of`);
    - ``sha256:…`` of a GGUF blob of the store: the same, without a name;
    - ``sha256:…`` of a manifest of the store, or of one that was removed while its files are here: its files and
      origin, and nothing else of it;
    - anything else names a stored model, which the caller has resolved to *base*.

    The arguments of DRAFT are read in the same way, a name standing for *draft*, and give weights only. Those of
    ADAPTER and PROJECTOR are files or digests of GGUFs. What drafts and adapts in the base is inherited by name when
    there is no such directive. A blob that the base has for the same purpose keeps the name it has there.

    Raises: as `create_model`.
    """
    gathered = Gathered()
    for source in modelfile.from_:
        _add_from(store, gathered, source, files, base)
    _add_drafts(store, gathered, modelfile.drafts, files, draft)
    _add_adapters(store, gathered, modelfile.adapters, files)
    _add_projectors(store, gathered, modelfile.projectors, files)
    return gathered


def keys_of(value: str, files: Mapping[str, Digest]) -> list[str]:
    """Return the keys of *files* that an argument stands for: itself, or all below it when it is a folder or pattern.

    The files of an argument that stands for several have the keys ``ARGUMENT/NAME``.
    """
    if value in files:
        return [value]
    prefix = value.rstrip("/") + "/"
    return sorted(key for key in files if key.startswith(prefix) and "/" not in key[len(prefix) :])


def _add_from(
    store: ModelStore[Tag], gathered: Gathered, source: From, files: Mapping[str, Digest], base: Tag | None
) -> None:
    keys = keys_of(source.value, files)
    for key in keys:
        _add_file(store, gathered, files[key], plain_basename(key))
    if keys:
        return
    digest = source.digest
    if digest is None:
        if base is None:
            raise _unknown("FROM", source.value)
        manifest = store.get_manifest(base.manifest)
        _add_model(gathered, manifest.file_layers, manifest.lm)
    elif not _has(store, digest):
        removed = removed_model(store, digest)
        if removed is None:
            raise _gone("FROM", digest)
        if (missing := removed.first_missing(store)) is not None:
            raise removed.gone(missing)
        _add_model(gathered, removed.files, LmConfig(origin=removed.origin))
        gathered.bare = True
    elif _is_manifest(store, digest):
        manifest = store.get_manifest(digest)
        _add_model(gathered, manifest.file_layers, LmConfig(origin=manifest.lm.origin))
        gathered.bare = True
    else:
        _add_file(store, gathered, digest, f"{digest.short}.gguf")


def _add_file(store: ModelStore[Tag], gathered: Gathered, digest: Digest, filename: str) -> None:
    kind = read_blob_header(store, digest).kind
    role = _ROLES.get(kind)
    if role is None:
        shown = ascii(kind[:40])[1:-1]
        if kind == "adapter":
            raise InvalidRequest(
                f"FROM `{filename}` is an adapter, not a model",
                field="from",
                hint="name the model it was trained for with FROM, and the adapter with ADAPTER",
            )
        raise GgufInvalid(f"`{filename}` is of the kind `{shown}`, not a model")
    gathered.own.append(FileLayer(digest, store.blob_size(digest), filename, role))


def _add_model(gathered: Gathered, files: Sequence[FileLayer], inherited: LmConfig) -> None:
    if gathered.base_files:
        raise InvalidRequest("a model is made of one other model at most", field="from", hint="leave one FROM out")
    gathered.base_files = list(files)
    gathered.inherited = inherited


def _add_drafts(
    store: ModelStore[Tag],
    gathered: Gathered,
    drafts: Sequence[From] | None,
    files: Mapping[str, Digest],
    named: Tag | None,
) -> None:
    """Replace the base's draft by what DRAFT says (None: it says nothing)."""
    known = gathered.known("draft")
    if drafts is not None or gathered.bare:
        gathered.drop("draft")
    for source in drafts or ():
        keys = keys_of(source.value, files)
        for key in keys:
            digest = files[key]
            own = FileLayer(digest, store.blob_size(digest), plain_basename(key), "draft")
            gathered.own.append(known.get(digest, own))
        if not keys:
            gathered.own += _named_draft(store, source, known, named)


def _named_draft(
    store: ModelStore[Tag], source: From, known: Mapping[Digest, FileLayer], named: Tag | None
) -> list[FileLayer]:
    digest = source.digest
    if digest is None:
        if named is None:
            raise _unknown("DRAFT", source.value)
        return _weights_of(store.get_manifest(named.manifest))
    if digest in known:
        return [known[digest]]
    if not _has(store, digest):
        raise _gone("DRAFT", digest)
    if _is_manifest(store, digest):
        return _weights_of(store.get_manifest(digest))
    return [FileLayer(digest, store.blob_size(digest), f"{digest.short}.gguf", "draft")]


def _add_adapters(
    store: ModelStore[Tag], gathered: Gathered, adapters: Sequence[Adapter] | None, files: Mapping[str, Digest]
) -> None:
    """Replace the base's adapters by those that ADAPTER names (None: it says nothing)."""
    known = gathered.known("adapter")
    if adapters is not None or gathered.bare:
        gathered.drop("adapter")
    for adapter in adapters or ():
        digest, filename = _one_file(store, "ADAPTER", adapter.source, files)
        kept = known.get(digest)
        name = kept.filename if kept is not None else filename
        gathered.own.append(FileLayer(digest, store.blob_size(digest), name, "adapter", adapter.scale))


def _add_projectors(
    store: ModelStore[Tag], gathered: Gathered, projectors: Sequence[From] | None, files: Mapping[str, Digest]
) -> None:
    known = gathered.known("projector")
    if projectors is not None:
        gathered.drop("projector")
    for source in projectors or ():
        digest, filename = _one_file(store, "PROJECTOR", source, files)
        gathered.own.append(known.get(digest) or FileLayer(digest, store.blob_size(digest), filename, "projector"))


def _one_file(store: ModelStore[Tag], directive: str, source: From, files: Mapping[str, Digest]) -> tuple[Digest, str]:
    if source.value in files:
        return files[source.value], plain_basename(source.value)
    if source.digest is None:
        raise InvalidRequest(
            f"{directive} `{ascii(source.value[:100])[1:-1]}` is no file that is here",
            field=directive.lower(),
            hint="give the path of a GGUF file",
        )
    if not _has(store, source.digest):
        raise _gone(directive, source.digest)
    return source.digest, f"{source.digest.short}.gguf"


def _weights_of(manifest: Manifest) -> list[FileLayer]:
    """The weights of a model, as the files of a draft."""
    return [
        FileLayer(layer.digest, layer.size_bytes, layer.filename or f"{layer.digest.short}.gguf", "draft")
        for layer in manifest.weights
    ]


def _has(store: ModelStore[Tag], digest: Digest) -> bool:
    try:
        store.blob_size(digest)
    except BlobMissing:
        return False
    return True


def _gone(directive: str, digest: Digest) -> FilesGone:
    """Return the failure that a digest is which the store knows nothing of (any more)."""
    return FilesGone(
        digest,
        f"{directive} {digest} is not in the store, or no longer",
        f"put {'a model or ' if directive in ('FROM', 'DRAFT') else ''}the path of its GGUF file behind {directive}",
    )


def _is_manifest(store: ModelStore[Tag], digest: Digest) -> bool:
    with store.open_blob(digest) as blob:
        return blob.read(1) == b"{"


def _unknown(directive: str, value: str) -> InvalidRequest:
    return InvalidRequest(
        f"{directive} `{ascii(value[:100])[1:-1]}` is no file and no model that is here",
        field=directive.lower(),
        hint="pull the model first, or give the path of a GGUF file",
    )
