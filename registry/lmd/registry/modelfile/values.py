"""What a Modelfile says, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmd.registry.digest import Digest
from lmd.registry.errors import ModelfileProblem
from lmd.registry.lm_config import Message
from lmd.registry.parameters import ParameterValue

DIRECTIVES = (
    "FROM",
    "PARAMETER",
    "TEMPLATE",
    "SYSTEM",
    "LICENSE",
    "MESSAGE",
    "DRAFT",
    "ADAPTER",
    "PROJECTOR",
    "QUANTIZE",
    "REQUIRES",
)
MESSAGE_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class From:
    """The argument of a FROM, DRAFT, ADAPTER or PROJECTOR as written, and where it stands."""

    value: str
    line: int = field(default=0, compare=False)
    column: int = field(default=0, compare=False)

    @property
    def digest(self) -> Digest | None:
        """The digest, when the argument is one (``sha256:…``): bytes of the store rather than a name or file."""
        return Digest.parse(self.value) if self.value.startswith("sha256:") else None


@dataclass(frozen=True, slots=True)
class Adapter:
    """One ADAPTER: the file or digest of a LoRA, and how strongly it applies (1 as it was trained)."""

    source: From
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A parsed Modelfile.

    *template* and *system* are None when there is no such directive, and "" when there is an empty one, which removes
    what the base has; so are *drafts*, *adapters* and *projectors*, with () for an empty one. There is one projector at
    most. *quantize* is the name of a quantization as the engine spells it, *requires* a version of Ollama. *warnings*
    are lines that have no effect here, such as settings of other engines.
    """

    from_: tuple[From, ...]
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    template: str | None = None
    system: str | None = None
    licenses: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    drafts: tuple[From, ...] | None = None
    adapters: tuple[Adapter, ...] | None = None
    projectors: tuple[From, ...] | None = None
    quantize: str | None = None
    requires: str | None = None
    warnings: tuple[ModelfileProblem, ...] = field(default=(), compare=False)

    @property
    def sources(self) -> tuple[From, ...]:
        """All that names a model, a file or bytes: the arguments of FROM, DRAFT, ADAPTER and PROJECTOR."""
        return self.from_ + (self.drafts or ()) + self.file_sources

    @property
    def file_sources(self) -> tuple[From, ...]:
        """The arguments of ADAPTER and PROJECTOR: files or digests, never names of models."""
        return tuple(adapter.source for adapter in self.adapters or ()) + (self.projectors or ())
