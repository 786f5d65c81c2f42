"""What a loaded model offers for embedding: how it pools, what it reads, and the context for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmd.runner.adapters import Adapters
from lmd.runner.embed_texts import Texts
from lmd.runner.embedding_context import ContextShape, EmbeddingContext, Pooling, header_pooling
from lmd.runner.threads import usable_cores
from lmd.runner.vocab import Vocab

# The second context of a model that generates starts with texts of this length and doubles as longer ones come: it
# takes memory beside the first one, and few texts are long.
_FIRST_TEXT_TOKENS = 512
# Weights that fit in a core's cache gain nothing from a second one.
_TINY_WEIGHTS_BYTES = 16 << 20


class EmbeddingModel:
    """The embedding side of a model; costs nothing until a context is asked for.

    Attributes:
        only: whether the header says that the model was made for embedding or ranking, so that it does not generate.
        pooling: how it embeds, or that it ranks.
        length: numbers of a vector.
        num_ctx: tokens one text can have.
        texts: makes tokens of texts.
        threads: for a batch; the owner sets it when it knows better.
        plain: whether attention may be computed plainly; the owner forbids it on accelerators.
    """

    def __init__(
        self, llama: Any, native: Any, vocab: Vocab, *, num_ctx: int, adapters: Adapters, kv_type: str = ""
    ) -> None:
        self._llama = llama
        self._native = native
        self._adapters = adapters
        self._vocab_size = vocab.size
        self._kv_type = kv_type
        self._context: EmbeddingContext | None = None
        pooling = header_pooling(llama, native)
        self.only = pooling is not None or not llama.llama_model_has_decoder(native)
        # A model that pools nothing, or does not say how, is pooled by the mean: it is what most are trained with, and
        # of a model that was never trained to embed it keeps more than the last token does.
        self.pooling = pooling or Pooling.MEAN
        self.length = int(llama.llama_model_n_embd_out(native))
        self.num_ctx = num_ctx
        template = llama.llama_model_chat_template(native, b"rerank")
        self.texts = Texts(vocab, num_ctx, template.decode(errors="replace") if template else "")
        # Batches of whole texts keep all cores busy, so there is little to measure.
        tiny = int(llama.llama_model_size(native)) < _TINY_WEIGHTS_BYTES
        self.threads = 1 if tiny else usable_cores()
        self.plain = True

    def context(self, text_tokens: int, *, on_remake: Callable[[], None] | None = None) -> EmbeddingContext:
        """Return a context for texts of that many tokens; one that was returned before is closed.

        *on_remake* is called when the engine freed what it had reported so far, to make something larger.

        Raises:
            ContextError: there is no memory for it.
        """
        context = self._context
        if context is None or context.text_tokens < text_tokens:
            if context is not None:
                self._context = None
                context.close()
            size = max(_FIRST_TEXT_TOKENS, 1 << (text_tokens - 1).bit_length())
            shape = ContextShape(min(size, self.num_ctx), self.threads, self.plain, self._kv_type)
            self._context = context = EmbeddingContext(
                self._llama, self._native, shape, self.pooling, vocab_size=self._vocab_size, on_remake=on_remake
            )
            self._adapters.apply(context.context, None)
        return context
