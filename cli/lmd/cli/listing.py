"""Reading the whole list of models, page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmd.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from lmd.cli.client import Client
    from lmd.v1 import model_pb2


def all_models(client: Client, prefix: str = "") -> list[model_pb2.Model]:
    """Return the models whose name starts with *prefix*, most recently changed first. Raises: ClientError."""
    models: list[model_pb2.Model] = []
    request = pb.ListModelsRequest(prefix=prefix)
    while True:
        reply = client.call(client.models.ListModels, request)
        models.extend(reply.models)
        if not reply.next_page_token:
            return models
        request.page_token = reply.next_page_token
