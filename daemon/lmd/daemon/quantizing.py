"""Quantizes models of the store under new names, and compares them with what they were made of."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from lmd.daemon.catalog import Catalog, ResolvedModel
from lmd.daemon.names import new_name
from lmd.daemon.quantizer import Measured, Quantized, Quantizer, Wanted, WorkProgress, quant_label
from lmd.daemon.sample_text import SAMPLE_TEXT
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest, size_text
from lmd.registry.quantization import QuantType, parse_quant_type
from lmd.registry.ref import DEFAULT_TAG, NameRef, parse_ref
from lmd.registry.store import TagRecord

log = structlog.get_logger(__name__)

MAX_TEXT_BYTES = 1 << 20

_NOT_OF_NAMES = re.compile(r"[^a-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What to quantize to what, under which name ("": one made of both), and whether to compare.

    *text* is what both read for the comparison; "" for a passage that is built in.
    """

    name: str
    quantize: str
    new_name: str = ""
    requantize: bool = False
    imatrix: Digest | None = None
    compare: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """One side of a comparison: the model, its quantization, the bytes of its weights, and how it reads."""

    name: str
    quantization: str
    size_bytes: int
    measured: Measured


Step = str | WorkProgress | Compared | TagRecord


class Quantizing:
    """Makes quantized models of models."""

    def __init__(self, catalog: Catalog, quantizer: Quantizer) -> None:
        self._catalog = catalog
        self._quantizer = quantizer

    async def quantize(self, request: QuantizeRequest) -> AsyncGenerator[Step]:
        """Make the model; yields steps, with a comparison its two sides, and at the end the tag.

        The model it is made of stays as it is, unless it is to have the same name.

        Raises: InvalidRef, InvalidRequest, ModelNotFound, and as `Quantizer.quantize`.
        """
        kind = parse_quant_type(request.quantize)
        if len(request.text.encode()) > MAX_TEXT_BYTES:
            raise InvalidRequest(
                f"the text is longer than {size_text(MAX_TEXT_BYTES)}", field="text", hint="give a part of it"
            )
        source = await self._catalog.resolve(request.name)
        target = new_name(request.new_name or default_name(source.name, kind), "new_name")
        wanted = Wanted(
            name=source.name,
            files=source.manifest.file_layers,
            lm=source.manifest.lm,
            quantize=kind.name,
            requantize=request.requantize,
            imatrix=request.imatrix,
        )
        text = request.text or SAMPLE_TEXT
        if request.compare:
            # First: a source whose name the result takes may be gone afterwards.
            await self._quantizer.check(wanted)
            async with aclosing(self._measure(source, text)) as measuring:
                async for told in measuring:
                    yield told
        async with aclosing(self._quantizer.quantize(wanted)) as steps:
            async for step in steps:
                if not isinstance(step, Quantized):
                    yield step
                    continue
                tag = await self._catalog.publish(target, step.files, step.lm, note=f"quantize {kind.name}")
        log.info("model_quantized", name=tag.name, source=source.name, digest=str(tag.manifest))
        if request.compare:
            async with aclosing(self._measure(await self._catalog.resolve(tag.name), text)) as measuring:
                async for told in measuring:
                    yield told
        yield tag

    async def _measure(self, model: ResolvedModel, text: str) -> AsyncGenerator[Step]:
        label = model.header.quantization
        async with aclosing(self._quantizer.measure(model.name, model.weights, label, text)) as steps:
            async for step in steps:
                if isinstance(step, Measured):
                    size_bytes = sum(layer.size_bytes for layer in model.manifest.weights)
                    yield Compared(model.name, label, size_bytes, step)
                else:
                    yield step


def default_name(source: str, kind: QuantType) -> str:
    """Return a name for *source* quantized: its own with the type as tag, on this machine even if it is of the Hub."""
    ref = parse_ref(source)
    if isinstance(ref, NameRef):
        base, tag = ref.model, ref.tag
    else:
        last = source.rsplit("/", 1)[-1].lower()
        base, _, tag = last.partition(":")
        base = _NOT_OF_NAMES.sub("-", base).removesuffix("-gguf").strip("-.") or "model"
        tag = _NOT_OF_NAMES.sub("-", tag).removesuffix(".gguf").strip("-.")
    suffix = kind.name.lower()
    plain = tag in ("", DEFAULT_TAG) or quant_label(tag)
    return f"{base}:{suffix if plain else f'{tag}-{suffix}'}"
