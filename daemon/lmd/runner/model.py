"""Loads a model and makes the one context that all its sequences share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmd.runner.adapters import AdapterRefused, Adapters
from lmd.runner.allocated import by_device, count_copies_once, mapped_bytes, on_host
from lmd.runner.batch import Batch
from lmd.runner.embedding_context import ContextError
from lmd.runner.embedding_model import EmbeddingModel
from lmd.runner.gpus import DeviceGone, Placement, engine_devices, place
from lmd.runner.kv_types import DEFAULT, can_move, is_quantized, set_kv_type
from lmd.runner.log import EngineLog
from lmd.runner.memory import Memory
from lmd.runner.shape import Shape
from lmd.runner.threads import Threads, measure_threads, usable_cores
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab
from lmd.runner.weights import load_weights

# Sequences of prefix cache beside those of the slots. Each costs a row of scores, half a megabyte with a large
# vocabulary, since llama.cpp keeps room for one a sequence; it can have 256 in all (LLAMA_MAX_SEQ).
_CACHED_SEQUENCES = 28

_MESSAGE_CHARACTERS = 600


class LoadError(Exception):
    """Raised when the model cannot be loaded; *kind* is a `LoadFailed.Kind`."""

    def __init__(self, kind: frames_pb2.LoadFailed.Kind.ValueType, message: str) -> None:
        super().__init__(message[:_MESSAGE_CHARACTERS])
        self.kind = kind


class Model:
    """A loaded model with its context. Everything native lives until the process ends.

    Attributes:
        generates: whether it continues text; otherwise it only embeds or ranks, and `context` is what does that.
        embedding: what it offers for embedding.
        adapters: what can be added to its weights.
        num_ctx: tokens one sequence can use; no more than the model was trained for.
        slots: sequences that are decoded at once.
        kv_type: the type of keys and values.
        sequences: sequences that the memory can hold; the others are prefix cache.
        rows: rows of scores that one step can yield.
        step_tokens: tokens a step can decode.
        on_cpu: whether all of it is there.
        placement: the accelerators that layers may be on.
        parked_bytes: what idle prefixes may take in RAM beside the context: no more than the context itself.
    """

    def __init__(self, llama: Any, log: EngineLog, load: frames_pb2.Load, on_progress: Callable[[float], bool]) -> None:
        """Load it, calling *on_progress* with a fraction now and then; loading stops when that returns false.

        Raises:
            LoadError: the engine refuses the file, or memory is short.
            LoadAborted: *on_progress* returned false.
        """
        self.llama = llama
        self._log = log
        self.slots = load.slots
        self.placement = self._place(load)
        self.kv_type = load.kv_type or DEFAULT
        self.native = self._native = self._load_weights(load, on_progress)
        self._check_kind()
        self._shape = Shape(llama, self._native)
        # Before any context: each reserves room in its graphs for what there is.
        self.adapters = self._load_adapters(load)
        self.vocab = Vocab(llama, self._native)
        self.train_ctx = int(llama.llama_model_n_ctx_train(self._native))
        self.num_ctx = min(load.num_ctx, self.train_ctx) if self.train_ctx > 0 else load.num_ctx
        self.step_tokens = max(load.num_batch, load.slots)
        self.sequences = self.slots + (_CACHED_SEQUENCES if self._shape.sequences_are_free else 0)
        self.rows = self.sequences
        self.embedding = EmbeddingModel(
            llama, self._native, self.vocab, num_ctx=self.num_ctx, adapters=self.adapters, kv_type=self.kv_type
        )
        self.embedding.plain = log.gpu_layers == 0
        before = len(log.buffers)
        context = None if self.embedding.only else self._make_context()
        self.generates = context is not None
        self.context = context or self._make_embedding_context(load.num_thread)
        self.memory = Memory(
            llama, self.context, self._native, may_shift=can_move(self.kv_type, self._shape.key_length)
        )
        self.on_cpu = log.gpu_layers == 0
        self.parked_bytes = min(load.kv_ram_bytes, self._kv_bytes()) if self.memory.shares_freely else 0
        self.batch = Batch(llama, self.step_tokens, self.sequences)
        if self.generates:
            self.threads = self._choose_threads(load.num_thread, load.num_thread_batch or load.num_thread)
            log.drop_replaced(before)
            llama.llama_set_n_threads(self.context, self.threads.decode, self.threads.prefill)
            self.embedding.threads = self.threads.prefill
        else:
            self.threads = Threads(self.embedding.threads, self.embedding.threads)
        header_template = self._header_template(None)
        self.template: str = load.template or header_template
        # A template that replaces the header's is for all chats.
        self.tool_template: str = self._header_template(b"tool_use") if self.template == header_template else ""

    @property
    def weights_bytes(self) -> int:
        """Bytes of its weights."""
        return int(self.llama.llama_model_size(self._native))

    def ready(self) -> frames_pb2.Ready:
        """Describe what was loaded, with the bytes that the engine allocated."""
        buffers = self._log.buffers
        weights_bytes = sum(size for _, kind, size in buffers if kind == "model")
        return frames_pb2.Ready(
            # A file without a memory mapping of its own kind reports no buffer.
            weights_bytes=weights_bytes or self.weights_bytes,
            kv_bytes=self._kv_bytes(),
            compute_bytes=sum(size for _, kind, size in buffers if kind in ("compute", "output")),
            vram_bytes=sum(size for name, _, size in buffers if not on_host(name)),
            device_bytes=by_device(buffers),
            mapped_bytes=mapped_bytes(buffers),
            num_ctx=self.num_ctx,
            train_ctx=self.train_ctx,
            slots=self.slots,
            num_thread=self.threads.decode,
            has_template=bool(self.template),
            gpu_layers=self._log.gpu_layers,
            generates=self.generates,
            pooling=self.embedding.pooling.text,
            embedding_length=self.embedding.length,
            shifts=self.memory.can_shift,
            num_thread_batch=self.threads.prefill,
            threads_lasting=self.threads.lasting,
            parked_bytes=self.parked_bytes,
        )

    def _kv_bytes(self) -> int:
        return sum(size for _, kind, size in self._log.buffers if kind in ("KV", "RS"))

    def _header_template(self, name: bytes | None) -> str:
        template = self.llama.llama_model_chat_template(self._native, name)
        return template.decode(errors="replace") if template else ""

    def _place(self, load: frames_pb2.Load) -> Placement:
        """Find the devices to load on; asking them costs time, so main memory alone asks none."""
        try:
            return place(load, engine_devices() if load.devices else ())
        except DeviceGone as gone:
            raise LoadError(frames_pb2.LoadFailed.KIND_DEVICE_GONE, str(gone)) from None

    def _load_weights(self, load: frames_pb2.Load, on_progress: Callable[[float], bool]) -> Any:
        native = load_weights(
            self.llama,
            load.model_paths,
            num_gpu=load.num_gpu,
            placement=self.placement,
            use_mmap=load.use_mmap,
            on_progress=on_progress,
        )
        if not native:
            raise self._error("the engine gives no reason")
        count_copies_once(self._log.buffers, 0, int(self.llama.llama_model_size(native)))
        return native

    def _load_adapters(self, load: frames_pb2.Load) -> Adapters:
        try:
            return Adapters(self.llama, self._native, load.adapters)
        except AdapterRefused as refused:
            error = self._error("the engine gives no reason")
            raise LoadError(error.kind, f"{refused}: {error}") from None

    def _check_kind(self) -> None:
        """Refuse what loads but can neither continue a text nor embed one."""
        llama, native = self.llama, self._native
        vocab = llama.llama_model_get_vocab(native)
        if llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            problem = "the file has no tokenizer"
        elif llama.llama_model_has_encoder(native) and llama.llama_model_has_decoder(native):
            problem = "encoder-decoder models are not supported"
        elif llama.llama_model_is_diffusion(native):
            problem = "diffusion models are not supported"
        else:
            return
        raise LoadError(frames_pb2.LoadFailed.KIND_INCOMPATIBLE, problem)

    def _make_embedding_context(self, num_thread: int) -> Any:
        """Make the context of a model that only embeds, for the longest text there may be.

        So that what it takes is reported, and what it lacks fails the load and not a request.
        """
        if num_thread > 0:
            self.embedding.threads = num_thread
        buffers = self._log.buffers
        reported = len(buffers)

        def forget() -> None:
            del buffers[reported:]

        try:
            context = self.embedding.context(self.num_ctx, on_remake=forget)
        except ContextError as error:
            raise self._error(str(error)) from None
        # The engine makes room for the rows of a step when there is one with so many.
        buffers[reported:] = [
            (name, kind, max(size, context.rows_bytes) if kind == "output" else size)
            for name, kind, size in buffers[reported:]
        ]
        return context.context

    def _make_context(self) -> Any:
        """Return the context that generates, None for an architecture that cannot."""
        llama = self.llama
        reported = len(self._log.buffers)
        params = llama.llama_context_default_params()
        params.n_ctx = self.num_ctx * self.slots
        params.n_batch = params.n_ubatch = self.step_tokens
        params.n_seq_max = self.sequences
        # The least that llama.cpp takes, and more than a step reads; the default reserves one a token.
        params.n_outputs_max = self.rows
        params.kv_unified = True
        params.swa_full = False
        params.no_perf = True
        set_kv_type(params, self.kv_type)
        may_be_plain = self._log.gpu_layers == 0 and not is_quantized(self.kv_type)
        if may_be_plain and self._shape.is_worth_plain(self.step_tokens, self.num_ctx * self.slots):
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.flash_attention = int(params.flash_attn_type)
        context = llama.llama_init_from_model(self._native, params)
        if not context:
            raise self._error("the engine makes no context")
        if not llama.llama_get_memory(context):
            llama.llama_free(context)
            del self._log.buffers[reported:]
            return None
        self.adapters.apply(context, None)
        return context

    def _choose_threads(self, decode: int, prefill: int) -> Threads:
        if decode > 0:
            return Threads(decode, prefill)
        return measure_threads(
            self.llama,
            self.context,
            self.memory,
            self.batch,
            cores=usable_cores(),
            weights_bytes=int(self.llama.llama_model_size(self._native)),
            token=max(self.vocab.bos, 0),
        )

    def _error(self, otherwise: str) -> LoadError:
        kind = (
            frames_pb2.LoadFailed.KIND_OUT_OF_MEMORY
            if self._log.out_of_memory
            else frames_pb2.LoadFailed.KIND_INCOMPATIBLE
        )
        return LoadError(kind, self._log.errors() or otherwise)
