from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest
from gguf import GGUFReader

from lmd.daemon import uploads as uploads_module
from lmd.daemon.access import pull_ref
from lmd.daemon.blocking import BlockingPool
from lmd.daemon.callers import Caller
from lmd.daemon.catalog import Catalog
from lmd.daemon.creating import Quantization, Step, create
from lmd.daemon.errors import UploadRequired
from lmd.daemon.pulls import Pulls
from lmd.daemon.quantizer import Quantizer
from lmd.daemon.uploads import MAX_CHUNK_BYTES, Chunk, StoredBlob
from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import (
    BlobCorrupt,
    BlobMissing,
    DigestMismatch,
    DiskFull,
    FileInvalid,
    GgufInvalid,
    InvalidRef,
    InvalidRequest,
    ModelfileSyntax,
    ModelNotFound,
)
from lmd.registry.modelfile import Modelfile
from lmd.registry.pull import PullEvent, PullState
from lmd.registry.store import Store, TagRecord
from tests.support.created_models import add_model, tiny_file
from tests.support.fake_puller import FakePuller, progress
from tests.support.tiny_models import CHATML, split_model

ME = Caller(os.geteuid(), os.getpid(), "me")
SOMEBODY = Caller(os.geteuid() + 1, 1, "somebody")
#: No type is asked for here, so nobody has to do it.
NO_QUANTIZATION = Quantization(cast(Quantizer, None))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def pool() -> Iterator[BlockingPool]:
    pool = BlockingPool(3)
    yield pool
    pool.close()


@pytest.fixture
async def catalog(store: Store, pool: BlockingPool) -> AsyncIterator[Catalog]:
    catalog = Catalog(store, AliasTable.load(), pool)
    yield catalog
    await catalog.stop()


@pytest.fixture
def puller() -> FakePuller:
    return FakePuller()


@pytest.fixture
async def pulls(puller: FakePuller) -> AsyncIterator[Pulls]:
    pulls = Pulls(puller)
    yield pulls
    await pulls.stop()


async def build(
    catalog: Catalog,
    name: str,
    recipe: Modelfile,
    *,
    files: Mapping[str, Digest] | None = None,
    base: TagRecord | None = None,
) -> TagRecord:
    """Make a model of what is in the store, as creating does once it has found its base."""
    named = [base.manifest] if base is not None else []
    async with catalog.hold("a test", [*(files or {}).values(), *named]):
        parts, lm = await catalog.gather(recipe, files=files or {}, base=base)
        return await catalog.publish(name, parts, lm, note="create")


# Finding


