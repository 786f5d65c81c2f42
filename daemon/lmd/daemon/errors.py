"""Errors of the running daemon, beside those of the registry.

LmdError
├── PermissionDenied          the caller may not do this
├── UploadRequired            the daemon may not open this caller's files
├── Draining                  the daemon is shutting down
├── QueueFull                 too many requests wait already
├── DeadlineExceeded          the request's own time is up
├── ClientStalled             the client does not take its answer
├── NotPinned                 the model that shall not be pinned any more is not
├── DeviceMemoryShort         the model does not fit in memory now
├── LeaseMemoryShort          a device cannot have that much free for a program
├── DeviceUnavailable         no accelerator can be used, and main memory is not allowed
│   └── DeviceGone              the engine does not find a device that it was told to use
├── ModelIncompatible         the engine refuses the model
├── RunnerError               a runner ...
│   ├── RunnerCrashed           ... died
│   ├── RunnerStartTimeout      ... did not become ready in time
│   │   └── AnswersTooLong      ... had to finish answers first, for too long
│   ├── RunnerHung              ... stopped answering
│   ├── EngineFailed            ... failed on one request, and goes on
│   └── QuantizeFailed          ... cannot quantize or measure a model
├── Unloaded                  the model was unloaded by force while it answered
│   └── HandedBack              ... and the request shall wait for it anew
├── ContextLengthExceeded     the prompt is longer than the context
└── TemplateFailed            the chat template fails or runs over its limits
"""

from __future__ import annotations

from collections.abc import Sequence

from lmd.registry.errors import LmdError, size_text


class PermissionDenied(LmdError):
    """Raised when the caller may not do this."""

    reason = "PERMISSION_DENIED"

    def __init__(self, message: str, *, action: str) -> None:
        super().__init__(message, metadata={"action": action})


class UploadRequired(LmdError):
    """Raised when the daemon may not open a caller's files: it would read with its own rights, not theirs."""

    reason = "UPLOAD_REQUIRED"

    def __init__(self) -> None:
        super().__init__(
            "the daemon does not open files of other users; upload the bytes instead",
            hint="`lm create` uploads the file that FROM names",
        )


class Draining(LmdError):
    """Raised for new work while the daemon shuts down."""

    reason = "DRAINING"

    def __init__(self) -> None:
        super().__init__("the daemon is shutting down", hint="try again in a moment")


class QueueFull(LmdError):
    """Raised when too many requests wait already: of all callers, or of this one when *own*."""

    reason = "QUEUE_FULL"

    def __init__(self, *, limit: int, retry_after_s: float, own: bool = False) -> None:
        whose = "of your requests" if own else "requests"
        super().__init__(
            f"too many {whose} wait already (limit {limit})",
            hint="try again later",
            metadata={"limit": str(limit)},
        )
        self.retry_after_s = retry_after_s
        self.own = own


class DeadlineExceeded(LmdError):
    """Raised when a request's own time is up, wherever it is then."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(
            f"the request was not done within {timeout_s:g} s",
            hint="give it more time, or ask for a shorter answer",
            metadata={"timeout_s": f"{timeout_s:g}"},
        )


class ClientStalled(LmdError):
    """Raised when a client leaves more of its answer unread than may be kept for it."""

    reason = "CLIENT_STALLED"

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"the client left more than {size_text(limit_bytes)} of the answer unread",
            hint="read the answer as it comes, or limit it with `num_predict`",
            metadata={"limit_bytes": str(limit_bytes)},
        )


class NotPinned(LmdError):
    """Raised when a model shall not be pinned any more that is not; *pinned* are those that are."""

    reason = "NOT_PINNED"

    def __init__(self, name: str, *, pinned: Sequence[str]) -> None:
        names = ", ".join(f"`{other}`" for other in pinned)
        super().__init__(
            f"model `{name}` is not pinned",
            hint=f"pinned are {names}" if names else "no model is pinned",
            metadata={"name": name},
        )


class DeviceMemoryShort(LmdError):
    """Raised when a model does not fit, also after everything idle is evicted."""

    reason = "DEVICE_MEMORY"

    def __init__(
        self, name: str, *, needed_bytes: int, free_bytes: int, device: str, hint: str = "", waited_s: float = 0.0
    ) -> None:
        """Say that there is no room; *waited_s*, when not 0, is how long a request has waited for others to make it."""
        self.waited_s = waited_s
        super().__init__(
            f"model `{name}` waited {waited_s:g} s for memory of {device}: "
            f"{size_text(needed_bytes)} needed, {size_text(free_bytes)} free"
            if waited_s
            else f"model `{name}` does not fit in the memory of {device}: "
            f"{size_text(needed_bytes)} needed, {size_text(free_bytes)} can be freed",
            hint=hint or "use a smaller quantization or a smaller `num_ctx`, or stop a model with `lm stop`",
            metadata={
                "name": name,
                "needed_bytes": str(needed_bytes),
                "free_bytes": str(free_bytes),
                "device": device,
            },
        )


class LeaseMemoryShort(LmdError):
    """Raised when a device cannot have as much free as a lease asks for, also after everything idle is evicted."""

    reason = "DEVICE_MEMORY"

    def __init__(self, *, needed_bytes: int, free_bytes: int, device: str) -> None:
        super().__init__(
            f"{device} cannot have {size_text(needed_bytes)} free: {size_text(free_bytes)} can be freed",
            hint="ask for less, or for another device; `lm ps` shows the models that stay",
            metadata={"needed_bytes": str(needed_bytes), "free_bytes": str(free_bytes), "device": device},
        )


class DeviceUnavailable(LmdError):
    """Raised when no accelerator can be used for a model that may not go to main memory; *detail* says why."""

    reason = "DEVICE_UNAVAILABLE"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(
            f"model `{name}` cannot be loaded on an accelerator: {detail}",
            hint="`lm devices --refresh` shows what there is",
            metadata={"name": name, "detail": detail},
        )


class DeviceGone(DeviceUnavailable):
    """Raised when the engine does not find a device that it was told to use: what was known of devices is outdated."""


class ModelIncompatible(LmdError):
    """Raised when the engine refuses the model; *detail* is the engine's own words."""

    reason = "MODEL_INCOMPATIBLE"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(
            f"the engine cannot load model `{name}`: {detail}",
            hint="if its file is damaged, `lm rm` it and get it again; if it is newer than the engine, update `lm`",
            metadata={"name": name, "detail": detail},
        )


