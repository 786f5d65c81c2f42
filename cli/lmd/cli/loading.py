"""Getting a model ready to answer: into the store, and into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmd.cli.errors import ClientError
from lmd.cli.spinner import Spinner, load_text
from lmd.cli.terminal import quiet_keyboard
from lmd.cli.ticking import with_ticks
from lmd.v1 import model_pb2
from lmd.v1 import model_service_pb2 as model_service_pb
from lmd.v1 import runtime_service_pb2 as runtime_pb

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from lmd.cli.client import Client


def ensure_model(client: Client, ref: str) -> model_pb2.ModelInfo:
    """Return the model, pulling it when it is not in the store.

    Raises:
        ClientError: there is no such model, or the pull fails.
    """
    try:
        return _info(client, ref)
    except ClientError as error:
        if error.reason != "MODEL_NOT_FOUND":
            raise
    from lmd.cli.pulling import pull

    return _info(client, pull(client, ref).name)


def require_generating(info: model_pb2.ModelInfo) -> None:
    """Refuse a model that only turns texts into vectors, before it is loaded for nothing.

    Raises:
        ClientError: CAPABILITY_MISSING.
    """
    if "completion" not in info.model.capabilities:
        name = info.model.name
        able = "rerank" if "rerank" in info.model.capabilities else "embed"
        raise ClientError(
            f"model `{name}` does not generate text", reason="CAPABILITY_MISSING", hint=f"`lm {able} {name}` uses it"
        )


def _info(client: Client, name: str) -> model_pb2.ModelInfo:
    return client.call(client.models.GetModel, model_service_pb.GetModelRequest(name=name)).info


def load(client: Client, name: str, parameters: model_pb2.Parameters, keep_alive: Duration | None) -> runtime_pb.Runner:
    """Make a model resident and return its runner, with a spinner meanwhile.

    Raises:
        ClientError: it cannot be loaded.
    """
    request = runtime_pb.LoadModelRequest(name=name, parameters=parameters, keep_alive=keep_alive)
    spinner = Spinner()
    spinner.say(f"loading {name}")
    try:
        with quiet_keyboard(), client.stream(client.runtime.LoadModel, request) as events:
            for event in with_ticks(events):
                if event is None:
                    spinner.refresh()
                elif event.HasField("progress"):
                    spinner.say(load_text(name, event.progress))
                elif event.HasField("runner"):
                    return event.runner
    finally:
        spinner.clear()
    raise ClientError("the daemon ended the load without a result", reason="INTERNAL")
