"""ModelService and StoreService through everything a client's bytes pass: front, private server, interceptors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lmd.daemon.blocking import BlockingPool
from lmd.daemon.catalog import Catalog
from lmd.daemon.pulls import ModelPuller, Pulls
from lmd.daemon.quantizer import Quantizer
from lmd.daemon.saved_kv import SavedKv
from lmd.daemon.services.models import ModelServiceServicer
from lmd.daemon.services.store import StoreServiceServicer
from lmd.registry.aliases import AliasTable
from lmd.registry.digest import Digest
from lmd.registry.errors import SourceDenied
from lmd.registry.pull import Puller, PullState
from lmd.registry.store import Store
from lmd.v1 import model_service_pb2 as pb
from lmd.v1 import model_service_pb2_grpc as rpc
from lmd.v1 import store_service_pb2, store_service_pb2_grpc
from tests.support.created_models import add_model, tiny_file
from tests.support.fake_puller import DEADLINE_S, FakePuller, progress
from tests.support.hub import HubServer
from tests.support.shell_daemon import shell


@dataclass
class Daemon:
    """A served catalog and its clients."""

    store: Store
    catalog: Catalog
    pulls: Pulls
    channel: grpc.aio.Channel
    files: Path

    @property
    def models(self) -> Any:
        return rpc.ModelServiceStub(self.channel)

    @property
    def storage(self) -> Any:
        return store_service_pb2_grpc.StoreServiceStub(self.channel)


def reason_of(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    status = rpc_status.from_call(error)
    assert status is not None, "the status has no details"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "lmd"
    return error.code(), info.reason, dict(info.metadata)


async def rest_of(call: Any) -> list[Any]:
    """Read a stream that was begun with read() to its end."""
    messages = []
    async with asyncio.timeout(DEADLINE_S):
        while (message := await call.read()) is not grpc.aio.EOF:
            messages.append(message)
    return messages


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads and on disk
            await asyncio.sleep(0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def puller() -> FakePuller:
    return FakePuller()


async def serve(
    store: Store, puller: ModelPuller, tmp_path_factory: pytest.TempPathFactory, files: Path
) -> AsyncIterator[Daemon]:
    run_dir = tmp_path_factory.mktemp("m")
    run_dir.chmod(0o700)
    pool = BlockingPool(4)
    catalog = Catalog(store, AliasTable.load(), pool)
    pulls = Pulls(puller)
    quantizer = Quantizer(store, pool, run_dir / "quantize")
    saved_kv = SavedKv(store.root / "kv", 1 << 30, "1.0", pool)

    def add_models(server: grpc.aio.Server) -> str:
        rpc.add_ModelServiceServicer_to_server(ModelServiceServicer(catalog, pulls, quantizer), server)
        return "lmd.v1.ModelService"

    def add_store(server: grpc.aio.Server) -> str:
        store_service_pb2_grpc.add_StoreServiceServicer_to_server(StoreServiceServicer(store, pool, saved_kv), server)
        return "lmd.v1.StoreService"

    async with shell(run_dir, servicers=[add_models, add_store]) as running, running.channel() as channel:
        yield Daemon(store, catalog, pulls, channel, files)
        await pulls.stop()
    await catalog.stop()
    pool.close()


@pytest.fixture
async def daemon(
    store: Store, puller: FakePuller, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Daemon]:
    async for daemon in serve(store, puller, tmp_path_factory, tmp_path):
        yield daemon


async def test_a_model_is_listed_and_described(daemon: Daemon) -> None:
    tag = add_model(
        daemon.store,
        daemon.files,
        "mine",
        more='SYSTEM Arr.\nPARAMETER temperature 0.5\nPARAMETER stop "<end>"\nMESSAGE user Hi\nLICENSE MIT\n',
    )
    (model,) = (await daemon.models.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.digest) == ("mine:latest", str(tag.manifest))
    assert model.modified_time.ToNanoseconds() == pytest.approx(tag.modified_at * 1e9, abs=1e3)
    assert (model.details.architecture, model.details.title, list(model.capabilities)) == (
        "llama",
        "tiny 1",
        ["completion"],
    )
    assert model.size_bytes > tiny_file(daemon.files).stat().st_size
    info = (await daemon.models.GetModel(pb.GetModelRequest(name="mine"))).info
    assert info.model == model
    assert (info.system, info.parameters.temperature, list(info.parameters.stop)) == ("Arr.", 0.5, ["<end>"])
    assert not info.parameters.HasField("top_k")
    assert [(message.role, message.content) for message in info.messages] == [("user", "Hi")]
    assert list(info.licenses) == ["MIT"]
    assert [(file.role, file.filename, file.size_bytes) for file in info.files] == [
        ("weights", "x.gguf", tiny_file(daemon.files).stat().st_size)
    ]
    assert info.metadata["general.architecture"] == "llama"
    assert "SYSTEM" in info.modelfile


async def test_a_model_that_is_shown_can_be_made_again(daemon: Daemon) -> None:
    tag = add_model(daemon.store, daemon.files, "mine", more="SYSTEM Arr.\nPARAMETER top_k 7\n")
    info = (await daemon.models.GetModel(pb.GetModelRequest(name="mine"))).info
    events = [
        event async for event in daemon.models.CreateModel(pb.CreateModelRequest(name="m2", modelfile=info.modelfile))
    ]
    assert events[-1].model.digest == str(tag.manifest)


async def test_pages(daemon: Daemon) -> None:
    tag = add_model(daemon.store, daemon.files, "a")
    for name in ("b", "c"):
        daemon.store.set_tag(f"{name}:latest", tag.manifest)
    first = await daemon.models.ListModels(pb.ListModelsRequest(page_size=2))
    second = await daemon.models.ListModels(pb.ListModelsRequest(page_size=2, page_token=first.next_page_token))
    assert [m.name for m in [*first.models, *second.models]] == ["c:latest", "b:latest", "a:latest"]
    assert second.next_page_token == ""


async def test_copy_and_delete(daemon: Daemon) -> None:
    add_model(daemon.store, daemon.files, "a")
    copied = await daemon.models.CopyModel(pb.CopyModelRequest(source="a", destination="b"))
    assert copied.model.name == "b:latest"
    assert (await daemon.models.DeleteModel(pb.DeleteModelRequest(name="a"))).freed_bytes == 0
    assert (await daemon.models.DeleteModel(pb.DeleteModelRequest(name="b"))).freed_bytes > 0
    assert (
        await daemon.models.DeleteModel(pb.DeleteModelRequest(name="b", allow_missing=True)) == pb.DeleteModelResponse()
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.models.DeleteModel(pb.DeleteModelRequest(name="b"))
    assert reason_of(caught.value)[:2] == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_errors_carry_their_reason_and_what_to_do(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.models.GetModel(pb.GetModelRequest(name="llama3"))
    code, reason, metadata = reason_of(caught.value)
    assert (code, reason, metadata["name"]) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "llama3")
    assert "lm pull llama3" in metadata["hint"]
    for name in ("", "../x", "a b"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await daemon.models.GetModel(pb.GetModelRequest(name=name))
        assert reason_of(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_MODEL_REF")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.models.CheckModelfile(pb.CheckModelfileRequest(modelfile="FROM x\nNONSENSE\n"))
    assert reason_of(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "MODELFILE_SYNTAX")


async def test_check_modelfile(daemon: Daemon) -> None:
    text = "FROM ./x.gguf\nDRAFT d\nFROM ./y.gguf\n"
    reply = await daemon.models.CheckModelfile(pb.CheckModelfileRequest(modelfile=text))
    assert list(getattr(reply, "from")) == ["./x.gguf", "./y.gguf"]
    assert list(reply.draft) == ["d"]


async def upload(data: bytes, size: int | None = None) -> AsyncIterator[pb.UploadBlobRequest]:
    yield pb.UploadBlobRequest(size_bytes=len(data) if size is None else size)
    for offset in range(0, len(data), 1 << 20):
        yield pb.UploadBlobRequest(data=data[offset : offset + (1 << 20)])


async def test_upload_then_create(daemon: Daemon) -> None:
    data = tiny_file(daemon.files).read_bytes()
    blob = (await daemon.models.UploadBlob(upload(data))).blob
    assert (blob.digest, blob.size_bytes) == (str(Digest.of(data)), len(data))
    request = pb.CreateModelRequest(name="mine", modelfile="FROM ./x.gguf\n", files={"./x.gguf": blob.digest})
    events = [event async for event in daemon.models.CreateModel(request)]
    assert [event.WhichOneof("event") for event in events].count("model") == 1
    assert events[-1].model.name == "mine:latest"


async def test_an_upload_of_another_size_is_refused(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.models.UploadBlob(upload(b"x" * 10, 11))
    assert reason_of(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


async def test_an_upload_whose_client_hangs_up_leaves_nothing(daemon: Daemon) -> None:
    sent = asyncio.Event()

    async def half() -> AsyncIterator[pb.UploadBlobRequest]:
        yield pb.UploadBlobRequest(size_bytes=1000, data=b"x" * 500)
        sent.set()
        await asyncio.Event().wait()

    call = daemon.models.UploadBlob(half())
    await sent.wait()
    await until(lambda: daemon.store.usage().ingests == 1)
    call.cancel()
    await until(lambda: daemon.store.usage().ingests == 0)
    assert daemon.store.usage().blobs == 0


async def test_import_file(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file(daemon.files)
    events = [event async for event in daemon.models.ImportFile(pb.ImportFileRequest(path=str(path)))]
    assert [event.WhichOneof("event") for event in events].count("blob") == 1
    assert events[-1].blob.digest == str(Digest.of(path.read_bytes()))
    assert events[0].progress.filename == path.name
    # The daemon of another user.
    monkeypatch.setattr("lmd.daemon.access.os.geteuid", lambda: os.getuid() + 1)
    for call in (
        daemon.models.ImportFile(pb.ImportFileRequest(path=str(path))),
        daemon.models.PullModel(pb.PullModelRequest(ref=str(path))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert reason_of(caught.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_REQUIRED")


async def test_a_pull_is_started_progress_model(daemon: Daemon, puller: FakePuller) -> None:
    call = daemon.models.PullModel(pb.PullModelRequest(ref="llama3", token="t"))
    started = (await call.read()).started
    assert (started.name, started.joined, bool(started.pull_id)) == ("llama3:latest", False, True)
    transfer = await puller.next_transfer()
    assert transfer.token == "t"
    transfer.report(progress("x.gguf", 50, resumed_bytes=20))
    while (event := (await call.read()).progress).filename == "":
        pass
    assert (event.completed_bytes, event.total_bytes, event.resumed_bytes) == (50, 100, 20)
    assert event.state == pb.PullProgress.STATE_DOWNLOADING
    transfer.succeed(daemon.store.set_tag("llama3:latest", add_model(daemon.store, daemon.files, "x").manifest))
    rest = await rest_of(call)
    assert [event.WhichOneof("event") for event in rest].count("model") == 1
    assert rest[-1].model.name == "llama3:latest"
    assert rest[-1].model.details.architecture == "llama"


async def test_two_clients_watch_one_pull_and_its_end_is_theirs(daemon: Daemon, puller: FakePuller) -> None:
    calls = [daemon.models.PullModel(pb.PullModelRequest(ref="llama3")) for _ in range(2)]
    started = [(await call.read()).started for call in calls]
    assert sorted(event.joined for event in started) == [False, True]
    assert started[0].pull_id == started[1].pull_id
    transfer = await puller.next_transfer()
    transfer.fail(SourceDenied("the repository is gated", ref="llama3", hint="accept its terms"))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(call)
        code, reason, metadata = reason_of(caught.value)
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "SOURCE_ACCESS_DENIED")
        assert metadata["hint"] == "accept its terms"
    (pull,) = (await daemon.models.ListPulls(pb.ListPullsRequest())).pulls
    assert (pull.state, pull.error_message, pull.ref) == (pb.Pull.STATE_FAILED, "the repository is gated", "llama3")


async def test_hanging_up_stops_a_pull_unless_it_is_detached(daemon: Daemon, puller: FakePuller) -> None:
    call = daemon.models.PullModel(pb.PullModelRequest(ref="a"))
    await call.read()
    watched = await puller.next_transfer()
    call.cancel()
    assert await asyncio.to_thread(watched.done.wait, DEADLINE_S)
    call = daemon.models.PullModel(pb.PullModelRequest(ref="b", detach=True))
    await call.read()
    detached = await puller.next_transfer()
    call.cancel()
    await until(lambda: daemon.pulls.statuses()[-1].watchers == 0)
    assert not detached.cancelled.is_set()
    pulls = (await daemon.models.ListPulls(pb.ListPullsRequest())).pulls
    assert [(pull.name, pull.state, pull.detached) for pull in pulls] == [
        ("a:latest", pb.Pull.STATE_CANCELLED, False),
        ("b:latest", pb.Pull.STATE_ACTIVE, True),
    ]
    await daemon.models.CancelPull(pb.CancelPullRequest(pull_id="b"))
    assert detached.done.is_set()


async def test_a_client_that_never_reads_holds_nobody_up(daemon: Daemon, puller: FakePuller) -> None:
    sleeper = daemon.models.PullModel(pb.PullModelRequest(ref="a"))
    await sleeper.read()
    transfer = await puller.next_transfer()
    names = [f"{number:04}-{'x' * 150}.gguf" for number in range(2000)]
    transfer.report(*(progress(name, 100, state=PullState.DONE) for name in names))
    transfer.report(progress("last.gguf", 1))
    watcher = daemon.models.PullModel(pb.PullModelRequest(ref="a"))
    seen: set[str] = set()
    async with asyncio.timeout(DEADLINE_S):
        while "last.gguf" not in seen:
            seen.add((await watcher.read()).progress.filename)
    assert seen >= set(names)
    # A handler that waits in a write must also notice that its client is gone.
    sleeper.cancel()
    watcher.cancel()
    assert await asyncio.to_thread(transfer.done.wait, DEADLINE_S)


async def test_cancel_of_nothing_is_refused(daemon: Daemon) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.models.CancelPull(pb.CancelPullRequest(pull_id="nobody"))
    assert reason_of(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


async def test_disk_usage_and_collection(daemon: Daemon) -> None:
    add_model(daemon.store, daemon.files, "mine")
    orphan = daemon.store.put_bytes(b"nobody needs this")
    usage = await daemon.storage.GetDiskUsage(store_service_pb2.GetDiskUsageRequest())
    assert (usage.models, usage.ingests, usage.quarantined) == (1, 0, 0)
    assert usage.blob_bytes > tiny_file(daemon.files).stat().st_size
    assert usage.free_bytes > 0
    assert usage.kv_bytes == 0
    saved = daemon.store.root / "kv" / ("0" * 64) / "1.0-ctx" / "1.kv"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(bytes(1234))
    usage = await daemon.storage.GetDiskUsage(store_service_pb2.GetDiskUsageRequest())
    assert usage.kv_bytes == 1234
    Request = store_service_pb2.CollectGarbageRequest

    async def collected(request: Any) -> tuple[list[Any], Any]:
        events = [event async for event in daemon.storage.CollectGarbage(request)]
        assert events[-1].WhichOneof("event") == "summary"
        return [event.item for event in events[:-1]], events[-1].summary

    items, summary = await collected(Request())
    assert (items, summary.spared_items) == ([], 1)
    items, summary = await collected(Request(dry_run=True, grace_period=Duration()))
    assert [(item.digest, item.kind, item.size_bytes) for item in items] == [
        (str(orphan), store_service_pb2.GarbageItem.KIND_BLOB, 17)
    ]
    assert (summary.items, summary.freed_bytes) == (1, 17)
    items, summary = await collected(Request(grace_period=Duration()))
    assert (len(items), summary.freed_bytes, summary.spared_items) == (1, 17, 0)
    items, summary = await collected(Request(grace_period=Duration()))
    assert (items, summary.items) == ([], 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collected(Request(grace_period=Duration(seconds=-1)))
    assert reason_of(caught.value)[1] == "INVALID_ARGUMENT"


async def test_a_model_comes_from_a_hub_and_is_made_into_another(
    store: Store, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The real puller and a real server: nothing of this chain is a stand-in."""
    with HubServer() as hub:
        hub.add_repo("org/tiny", {"tiny.Q8_0.gguf": tiny_file(tmp_path)})
        puller = Puller(store, AliasTable.load(), endpoint=hub.endpoint, user_agent="lmd-test")
        async for daemon in serve(store, puller, tmp_path_factory, tmp_path):
            request = pb.CreateModelRequest(name="pirate", modelfile="FROM hf.co/org/tiny\nSYSTEM Arr.\n")
            events = [event async for event in daemon.models.CreateModel(request)]
            kinds = [event.WhichOneof("event") for event in events]
            assert "progress" in kinds
            assert kinds[-1] == "model"
            info = (await daemon.models.GetModel(pb.GetModelRequest(name="pirate"))).info
            assert info.system == "Arr."
            assert info.origin.ref.startswith("hf.co/org/tiny:")
            again = [event async for event in daemon.models.PullModel(pb.PullModelRequest(ref="hf.co/org/tiny"))]
            states = {event.progress.state for event in again if event.WhichOneof("event") == "progress"}
            assert pb.PullProgress.STATE_PRESENT in states
            assert pb.PullProgress.STATE_DOWNLOADING not in states
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest_of(daemon.models.PullModel(pb.PullModelRequest(ref="hf.co/org/nothing")))
            assert reason_of(caught.value)[1] in ("SOURCE_NOT_FOUND", "SOURCE_ACCESS_DENIED")
        puller.close()
