"""The JSON shapes of `--json`, one function per message. Keys are only ever added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lmd.cli.units import FOR_EVER, format_until

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from lmd.cli.answer import Answer, Choice
    from lmd.v1 import inference_service_pb2 as inference_pb
    from lmd.v1 import model_pb2, model_service_pb2, runtime_service_pb2, store_service_pb2, system_service_pb2

Json = dict[str, object]


def time_text(timestamp: Timestamp) -> str | None:
    """Return RFC 3339 in UTC with milliseconds, or None for a time that is not set."""
    if not (timestamp.seconds or timestamp.nanos):
        return None
    moment = datetime.fromtimestamp(unix_time(timestamp), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def unix_time(timestamp: Timestamp) -> float:
    """Return seconds since 1970."""
    return timestamp.seconds + timestamp.nanos / 1e9


def seconds(duration: Duration) -> float:
    """Return a duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def enum_text(message: Message, field: str) -> str:
    """Return the value of an enum field in lower case without its prefix: STATE_READY is "ready".

    A value that this client does not know yet is its number.
    """
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    number = getattr(message, field)
    enum = descriptor.enum_type
    assert enum is not None
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = next(v.name for v in enum.values if v.number == 0).removesuffix("UNSPECIFIED")
    return value.name.removeprefix(prefix).lower()


def parameters_json(parameters: model_pb2.Parameters) -> Json:
    """Return the settings that are set, by name."""
    values: Json = {}
    for field, value in parameters.ListFields():
        if field.is_repeated:
            values[field.name] = list(value)
        elif field.type == field.TYPE_FLOAT:
            values[field.name] = float(f"{value:.7g}")  # the wire's 32 bits hold no more digits
        else:
            values[field.name] = value
    return values


def model_json(model: model_pb2.Model) -> Json:
    """Return one entry of `lm ls --json`."""
    details = model.details
    return {
        "name": model.name,
        "digest": model.digest,
        "size_bytes": model.size_bytes,
        "own_bytes": model.own_bytes,
        "modified_at": time_text(model.modified_time),
        "architecture": details.architecture,
        "parameter_count": details.parameter_count,
        "quantization": details.quantization,
        "context_length": details.context_length,
        "capabilities": list(model.capabilities),
    }


def measurement_json(side: model_service_pb2.Measurement) -> Json:
    """Return one side of the comparison of `lm quantize --json`."""
    return {
        "name": side.name,
        "quantization": side.quantization,
        "size_bytes": side.size_bytes,
        "perplexity": float(f"{side.perplexity:.9g}"),
        "scored_tokens": side.scored_tokens,
        "prompt_tokens_per_second": float(f"{side.prompt_tokens_per_second:.6g}"),
        "answer_tokens_per_second": float(f"{side.answer_tokens_per_second:.6g}"),
    }


def model_info_json(info: model_pb2.ModelInfo) -> Json:
    """Return `lm show --json`."""
    details = info.model.details
    return {
        **model_json(info.model),
        "embedding_length": details.embedding_length,
        "block_count": details.block_count,
        "vocabulary_size": details.vocabulary_size,
        "title": details.title,
        "template": info.template,
        "system": info.system,
        "parameters": parameters_json(info.parameters),
        "messages": [{"role": m.role, "content": m.content} for m in info.messages],
        "licenses": list(info.licenses),
        "origin": {
            "ref": info.origin.ref,
            "commit": info.origin.commit,
            "pulled_at": time_text(info.origin.pulled_time),
            "quantize": info.origin.quantize,
            "quantized_from": info.origin.quantized_from,
            "imatrix": info.origin.imatrix,
        },
        "files": [
            {
                "role": f.role,
                "filename": f.filename,
                "digest": f.digest,
                "size_bytes": f.size_bytes,
                **({"scale": f.scale} if f.role == "adapter" else {}),
            }
            for f in info.files
        ],
        "modelfile": info.modelfile,
        "requires": info.requires,
        "metadata": dict(sorted(info.metadata.items())),
    }


def version_json(version: model_service_pb2.Version) -> Json:
    """Return one entry of `lm history --json`."""
    return {
        "version": version.number,
        "digest": version.digest,
        "time": time_text(version.time),
        "how": version.how,
        "detail": version.detail,
        "change": version.change,
        "state": enum_text(version, "state"),
        "spared_until": time_text(version.spared_until_time),
    }


