"""ModelService over gRPC: translates, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio

from lmd.daemon.access import pull_ref
from lmd.daemon.callers import caller_of
from lmd.daemon.catalog import Catalog
from lmd.daemon.creating import Quantization, create
from lmd.daemon.pulls import Pulls
from lmd.daemon.quantizer import Quantizer, WorkProgress
from lmd.daemon.quantizing import Compared, QuantizeRequest, Quantizing
from lmd.daemon.services.messages import (
    check_message,
    info_message,
    measurement_message,
    model_message,
    problem_message,
    progress_message,
    pull_message,
    version_message,
    work_message,
)
from lmd.daemon.uploads import Chunk, StoredBlob
from lmd.registry.digest import Digest
from lmd.registry.errors import ModelfileSyntax, ModelNotFound
from lmd.registry.pull import PullEvent
from lmd.v1 import model_service_pb2 as pb
from lmd.v1 import model_service_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServiceServicer(rpc.ModelServiceServicer):
    """Manages the models of the store."""

    def __init__(self, catalog: Catalog, pulls: Pulls, quantizer: Quantizer) -> None:
        self._catalog = catalog
        self._pulls = pulls
        self._quantizer = quantizer
        self._quantizing = Quantizing(catalog, quantizer)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """List models, most recently modified first."""
        page = await self._catalog.list(request.prefix, page_size=request.page_size, page_token=request.page_token)
        own = await self._catalog.own_bytes()
        models = [model_message(listed, own.get(listed.tag.name, 0)) for listed in page.models]
        return pb.ListModelsResponse(models=models, next_page_token=page.next_token)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Return everything known about one model."""
        facts = await self._catalog.info(request.name, request.version)
        own = await self._catalog.own_bytes()
        return pb.GetModelResponse(info=info_message(facts, own.get(facts.name, 0)))

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> pb.ListVersionsResponse:
        """List what a name has pointed to since it was made."""
        name, versions = await self._catalog.versions.of(request.name)
        return pb.ListVersionsResponse(name=name, versions=[version_message(version) for version in versions])

    async def RollbackModel(self, request: pb.RollbackModelRequest, context: Context) -> pb.RollbackModelResponse:
        """Point a name at one of its earlier versions again."""
        rollback = await self._catalog.versions.rollback(request.name, request.version)
        model = model_message(await self._catalog.describe(rollback.tag))
        return pb.RollbackModelResponse(model=model, version=rollback.version)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:
        """Remove a name."""
        try:
            removal = await self._catalog.delete(request.name)
        except ModelNotFound:
            if request.allow_missing:
                return pb.DeleteModelResponse()
            raise
        return pb.DeleteModelResponse(freed_bytes=removal.freed_bytes, pending_bytes=removal.pending_bytes)

    async def CopyModel(self, request: pb.CopyModelRequest, context: Context) -> pb.CopyModelResponse:
        """Point a second name at a model."""
        copied = await self._catalog.copy(request.source, request.destination, request.version)
        return pb.CopyModelResponse(model=model_message(copied))

    async def CheckModelfile(self, request: pb.CheckModelfileRequest, context: Context) -> pb.CheckModelfileResponse:
        """Parse a Modelfile without creating anything."""
        try:
            return check_message(await self._catalog.parse(request.modelfile))
        except ModelfileSyntax as error:
            if not request.tell_mistakes:
                raise
            return pb.CheckModelfileResponse(mistakes=[problem_message(problem) for problem in error.problems])

    async def CreateModel(
        self, request: pb.CreateModelRequest, context: Context
    ) -> AsyncIterator[pb.CreateModelResponse]:
        """Create a model from a Modelfile; ends after exactly one `model`."""
        steps = create(
            self._catalog,
            self._pulls,
            name=request.name,
            modelfile=request.modelfile,
            files={value: Digest.parse(digest) for value, digest in request.files.items()},
            quantization=Quantization(self._quantizer, request.quantize, request.requantize),
            token=request.token or None,
            edited=Digest.parse(request.edited_digest) if request.edited_digest else None,
        )
        async with aclosing(steps):
            async for step in steps:
                if isinstance(step, str):
                    yield pb.CreateModelResponse(status=step)
                elif isinstance(step, PullEvent):
                    yield pb.CreateModelResponse(progress=progress_message(step))
                elif isinstance(step, WorkProgress):
                    yield pb.CreateModelResponse(progress=work_message(step))
                else:
                    yield pb.CreateModelResponse(model=model_message(await self._catalog.describe(step)))

    async def QuantizeModel(
        self, request: pb.QuantizeModelRequest, context: Context
    ) -> AsyncIterator[pb.QuantizeModelResponse]:
        """Quantize a model under a new name; ends after exactly one `model`."""
        wanted = QuantizeRequest(
            name=request.name,
            quantize=request.quantize,
            new_name=request.new_name,
            requantize=request.requantize,
            imatrix=Digest.parse(request.imatrix) if request.imatrix else None,
            compare=request.compare,
            text=request.text,
        )
        async with aclosing(self._quantizing.quantize(wanted)) as steps:
            async for step in steps:
                if isinstance(step, str):
                    yield pb.QuantizeModelResponse(status=step)
                elif isinstance(step, WorkProgress):
                    yield pb.QuantizeModelResponse(progress=work_message(step))
                elif isinstance(step, Compared):
                    yield pb.QuantizeModelResponse(measurement=measurement_message(step))
                else:
                    yield pb.QuantizeModelResponse(model=model_message(await self._catalog.describe(step)))

    async def PullModel(self, request: pb.PullModelRequest, context: Context) -> AsyncIterator[pb.PullModelResponse]:
        """Start a pull or join it: `started`, then progress, then `model`."""
        ref = pull_ref(request.ref, caller_of(context))
        token = request.token or None
        async with self._pulls.attach(ref, text=request.ref, token=token, detach=request.detach) as watcher:
            started = pb.PullStarted(pull_id=watcher.pull_id, name=watcher.name, joined=watcher.joined)
            yield pb.PullModelResponse(started=started)
            async for event in watcher:
                yield pb.PullModelResponse(progress=progress_message(event))
            listed = await self._catalog.describe(watcher.result())
        yield pb.PullModelResponse(model=model_message(listed))

    async def ListPulls(self, request: pb.ListPullsRequest, context: Context) -> pb.ListPullsResponse:
        """List the pulls under way and those that ended within the last hour."""
        return pb.ListPullsResponse(pulls=[pull_message(status) for status in self._pulls.statuses()])

    async def CancelPull(self, request: pb.CancelPullRequest, context: Context) -> pb.CancelPullResponse:
        """Stop a pull for all its watchers."""
        await self._pulls.cancel(request.pull_id)
        return pb.CancelPullResponse()

    async def ImportFile(self, request: pb.ImportFileRequest, context: Context) -> AsyncIterator[pb.ImportFileResponse]:
        """Store a file that the daemon opens itself; ends after exactly one `blob`."""
        events = self._catalog.uploads.import_file(Path(request.path), caller_of(context))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, StoredBlob):
                    yield pb.ImportFileResponse(blob=_blob(event))
                else:
                    yield pb.ImportFileResponse(progress=progress_message(event))

    async def UploadBlob(
        self, request_iterator: AsyncIterator[pb.UploadBlobRequest], context: Context
    ) -> pb.UploadBlobResponse:
        """Store the bytes the client sends."""
        chunks = (Chunk(message.size_bytes, message.data) async for message in request_iterator)
        return pb.UploadBlobResponse(blob=_blob(await self._catalog.uploads.receive(chunks)))


def _blob(stored: StoredBlob) -> pb.Blob:
    return pb.Blob(digest=str(stored.digest), size_bytes=stored.size_bytes)