class RunnerError(LmdError):
    """Base of what can go wrong with a runner process; *log* holds its last lines."""

    def __init__(self, message: str, *, name: str, log: str, hint: str = "") -> None:
        super().__init__(message, hint=hint, metadata={"name": name, "log": log[-1024:]})


class RunnerCrashed(RunnerError):
    """Raised to exactly the requests a dead runner served."""

    reason = "RUNNER_CRASHED"

    def __init__(self, name: str, *, cause: str, log: str) -> None:
        super().__init__(
            f"the runner of model `{name}` died ({cause})", name=name, log=log, hint="run it again to reload"
        )
        self.metadata["cause"] = cause


class RunnerStartTimeout(RunnerError):
    """Raised when a runner makes no progress towards ready for the whole load time-out."""

    reason = "RUNNER_START_TIMEOUT"

    def __init__(self, name: str, *, timeout_s: float, log: str) -> None:
        super().__init__(
            f"the runner of model `{name}` made no progress for {timeout_s:g} s while loading",
            name=name,
            log=log,
            hint="try again when the machine has less to do",
        )


class AnswersTooLong(RunnerStartTimeout):
    """Raised when a request has waited its time for the answers that its model has to finish before it loads anew."""

    def __init__(self, name: str, *, timeout_s: float, log: str, purpose: str) -> None:
        RunnerError.__init__(
            self,
            f"waited {timeout_s:g} s for running answers of model `{name}` to finish before it {purpose}",
            name=name,
            log=log,
            hint="try again when they are done, or end them with `lm stop --force`",
        )


class RunnerHung(RunnerError):
    """Raised to exactly the requests of a runner that stopped answering pings."""

    reason = "RUNNER_HUNG"

    def __init__(self, name: str, *, timeout_s: float, log: str) -> None:
        super().__init__(
            f"the runner of model `{name}` did not answer for {timeout_s:g} s and was ended",
            name=name,
            log=log,
            hint="run it again to reload",
        )


class EngineFailed(RunnerError):
    """Raised when the engine fails on a request; its runner goes on. *detail* is the runner's own words."""

    reason = "ENGINE_FAILED"

    def __init__(self, name: str, detail: str, *, log: str) -> None:
        super().__init__(
            f"the engine of model `{name}` failed on this request: {detail}", name=name, log=log, hint="run it again"
        )
        self.metadata["detail"] = detail


class QuantizeFailed(RunnerError):
    """Raised when a model cannot be quantized or measured; *detail* is the engine's own words, or how it died."""

    reason = "ENGINE_FAILED"

    def __init__(self, name: str, detail: str, *, log: str) -> None:
        super().__init__(f"the engine fails on model `{name}`: {detail}", name=name, log=log)
        self.metadata["detail"] = detail


class Unloaded(LmdError):
    """Raised to the running answers of a model that is unloaded by force."""

    reason = "UNLOADED"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"model `{name}` was unloaded while it answered", hint="run it again to reload", metadata={"name": name}
        )


class HandedBack(Unloaded):
    """Raised to answers that had no slot yet when their model yielded its turn; who holds them asks again, at once."""


class ContextLengthExceeded(LmdError):
    """Raised when a prompt is longer than the context; nothing is cut silently."""

    reason = "CONTEXT_LENGTH_EXCEEDED"

    def __init__(
        self,
        *,
        prompt_tokens: int,
        context_tokens: int,
        what: str = "the prompt",
        hint: str = "shorten the prompt, or raise `num_ctx`",
    ) -> None:
        super().__init__(
            f"{what} has {prompt_tokens} tokens, the context holds {context_tokens}",
            hint=hint,
            metadata={"prompt_tokens": str(prompt_tokens), "context_tokens": str(context_tokens)},
        )
        self._counts = prompt_tokens, context_tokens

    def of(self, what: str) -> ContextLengthExceeded:
        """Return the same error for *what* is no prompt but can be cut on request."""
        prompt_tokens, context_tokens = self._counts
        return ContextLengthExceeded(
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
            what=what,
            hint="shorten it, set `truncate` to cut its end, or raise `num_ctx` if the model was trained for more",
        )


class TemplateFailed(LmdError):
    """Raised when the chat template fails or runs over its limits of time, memory or output."""

    reason = "TEMPLATE_FAILED"

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"the chat template fails: {detail}",
            hint="give the model another one with TEMPLATE in a Modelfile, or go without one (`lm run --raw`)",
            metadata={"detail": detail},
        )
