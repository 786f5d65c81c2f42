"""What is reported of a token when a request asks for log probabilities."""

from __future__ import annotations

from lmd.runner.logprobs import logprobs_of
from lmd.runner.v1 import frames_pb2
from lmd.runner.vocab import Vocab


def token_report(vocab: Vocab, scores_address: int, token: int, top: int) -> frames_pb2.TokenLogprob:
    """Return how likely *token* was by the raw scores at an address, and the *top* most likely at its place."""
    logprob, best = logprobs_of(scores_address, vocab.size, token, top)
    return frames_pb2.TokenLogprob(
        id=token,
        token=vocab.piece(token) or b"",
        logprob=logprob,
        top=[
            frames_pb2.TokenLogprob(id=other, token=vocab.piece(other) or b"", logprob=value) for other, value in best
        ],
    )
