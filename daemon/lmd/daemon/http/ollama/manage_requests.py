"""The bodies of Ollama's requests that manage models.

Kinds are checked as Ollama checks them: a number is no text, and null is as good as nothing. Unknown fields are
ignored.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ManageBody(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class ModelBody(ManageBody):
    """A request about one model; `name` is what `model` was called before."""

    model: str | None = None
    name: str | None = None

    @property
    def wanted(self) -> str:
        """Return the name of the model, "" when there is none."""
        return self.model or self.name or ""


class ProgressBody(ModelBody):
    """A request that tells how far it is, unless `stream` is false."""

    stream: bool | None = None

    @property
    def streams(self) -> bool:
        """Return whether progress is told."""
        return self.stream is not False


class ShowBody(ModelBody):
    """Body of `POST /api/show`."""

    system: str | None = None
    template: str | None = None
    verbose: bool | None = None
    options: dict[str, object] | None = None


class PullBody(ProgressBody):
    """Body of `POST /api/pull`."""

    insecure: bool | None = None


class PushBody(ProgressBody):
    """Body of `POST /api/push`."""

    insecure: bool | None = None


class MessageBody(ManageBody):
    """A message that starts every chat with the model."""

    role: str
    content: str | None = None
    images: list[object] | None = None


class CreateBody(ProgressBody):
    """Body of `POST /api/create`; names of files are keys of `files`, `draft_files`, `adapters`."""

    from_: str | None = Field(default=None, alias="from")
    files: dict[str, str] | None = None
    draft_files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, object] | None = None
    messages: list[MessageBody] | None = None
    quantize: str | None = None
    draft_quantize: str | None = None
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    info: dict[str, object] | None = None
    remote_host: str | None = None


class CopyBody(ManageBody):
    """Body of `POST /api/copy`."""

    source: str | None = None
    destination: str | None = None


class DeleteBody(ModelBody):
    """Body of `DELETE /api/delete`."""


REQUESTS: dict[str, type[BaseModel]] = {
    "/api/show": ShowBody,
    "/api/pull": PullBody,
    "/api/push": PushBody,
    "/api/create": CreateBody,
    "/api/copy": CopyBody,
    "/api/delete": DeleteBody,
}