async def test_a_model_is_found_by_the_ways_to_write_its_name(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    tag = add_model(store, tmp_path, "mine")
    digest = Digest.of(tiny_file(tmp_path).read_bytes())
    for text in ("mine", "MINE:latest", f"mine@{tag.manifest}", f"mine@{digest}"):
        assert await catalog.find(text) == tag
    with pytest.raises(InvalidRef):
        await catalog.find("../mine")


async def test_an_alias_stands_for_its_repository_and_back_is_not_guessed(
    catalog: Catalog, store: Store, tmp_path: Path
) -> None:
    tag = add_model(store, tmp_path, "mine")
    repository = AliasTable.load().resolve(pull_ref("llama3", ME))  # type: ignore[arg-type]
    assert repository is not None
    stored = store.set_tag(repository.name, tag.manifest)
    assert await catalog.find("llama3") == stored
    own = store.set_tag("llama3:latest", tag.manifest)
    assert await catalog.find("llama3") == own, "the name itself comes first"


async def test_removing_never_follows_an_alias(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    tag = add_model(store, tmp_path, "mine")
    repository = AliasTable.load().resolve(pull_ref("llama3", ME))  # type: ignore[arg-type]
    assert repository is not None
    store.set_tag(repository.name, tag.manifest)
    with pytest.raises(ModelNotFound):
        await catalog.delete("llama3")
    assert store.get_tag(repository.name) is not None


async def test_another_digest_than_the_asserted_is_not_found_and_says_which_it_is(
    catalog: Catalog, store: Store, tmp_path: Path
) -> None:
    tag = add_model(store, tmp_path, "mine")
    with pytest.raises(ModelNotFound) as caught:
        await catalog.find(f"mine@{Digest.of(b'another')}")
    assert str(tag.manifest) in caught.value.hint


async def test_an_unknown_name_comes_with_close_ones(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    add_model(store, tmp_path, "mistraal-mine")
    with pytest.raises(ModelNotFound) as caught:
        await catalog.find("mistraal-mime")
    assert caught.value.suggestions[0] == "mistraal-mine"
    assert "mistraal-mine" in caught.value.hint
    with pytest.raises(ModelNotFound) as caught:
        await catalog.find("completely-different-thing")
    assert (caught.value.suggestions, caught.value.hint) == ((), "")


@pytest.mark.parametrize("text", ["llama3", "hf.co/some/repo", "hf.co/some/repo:Q8_0", "https://127.0.0.1/x.gguf"])
async def test_what_can_be_pulled_comes_with_the_command(catalog: Catalog, text: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        await catalog.find(text)
    assert caught.value.hint.startswith(f"get it with `lm pull {text}")


async def test_a_path_means_the_model_made_of_that_file_and_no_namesake(
    catalog: Catalog, store: Store, tmp_path: Path
) -> None:
    add_model(store, tmp_path, "x")
    with pytest.raises(ModelNotFound) as caught:
        await catalog.find("/somewhere/x.gguf")
    assert "lm pull file:/somewhere/x.gguf" in caught.value.hint
    with pytest.raises(ModelNotFound):
        await catalog.delete("/somewhere/x.gguf")


async def test_a_resolved_model_has_what_a_runner_needs(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    path = tiny_file(tmp_path, chat_template=CHATML)
    digest, size = store.import_file(path)
    recipe = await catalog.parse("FROM ./x.gguf\nSYSTEM Arr.\nPARAMETER temperature 0.5\nMESSAGE user Hi\n")
    tag = await build(catalog, "mine:latest", recipe, files={"./x.gguf": digest})
    model = await catalog.resolve("mine")
    assert (model.name, model.manifest_digest) == ("mine:latest", tag.manifest)
    assert [file.read_bytes() for file in model.weights] == [path.read_bytes()]
    assert (model.template, model.system, dict(model.parameters)) == (CHATML, "Arr.", {"temperature": 0.5})
    assert [(message.role, message.content) for message in model.messages] == [("user", "Hi")]
    assert model.capabilities == ("completion", "chat")
    assert model.header.architecture == "llama"
    assert model.size_bytes > size


async def test_a_model_whose_file_is_damaged_or_gone_does_not_resolve(
    catalog: Catalog, store: Store, tmp_path: Path
) -> None:
    """The request that finds the damage was once told that the file is missing, and nobody that it is in quarantine."""
    add_model(store, tmp_path, "mine")
    digest = Digest.of(tiny_file(tmp_path).read_bytes())
    path = store.blob_path(digest)
    path.chmod(0o600)
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BlobCorrupt):
        await catalog.resolve("mine")
    with pytest.raises(BlobMissing):
        await catalog.resolve("mine")
    (listed,) = (await catalog.list()).models
    assert listed.tag.name == "mine:latest", "it can still be listed, and so removed"


# Lists


async def test_lists_are_newest_first_and_filter_by_prefix(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    first = add_model(store, tmp_path, "alpha")
    for name in ("beta", "Alpine"):
        store.set_tag(f"{name.lower()}:latest", first.manifest)
    assert [m.tag.name for m in (await catalog.list()).models] == ["alpine:latest", "beta:latest", "alpha:latest"]
    page = await catalog.list("AL")
    assert [m.tag.name for m in page.models] == ["alpine:latest", "alpha:latest"]
    assert page.models[0].summary.architecture == "llama"
    assert page.next_token == ""


async def test_pages_miss_nothing_and_repeat_nothing_when_the_list_changes_between_them(
    catalog: Catalog, store: Store, tmp_path: Path
) -> None:
    tag = add_model(store, tmp_path, "m0")
    for number in range(1, 7):
        store.set_tag(f"m{number}:latest", tag.manifest)
    seen: list[str] = []
    token = ""
    while True:
        page = await catalog.list(page_size=2, page_token=token)
        seen += [model.tag.name for model in page.models]
        token = page.next_token
        if not token:
            break
        store.set_tag(f"new{len(seen)}:latest", tag.manifest)
        store.delete_tag(seen[-1])
    assert seen == [f"m{number}:latest" for number in range(6, -1, -1)]


async def test_a_page_token_of_somebody_else_is_refused(catalog: Catalog) -> None:
    for token in ("x", "AAAA", "bnVsbA==", "e30=", "WzEsMiwzXQ=="):
        with pytest.raises(InvalidRequest, match="page token"):
            await catalog.list(page_token=token)
    with pytest.raises(InvalidRequest, match="fewer than 0"):
        await catalog.list(page_size=-1)


async def test_a_list_opens_no_model_twice_even_after_a_restart(
    catalog: Catalog, store: Store, pool: BlockingPool, tmp_path: Path
) -> None:
    add_model(store, tmp_path, "mine")
    first = (await catalog.list()).models
    path = store.blob_path(Digest.of(tiny_file(tmp_path).read_bytes()))
    path.unlink()
    assert (await Catalog(store, AliasTable.load(), pool).list()).models == first


# Removing and copying


async def test_removing_frees_what_nothing_else_needs(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    size = tiny_file(tmp_path).stat().st_size
    add_model(store, tmp_path, "mine")
    await catalog.copy("mine", "twin")
    removal = await catalog.delete("mine")
    assert (removal.freed_bytes, removal.pending_bytes) == (0, 0)
    removal = await catalog.delete("twin")
    assert removal.freed_bytes > size
    assert removal.pending_bytes == 0
    assert store.usage().blobs == 0
    with pytest.raises(ModelNotFound):
        await catalog.delete("twin")


async def test_a_resident_models_bytes_follow_when_it_stops(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    tag = add_model(store, tmp_path, "mine")
    size = (await catalog.resolve("mine")).size_bytes
    residents = {tag.manifest}
    store.set_resident_roots(lambda: set(residents))
    removal = await catalog.delete("mine")
    assert removal.freed_bytes == 0
    assert removal.pending_bytes >= size
    assert store.usage().blobs > 0
    residents.clear()
    catalog.model_released(tag.manifest)
    await catalog.stop()
    assert store.usage().blobs == 0


async def test_a_model_that_cannot_be_read_can_be_removed(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    tag = add_model(store, tmp_path, "mine")
    path = store.blob_path(tag.manifest)
    path.chmod(0o600)
    path.write_bytes(b"{}")
    await catalog.delete("mine")
    assert store.list_tags() == []


@pytest.mark.parametrize("name", ["hf.co/a/b", "https://127.0.0.1/x.gguf", "/x.gguf", "x@sha256:" + "a" * 64])
async def test_a_copy_needs_a_plain_name(catalog: Catalog, store: Store, tmp_path: Path, name: str) -> None:
    add_model(store, tmp_path, "mine")
    with pytest.raises(InvalidRequest) as caught:
        await catalog.copy("mine", name)
    assert caught.value.metadata["field"] == "destination"


async def test_a_copy_replaces_what_was_there(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    tag = add_model(store, tmp_path, "mine", 1)
    add_model(store, tmp_path, "other", 2)
    copied = await catalog.copy("mine", "OTHER")
    assert (copied.tag.name, copied.tag.manifest) == ("other:latest", tag.manifest)


# Creating


async def steps_of(
    catalog: Catalog, pulls: Pulls, name: str, modelfile: str, files: dict[str, Digest] | None = None
) -> list[Step]:
    return [
        step
        async for step in create(
            catalog, pulls, name=name, modelfile=modelfile, files=files or {}, quantization=NO_QUANTIZATION
        )
    ]


async def test_create_from_a_file_that_was_stored(catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path) -> None:
    stored = [event async for event in catalog.uploads.import_file(tiny_file(tmp_path), ME)][-1]
    assert isinstance(stored, StoredBlob)
    steps = await steps_of(catalog, pulls, "Mine", "FROM ./t.gguf\nSYSTEM Arr.\n", {"./t.gguf": stored.digest})
    assert steps[:-1] == ["reading the Modelfile", "creating mine:latest"]
    assert steps[-1] == store.get_tag("mine:latest")
    assert (await catalog.info("mine")).system == "Arr."
    await catalog.delete("mine")
    assert store.usage().blobs == 0, "the lease of the import ended with the creation"


async def test_create_from_a_model_that_is_here(catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path) -> None:
    add_model(store, tmp_path, "base", more="SYSTEM Base.\nPARAMETER top_k 7\n")
    await steps_of(catalog, pulls, "child", "FROM base\nPARAMETER temperature 0.5\n")
    facts = await catalog.info("child")
    assert (facts.system, dict(facts.parameters)) == ("Base.", {"top_k": 7, "temperature": 0.5})


async def test_a_base_that_is_removed_meanwhile(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    base = add_model(store, tmp_path, "base")
    kept = add_model(store, tmp_path, "kept", more="SYSTEM Kept.\n")
    recipe = await catalog.parse("FROM base\n")
    await catalog.delete("base")
    with pytest.raises(ModelNotFound, match="model `base:latest` not found") as caught:
        await build(catalog, "child:latest", recipe, base=base)
    assert caught.value.hint == "it was removed meanwhile; pull or create it again, then try once more"
    assert [tag.name for tag in store.list_tags()] == [kept.name]
    with store.lease("a running pull") as lease:
        lease.add(kept.manifest)
        await catalog.delete("kept")
        await build(catalog, "child:latest", recipe, base=kept)
    assert (await catalog.info("child")).system == "Kept."


async def test_many_creates_of_one_name_at_once(catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path) -> None:
    """Each is whole, the name is one of them, and its history has all."""
    add_model(store, tmp_path, "base")
    made = await asyncio.gather(
        *(steps_of(catalog, pulls, "one", f"FROM base\nSYSTEM {number}\n") for number in range(20))
    )
    digests = {steps[-1].manifest for steps in made if isinstance(steps[-1], TagRecord)}
    assert len(digests) == 20
    tag = store.get_tag("one:latest")
    assert tag is not None
    assert {change.manifest for change in store.tag_history("one:latest")} == digests
    assert store.tag_history("one:latest")[-1].manifest == tag.manifest
    assert store.get_manifest(tag.manifest).lm.system in [str(number) for number in range(20)]


@pytest.mark.parametrize("directive", ["FROM", "FROM base\nDRAFT"])
async def test_a_model_cannot_be_made_of_what_it_is_to_become(
    catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path, directive: str
) -> None:
    add_model(store, tmp_path, "base")
    with pytest.raises(InvalidRequest, match="One is the model that is to be made, and there is none yet"):
        await steps_of(catalog, pulls, "one", f"{directive} One\n")


async def test_create_from_shards(catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path) -> None:
    shards = split_model(tiny_file(tmp_path), 2)
    files = {f"./{shard.name}": store.import_file(shard)[0] for shard in shards}
    await steps_of(catalog, pulls, "mine", "".join(f"FROM {value}\n" for value in files), files)
    (weights,) = (await catalog.resolve("mine")).weights
    merged = GGUFReader(weights)
    whole = GGUFReader(tiny_file(tmp_path))
    assert [(each.name, each.data.tobytes()) for each in merged.tensors] == [
        (each.name, each.data.tobytes()) for each in whole.tensors
    ]
    first = dict([next(iter(files.items()))])
    with pytest.raises(GgufInvalid):
        await steps_of(catalog, pulls, "half", f"FROM {next(iter(first))}\n", first)


async def test_create_pulls_a_base_that_is_missing(
    catalog: Catalog, pulls: Pulls, puller: FakePuller, store: Store, tmp_path: Path
) -> None:
    task = asyncio.create_task(steps_of(catalog, pulls, "child", "FROM hf.co/org/repo\nSYSTEM Arr.\n"))
    transfer = await puller.next_transfer()
    assert transfer.ref.name == "hf.co/org/repo:latest"
    transfer.report(progress("x.gguf", 100, state=PullState.DONE))
    transfer.succeed(store.set_tag(transfer.ref.name, add_model(store, tmp_path, "pulled").manifest))
    steps = await task
    assert "pulling hf.co/org/repo:latest" in steps
    assert any(isinstance(step, PullEvent) and step.completed_bytes == 100 for step in steps)
    assert (await catalog.info("child")).system == "Arr."


async def test_a_draft_comes_from_a_model_that_is_here_without_a_copy(
    catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path
) -> None:
    add_model(store, tmp_path, "base", 1, "SYSTEM Base.\n")
    add_model(store, tmp_path, "small", 2, "SYSTEM Small.\n")
    blobs = store.usage().blobs
    await steps_of(catalog, pulls, "fast", "FROM base\nDRAFT small\n")
    # A manifest, what it says of the model, and its config; no weights.
    assert store.usage().blobs <= blobs + 3
    fast, small = await catalog.resolve("fast"), await catalog.resolve("small")
    assert (fast.draft, fast.draft_header, fast.system) == (small.weights, small.header, "Base.")
    assert (small.draft, small.draft_header) == ((), None)
    await steps_of(catalog, pulls, "child", "FROM fast\nSYSTEM Child.\n")
    assert (await catalog.resolve("child")).draft == small.weights
    for name in ("fast", "base", "small"):
        await catalog.delete(name)
    assert all(path.exists() for path in small.weights), "the child still needs it"
    await steps_of(catalog, pulls, "child", 'FROM child\nDRAFT ""\n')
    assert (await catalog.resolve("child")).draft == ()


async def test_create_pulls_a_draft_that_is_missing(
    catalog: Catalog, pulls: Pulls, puller: FakePuller, store: Store, tmp_path: Path
) -> None:
    add_model(store, tmp_path, "base", 1)
    task = asyncio.create_task(steps_of(catalog, pulls, "fast", "FROM base\nDRAFT hf.co/org/small\n"))
    transfer = await puller.next_transfer()
    transfer.succeed(store.set_tag(transfer.ref.name, add_model(store, tmp_path, "pulled", 2).manifest))
    assert "pulling hf.co/org/small:latest" in await task
    assert (await catalog.resolve("fast")).draft == (await catalog.resolve("pulled")).weights


async def test_a_draft_file_must_have_been_stored_and_there_is_one_model_at_most(
    catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path
) -> None:
    add_model(store, tmp_path, "base", 1)
    add_model(store, tmp_path, "small", 2)
    with pytest.raises(InvalidRequest, match=r"DRAFT \./d\.gguf is a file") as caught:
        await steps_of(catalog, pulls, "fast", "FROM base\nDRAFT ./d.gguf\n")
    assert caught.value.hint
    with pytest.raises(InvalidRequest, match="one draft at most"):
        await steps_of(catalog, pulls, "fast", "FROM base\nDRAFT small\nDRAFT base\n")


async def test_who_gives_up_a_creation_leaves_its_pull(catalog: Catalog, pulls: Pulls, puller: FakePuller) -> None:
    task = asyncio.create_task(steps_of(catalog, pulls, "child", "FROM hf.co/org/repo\n"))
    transfer = await puller.next_transfer()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transfer.cancelled.is_set()


async def test_what_cannot_be_created_says_why_and_leaves_the_name(
    catalog: Catalog, pulls: Pulls, store: Store, tmp_path: Path
) -> None:
    tag = add_model(store, tmp_path, "mine")
    text_digest = store.put_bytes(b"just text")
    cases: list[tuple[str, str, dict[str, Digest], type[Exception]]] = [
        ("mine", "FORM ./x\nFROM ./x\n", {}, ModelfileSyntax),
        ("mine", "FROM ./x.gguf\n", {}, InvalidRequest),
        ("mine", "FROM mine\n", {"./unused.gguf": text_digest}, InvalidRequest),
        ("mine", "FROM ./x.gguf\n", {"./x.gguf": text_digest}, GgufInvalid),
        ("mine", "FROM ./x.gguf\n", {"./x.gguf": Digest.of(b"never stored")}, BlobMissing),
        ("mine", "FROM mine\nFROM mine\n", {}, InvalidRequest),
        ("hf.co/not/plain", "FROM mine\n", {}, InvalidRequest),
        ("../mine", "FROM mine\n", {}, InvalidRef),
    ]
    for name, modelfile, files, error in cases:
        with pytest.raises(error):
            await steps_of(catalog, pulls, name, modelfile, files)
    assert store.get_tag("mine:latest") == tag


async def test_a_modelfile_is_checked_without_making_anything(catalog: Catalog, store: Store) -> None:
    recipe = await catalog.parse("FROM ./a.gguf\nFROM base\nDRAFT ./d.gguf\n")
    assert [source.value for source in recipe.sources] == ["./a.gguf", "base", "./d.gguf"]
    with pytest.raises(ModelfileSyntax) as caught:
        await catalog.parse("FROM a\nNONSENSE\nPARAMETER temperature warm\n")
    assert [problem.line for problem in caught.value.problems] == [2, 3]
    assert store.list_tags() == []


# Files


async def chunks_of(data: bytes, size: int | None = None, piece: int = 1 << 16) -> AsyncIterator[Chunk]:
    for offset in range(0, len(data), piece):
        yield Chunk(len(data) if size is None else size, data[offset : offset + piece])


async def test_an_upload_becomes_a_blob_that_survives_a_collection(catalog: Catalog, store: Store) -> None:
    data = os.urandom(300_000)
    stored = await catalog.uploads.receive(chunks_of(data))
    assert stored == StoredBlob(Digest.of(data), len(data))
    assert store.blob_path(stored.digest).read_bytes() == data
    assert list(store.collect(grace_s=0)) == []
    catalog.uploads.release([stored.digest])
    assert [item.digest_or_name for item in store.collect(grace_s=0)] == [str(stored.digest)]


async def pieces_of(data: bytes, piece: int = 1 << 16) -> AsyncIterator[bytes]:
    for offset in range(0, len(data), piece):
        yield data[offset : offset + piece]


async def test_an_upload_need_not_tell_its_size(
    catalog: Catalog, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "RESERVED_STEP_BYTES", 100_000)
    data = os.urandom(300_000)
    stored = await catalog.uploads.store(pieces_of(data), size_bytes=None)
    assert stored == StoredBlob(Digest.of(data), len(data))
    assert store.blob_path(stored.digest).read_bytes() == data
    assert list(store.collect(grace_s=0)) == []
    assert (await catalog.uploads.store(pieces_of(b""), size_bytes=None)).size_bytes == 0


async def test_space_is_set_aside_while_an_upload_of_unknown_size_goes_on(
    catalog: Catalog, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "RESERVED_STEP_BYTES", 1 << 60)
    with pytest.raises(DiskFull):
        await catalog.uploads.store(pieces_of(b"x"), size_bytes=None)
    assert store.usage().ingests == 0


async def test_an_upload_of_other_bytes_than_expected_leaves_nothing(catalog: Catalog, store: Store) -> None:
    with pytest.raises(DigestMismatch) as caught:
        await catalog.uploads.store(pieces_of(b"sent"), size_bytes=4, expected=Digest.of(b"wanted"))
    assert caught.value.metadata == {"expected": str(Digest.of(b"wanted")), "actual": str(Digest.of(b"sent"))}
    usage = store.usage()
    assert (usage.blobs, usage.ingests) == (0, 0)


async def test_a_blob_that_was_found_is_kept_like_an_uploaded_one(catalog: Catalog, store: Store) -> None:
    digest = store.put_bytes(b"somebody's")
    assert not await catalog.uploads.keep(Digest.of(b"never stored"))
    for _ in range(3):
        assert await catalog.uploads.keep(digest)
    assert list(store.collect(grace_s=0)) == []
    catalog.uploads.release([digest])
    assert [item.digest_or_name for item in store.collect(grace_s=0)] == [str(digest)]


async def test_the_generation_grows_with_every_change_of_a_name(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    seen = [catalog.generation]
    tag = add_model(store, tmp_path, "one")
    seen.append(catalog.generation)
    await catalog.copy("one", "two")
    seen.append(catalog.generation)
    await catalog.delete("two")
    seen.append(catalog.generation)
    assert seen == sorted(set(seen))
    with pytest.raises(ModelNotFound):
        await catalog.delete("two")
    assert [listed.tag for listed in await catalog.models()] == [tag]
    assert catalog.generation == seen[-1]


async def test_the_same_upload_twice_is_one_blob(catalog: Catalog, store: Store) -> None:
    data = os.urandom(1000)
    first, second = await asyncio.gather(*(catalog.uploads.receive(chunks_of(data)) for _ in range(2)))
    assert first == second
    assert store.usage().blobs == 1


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (b"x" * 100, 99, "more bytes came"),
        (b"x" * 100, 101, "ended after 100 of 101"),
        (b"x" * 100, 0, "must tell its size"),
        (b"x" * 100, -5, "must tell its size"),
        (b"", None, "must tell its size"),
    ],
)
async def test_an_upload_of_another_size_leaves_nothing(
    catalog: Catalog, store: Store, data: bytes, size: int | None, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await catalog.uploads.receive(chunks_of(data, size))
    usage = store.usage()
    assert (usage.blobs, usage.ingests) == (0, 0)


async def test_a_piece_that_is_too_big_is_refused(catalog: Catalog, store: Store) -> None:
    data = b"x" * (MAX_CHUNK_BYTES + 1)
    with pytest.raises(InvalidRequest, match="at most"):
        await catalog.uploads.receive(chunks_of(data, piece=len(data)))
    assert store.usage().ingests == 0


async def test_an_upload_that_is_cut_off_leaves_nothing(catalog: Catalog, store: Store) -> None:
    received = asyncio.Event()

    async def cut() -> AsyncIterator[Chunk]:
        yield Chunk(1000, b"x" * 500)
        received.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(catalog.uploads.receive(cut()))
    await received.wait()
    assert store.usage().ingests == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    usage = store.usage()
    assert (usage.blobs, usage.ingests) == (0, 0)


async def test_an_upload_that_is_cancelled_while_it_cleans_up_leaves_nothing(store: Store) -> None:
    """A client that hangs up shows first as the end of its messages, then as a cancellation.

    The second came while the first was being cleaned up after, and the removal of the ingest, which still waited for
    a thread, was dropped with it.
    """
    pool = BlockingPool(1)
    uploads = Catalog(store, AliasTable.load(), pool).uploads
    gate = threading.Event()
    ended = asyncio.Event()
    blockers: list[asyncio.Task[bool]] = []

    async def short() -> AsyncIterator[Chunk]:
        yield Chunk(1000, b"x" * 500)
        blockers.append(asyncio.create_task(pool.run(gate.wait, 20)))
        await asyncio.sleep(0)  # it has the only thread from here on
        ended.set()

    task = asyncio.create_task(uploads.receive(short()))
    await ended.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.gather(*blockers)
    assert store.usage().ingests == 0
    pool.close()


async def test_an_upload_without_room_is_refused_before_its_first_byte(catalog: Catalog, store: Store) -> None:
    with pytest.raises(DiskFull):
        await catalog.uploads.receive(chunks_of(b"x", 1 << 60))
    assert store.usage().ingests == 0


async def test_an_import_tells_its_progress_and_then_the_blob(catalog: Catalog, store: Store, tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    events = [event async for event in catalog.uploads.import_file(path, ME)]
    size = path.stat().st_size
    assert events[-1] == StoredBlob(Digest.of(path.read_bytes()), size)
    last = events[-2]
    assert isinstance(last, PullEvent)
    assert (last.filename, last.completed_bytes, last.total_bytes, last.state) == (
        path.name,
        size,
        size,
        PullState.DONE,
    )
    assert list(store.collect(grace_s=0)) == [], "it waits for the model that will refer to it"


async def test_files_are_opened_for_the_daemons_own_user_only(catalog: Catalog, tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    with pytest.raises(UploadRequired):
        [event async for event in catalog.uploads.import_file(path, SOMEBODY)]
    with pytest.raises(UploadRequired):
        pull_ref(str(path), SOMEBODY)
    with pytest.raises(InvalidRequest, match="not absolute"):
        [event async for event in catalog.uploads.import_file(Path("tiny.gguf"), ME)]
    with pytest.raises(InvalidRequest, match="not absolute"):
        pull_ref("./tiny.gguf", ME)
    assert pull_ref(str(path), ME).name == "tiny-1:latest"
    assert pull_ref("llama3", SOMEBODY).name == "llama3:latest"


async def test_what_is_no_regular_file_is_not_imported(catalog: Catalog, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tiny_file(tmp_path))
    for name in ("fifo", "link", "missing", "store"):
        with pytest.raises(FileInvalid):
            [event async for event in catalog.uploads.import_file(tmp_path / name, ME)]


async def test_an_import_that_is_given_up_ends_before_its_iterator_does(
    catalog: Catalog, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, ended = threading.Event(), threading.Event()

    def endless(path: Path, *, cancelled: threading.Event, **_: object) -> tuple[Digest, int]:
        running.set()
        cancelled.wait(20)
        ended.set()
        return Digest.of(b""), 0

    monkeypatch.setattr(store, "import_file", endless, raising=True)
    events = catalog.uploads.import_file(tiny_file(tmp_path), ME)
    assert isinstance(await anext(events), PullEvent)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(running.wait, 20)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()
    await events.aclose()