def runner_json(runner: runtime_service_pb2.Runner) -> Json:
    """Return one entry of `lm ps --json`."""
    return {
        "name": runner.name,
        "digest": runner.digest,
        "state": enum_text(runner, "state"),
        "reason": runner.reason,
        "memory_bytes": runner.memory_bytes,
        "vram_bytes": runner.vram_bytes,
        "device": runner.device,
        "context_length": runner.context_length,
        "slots": runner.slots,
        "slots_busy": runner.slots_busy,
        "queued": runner.queued,
        "expires_at": time_text(runner.expire_time),
        "keep_forever": runner.keep_forever,
        "pinned": runner.pinned,
        "shares": shares_json(runner.shares),
        "estimated_bytes": runner.estimated_bytes,
        "pid": runner.pid,
        "loaded_at": time_text(runner.load_time),
        "load_seconds": seconds(runner.load_duration),
        "stats": {field.name: getattr(runner.stats, field.name) for field in runner.stats.DESCRIPTOR.fields},
    }


def shares_json(shares: Iterable[runtime_service_pb2.DeviceShare]) -> list[Json]:
    """Return how much of each device something takes."""
    return [{"device": share.device, "bytes": share.bytes} for share in shares]


def runner_event_json(event: runtime_service_pb2.RunnerEvent) -> Json:
    """Return one event of `lm ps --watch --json`."""
    return {
        "time": time_text(event.time),
        "name": event.name,
        "digest": event.digest,
        "state": event_state(event),
        "reason": event.reason,
    }


def event_state(event: runtime_service_pb2.RunnerEvent) -> str:
    """Return the state that a runner has now, in a word."""
    return enum_text(event, "state") if event.state else "gone"


def cache_share(runner: runtime_service_pb2.Runner) -> str:
    """Return how much of all prompts came from the prefix cache, for people."""
    stats = runner.stats
    return f"{stats.cached_tokens / stats.prompt_tokens:.0%}" if stats.prompt_tokens else ""


def until_text(runner: runtime_service_pb2.Runner, now: float) -> str:
    """Return when a runner unloads, for people."""
    if runner.pinned:
        return "pinned"
    if runner.keep_forever:
        return FOR_EVER
    if runner.HasField("expire_time"):
        return format_until(unix_time(runner.expire_time) - now)
    return "in use" if runner.slots_busy or runner.queued else ""


def status_json(status: system_service_pb2.GetStatusResponse) -> Json:
    """Return the daemon's part of `lm status --json`."""
    return {
        "pid": status.pid,
        "version": status.version,
        "api_version": status.api_version,
        "uid": status.uid,
        "socket": status.socket,
        "http": status.http,
        "http_detail": status.http_detail,
        "store": status.store,
        "config_file": status.config_file,
        "dropin": status.dropin,
        "dropin_problems": [
            {
                "file": problem.file,
                "message": problem.message,
                "since": time_text(problem.since_time),
                "waiting": problem.waiting,
            }
            for problem in status.dropin_problems
        ],
        "dropin_problem_count": status.dropin_problem_count,
        "started_at": time_text(status.start_time),
        "engine_version": status.engine_version,
        "rss_bytes": status.rss_bytes,
        "draining": status.draining,
        "devices": [
            {
                "id": d.id,
                "description": d.description,
                "total_bytes": d.total_bytes,
                "free_bytes": d.free_bytes,
                "reason": d.reason,
            }
            for d in status.devices
        ],
    }


def device_json(device: runtime_service_pb2.ComputeDevice) -> Json:
    """Return a device of `lm devices --json`."""
    return {field.name: getattr(device, field.name) for field in device.DESCRIPTOR.fields}


def usage_json(usage: store_service_pb2.GetDiskUsageResponse) -> Json:
    """Return the store's part of `lm status --json`."""
    return {field.name: getattr(usage, field.name) for field in usage.DESCRIPTOR.fields}


def progress_json(progress: model_service_pb2.PullProgress) -> Json:
    """Return a progress event of `lm pull --json`."""
    return {
        "event": "progress",
        "state": enum_text(progress, "state"),
        "digest": progress.digest,
        "filename": progress.filename,
        "completed_bytes": progress.completed_bytes,
        "total_bytes": progress.total_bytes,
        "resumed_bytes": progress.resumed_bytes,
        "detail": progress.detail,
    }


