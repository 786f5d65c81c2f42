"""Answers what needs the tokenizer and no engine: tokenize, detokenize, and the tokens of a rendered template."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from lmd.runner.background import INLINE_BYTES, Background, Frames
from lmd.runner.failures import failure
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab
from lmd.runner.wire import MAX_FRAME_BYTES

_INVALID = frames_pb2.Failed.KIND_INVALID
_NO_LIMIT = (1 << 31) - 1


class SideRequests:
    """Answers one request with one frame, at once, or, when its text is long, from the background.

    Not thread-safe. A request that is taken back is answered all the same; the engine drops the frame.
    """

    def __init__(self, vocab: Vocab, background: Background) -> None:
        self._vocab = vocab
        self._background = background

    def handle(self, message: frames_pb2.DaemonFrame) -> Frames:
        """Take a `tokenize` or `detokenize`; return its answer if there is one already."""
        kind = message.WhichOneof("frame")
        if kind == "tokenize":
            return self._tokenize(message.tokenize)
        if kind == "detokenize":
            return self._detokenize(message.detokenize)
        raise ValueError(f"a frame of kind {kind} is no side request")

    def rendered(self, request_id: int, prompt: bytes) -> Frames:
        """Take the prompt that the template made for a `render`; return the answer if there is one already."""

        def answer() -> Frames:
            tokens = self._vocab.tokenize_rendered(prompt, _NO_LIMIT)
            rendered = frames_pb2.Rendered(
                request_id=request_id,
                prompt=prompt.decode(errors="replace"),
                tokens=tokens,
                pieces=self._vocab.pieces(tokens),
            )
            return [_bounded(frames_pb2.RunnerFrame(rendered=rendered), request_id, "messages")]

        return self._here_or_there(answer, len(prompt))

    def _tokenize(self, message: frames_pb2.Tokenize) -> Frames:
        text = message.text.encode()

        def answer() -> Frames:
            tokens = self._vocab.tokenize(text, add_special=message.add_special, parse_special=not message.plain)
            tokenized = frames_pb2.Tokenized(
                request_id=message.request_id, tokens=tokens, pieces=self._vocab.pieces(tokens)
            )
            return [_bounded(frames_pb2.RunnerFrame(tokenized=tokenized), message.request_id, "text")]

        return self._here_or_there(answer, len(text))

    def _detokenize(self, message: frames_pb2.Detokenize) -> Frames:
        tokens, size = array("i", message.tokens), self._vocab.size
        if tokens and not 0 <= min(tokens) <= max(tokens) < size:
            place = next(place for place, token in enumerate(tokens) if not 0 <= token < size)
            problem = f"token {place + 1} is {tokens[place]}; the model's tokens go from 0 to {size - 1}"
            return [failure(message.request_id, _INVALID, problem, field=f"tokens[{place}]")]

        def answer() -> Frames:
            text = self._vocab.detokenize(tokens).decode(errors="replace")
            detokenized = frames_pb2.Detokenized(request_id=message.request_id, text=text)
            return [_bounded(frames_pb2.RunnerFrame(detokenized=detokenized), message.request_id, "tokens")]

        return self._here_or_there(answer, len(tokens) * tokens.itemsize)

    def _here_or_there(self, answer: Callable[[], Frames], size_bytes: int) -> Frames:
        if size_bytes <= INLINE_BYTES:
            return answer()
        self._background.run(answer, lambda frames: frames)
        return []


def _bounded(frame: frames_pb2.RunnerFrame, request_id: int, field: str) -> frames_pb2.RunnerFrame:
    """Return the frame, or the failure that stands for one so large that it would end the connection."""
    if frame.ByteSize() <= MAX_FRAME_BYTES:
        return frame
    return failure(request_id, _INVALID, "the answer is larger than 64 MiB", field=field)
