"""The frame that ends a request that is not served."""

from __future__ import annotations

from lmd.runner.v1 import frames_pb2

Failed = frames_pb2.Failed


def failure(
    request_id: int, kind: frames_pb2.Failed.Kind.ValueType, message: str, *, field: str = ""
) -> frames_pb2.RunnerFrame:
    """Return the frame; *message* is one sentence, *field* what is wrong or missing."""
    return frames_pb2.RunnerFrame(failed=Failed(request_id=request_id, kind=kind, message=message, field=field))


def too_long(request_id: int, *, tokens: int, context: int, what: str = "the text") -> frames_pb2.RunnerFrame:
    """Return the frame for a text of more tokens than the context holds."""
    return frames_pb2.RunnerFrame(
        failed=Failed(
            request_id=request_id,
            kind=Failed.KIND_CONTEXT_LENGTH,
            message=f"{what} has {tokens} tokens, the context holds {context}",
            prompt_tokens=tokens,
            context_tokens=context,
        )
    )