def pull_json(pull: model_service_pb2.Pull) -> Json:
    """Return one entry of `lm pull --list --json`."""
    return {
        "pull_id": pull.pull_id,
        "ref": pull.ref,
        "name": pull.name,
        "state": enum_text(pull, "state"),
        "completed_bytes": pull.completed_bytes,
        "total_bytes": pull.total_bytes,
        "started_at": time_text(pull.start_time),
        "detached": pull.detached,
        "watchers": pull.watchers,
        "error_message": pull.error_message,
    }


def answer_json(model: str, answer: Answer, done: inference_pb.AnswerDone) -> Json:
    """Return `lm run --json`."""
    ends: Sequence[inference_pb.AnswerDone | inference_pb.ChoiceDone] = done.choices or [done]
    return {
        "model": model,
        "response": answer.text,
        "thinking": answer.choice(0).thinking,
        "finish_reason": enum_text(done, "finish_reason"),
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": done.cached_tokens,
        "generated_tokens": done.generated_tokens,
        "total_seconds": seconds(done.total_duration),
        "load_seconds": seconds(done.load_duration),
        "queue_seconds": seconds(done.queue_duration),
        "prompt_seconds": seconds(done.prompt_duration),
        "generate_seconds": seconds(done.generate_duration),
        "seed": done.seed,
        "stop": done.stop,
        "dropped_messages": done.dropped_messages,
        "dropped_tokens": done.dropped_tokens,
        "shifted_tokens": done.shifted_tokens,
        "drafted_tokens": done.drafted_tokens,
        "accepted_tokens": done.accepted_tokens,
        "choices": [_choice_json(answer.choice(number), end) for number, end in enumerate(ends)],
    }


def _choice_json(choice: Choice, end: inference_pb.AnswerDone | inference_pb.ChoiceDone) -> Json:
    shape: Json = {
        "text": choice.text,
        "thinking": choice.thinking,
        "finish_reason": enum_text(end, "finish_reason"),
        "generated_tokens": end.generated_tokens,
        "stop": end.stop,
    }
    if choice.logprobs:
        shape["logprobs"] = [
            {**_logprob_json(token), "top": [_logprob_json(other) for other in token.top]} for token in choice.logprobs
        ]
    return shape


def _logprob_json(token: inference_pb.TokenLogprob) -> Json:
    """Return a token; its text is for people, as the bytes need not be whole characters."""
    return {
        "id": token.id,
        "token": token.token.decode(errors="replace"),
        "bytes": list(token.token),
        "logprob": float(f"{token.logprob:.7g}") if math.isfinite(token.logprob) else None,
    }


def embeddings_json(model: str, replies: Sequence[inference_pb.EmbedResponse]) -> Json:
    """Return `lm embed --json`; one call after the other made the vectors."""
    embeddings = [embedding for reply in replies for embedding in reply.embeddings]
    return {
        "model": model,
        # The wire's 32 bits are told apart by nine digits.
        "embeddings": [[float(f"{value:.9g}") for value in embedding.values] for embedding in embeddings],
        "tokens": [embedding.prompt_tokens for embedding in embeddings],
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "total_seconds": sum(seconds(reply.total_duration) for reply in replies),
        "load_seconds": sum(seconds(reply.load_duration) for reply in replies),
    }


def ranking_json(model: str, documents: Sequence[str], ranking: inference_pb.RerankResponse) -> Json:
    """Return `lm rerank --json`."""
    return {
        "model": model,
        "results": [
            {"index": result.index, "score": float(f"{result.score:.9g}"), "document": documents[result.index]}
            for result in ranking.results
        ],
        "prompt_tokens": ranking.prompt_tokens,
        "total_seconds": seconds(ranking.total_duration),
        "load_seconds": seconds(ranking.load_duration),
    }


def tokens_json(model: str, tokens: Sequence[inference_pb.Token], prompt: str | None) -> Json:
    """Return `lm tokenize --json`. A token's `text` is null when its bytes are no whole characters."""
    shaped: list[Json] = [
        {"id": token.id, "bytes": list(token.piece), "text": _whole_text(token.piece)} for token in tokens
    ]
    start: Json = {"model": model} if prompt is None else {"model": model, "prompt": prompt}
    return {**start, "tokens": shaped}


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def garbage_json(item: store_service_pb2.GarbageItem) -> Json:
    """Return one item of `lm gc --json`."""
    return {
        "kind": enum_text(item, "kind"),
        "digest": item.digest,
        "size_bytes": item.size_bytes,
        "modified_at": time_text(item.modified_time),
    }
