"""The settings in effect for a request: the daemon's defaults, then the model's manifest, then the request."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import cast

from lmd.daemon.residency.values import LoadSettings
from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader
from lmd.registry.kv_types import DEFAULT_KV_TYPE
from lmd.registry.memory import keeps_keys, kv_type_problem
from lmd.registry.parameters import INT32_MAX, PARAMETERS, ParameterValue, validate
from lmd.runner.v1 import frames_pb2 as frames

#: The engine takes 2**32 - 1 for "pick one".
SEEDS = 2**32 - 1

MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100
MAX_STOP_TOKENS = 64


def effective(
    requested: Mapping[str, object],
    manifest: Mapping[str, ParameterValue],
    *,
    num_ctx: int,
    train_ctx: int,
    kv_type: str = DEFAULT_KV_TYPE,
) -> dict[str, ParameterValue]:
    """Merge settings; later wins, `stop` as a whole.

    *num_ctx* is the daemon's default for the context, cut to *train_ctx*, what the model was trained with (0: not
    known). What somebody asks for by name stays as it is; residency keeps to what the model can. *kv_type* is the
    daemon's default for keys and values.

    Raises:
        InvalidRequest: a requested setting is unknown or out of its range.
    """
    defaults = {name: setting.default for name, setting in PARAMETERS.items() if setting.default is not None}
    defaults["num_ctx"] = min(num_ctx, train_ctx) if train_ctx > 0 else num_ctx
    defaults["kv_type"] = kv_type
    return defaults | dict(manifest) | validate(requested)


def usable_kv_type(header: GgufHeader, kv_type: str) -> str:
    """Return the daemon's default for keys and values as far as the engine can do it for a model."""
    return DEFAULT_KV_TYPE if kv_type_problem(header, kv_type) else kv_type


def context_floor(requested: Mapping[str, object], manifest: Mapping[str, ParameterValue], min_ctx: int) -> int:
    """Return the smallest context that will do; 0 when one was asked for by name, which is never made smaller."""
    return 0 if "num_ctx" in requested or "num_ctx" in manifest else min_ctx


def load_settings(
    parameters: Mapping[str, ParameterValue], header: GgufHeader | None = None, *, min_ctx: int = 0
) -> LoadSettings:
    """Return the part that takes effect when the model of *header* is loaded, with *min_ctx* of `context_floor`.

    Raises:
        InvalidRequest: the engine cannot do that for this model.
    """
    kv_type = cast(str, parameters["kv_type"])
    if header is not None and not keeps_keys(header):
        # There is nothing to keep in any type, so nobody's wish reloads it.
        kv_type = DEFAULT_KV_TYPE
    if header is not None and (problem := kv_type_problem(header, kv_type)):
        raise InvalidRequest(
            f"keys and values of this model cannot be kept in {kv_type}: {problem}",
            field="kv_type",
            hint=f"take {DEFAULT_KV_TYPE}",
        )
    return LoadSettings(
        num_ctx=_int(parameters, "num_ctx"),
        num_batch=_int(parameters, "num_batch"),
        num_gpu=_int(parameters, "num_gpu"),
        num_thread=_int(parameters, "num_thread"),
        use_mmap=bool(parameters["use_mmap"]),
        kv_type=kv_type,
        min_ctx=min_ctx if min_ctx < _int(parameters, "num_ctx") else 0,
    )


def sampling(parameters: Mapping[str, ParameterValue]) -> frames.Sampling:
    """Return the part that goes with each request; the seed is chosen here when it is -1."""
    seed = _int(parameters, "seed")
    return frames.Sampling(
        temperature=_float(parameters, "temperature"),
        top_k=_int(parameters, "top_k"),
        top_p=_float(parameters, "top_p"),
        min_p=_float(parameters, "min_p"),
        typical_p=_float(parameters, "typical_p"),
        repeat_last_n=_int(parameters, "repeat_last_n"),
        repeat_penalty=_float(parameters, "repeat_penalty"),
        presence_penalty=_float(parameters, "presence_penalty"),
        frequency_penalty=_float(parameters, "frequency_penalty"),
        mirostat=_int(parameters, "mirostat"),
        mirostat_tau=_float(parameters, "mirostat_tau"),
        mirostat_eta=_float(parameters, "mirostat_eta"),
        seed=secrets.randbelow(SEEDS) if seed < 0 else seed % SEEDS,
        num_predict=_int(parameters, "num_predict"),
        stop=_texts(parameters, "stop"),
        xtc_probability=_float(parameters, "xtc_probability"),
        xtc_threshold=_float(parameters, "xtc_threshold"),
        dry_multiplier=_float(parameters, "dry_multiplier"),
        dry_base=_float(parameters, "dry_base"),
        dry_allowed_length=_int(parameters, "dry_allowed_length"),
        dry_penalty_last_n=_int(parameters, "dry_penalty_last_n"),
        dry_sequence_breakers=_texts(parameters, "dry_sequence_breakers"),
        ignore_eos=bool(parameters["ignore_eos"]),
        draft_num_predict=_int(parameters, "draft_num_predict"),
        prompt_lookup=bool(parameters["prompt_lookup"]),
        deterministic=bool(parameters["deterministic"]),
    )


def check_logit_bias(biases: Mapping[int, float]) -> dict[int, float]:
    """Return what is added to the scores of tokens, checked; whether the ids exist only the runner knows.

    Raises:
        InvalidRequest: there are too many, an id is negative, or a bias is neither -100 to 100 nor -infinity.
    """
    field = "logit_bias"
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"`{field}` has {len(biases)} tokens; at most {MAX_LOGIT_BIASES} are legal", field=field)
    for token, bias in biases.items():
        if not _is_token(token):
            raise InvalidRequest(f"`{field}` names the token {token!r}; ids are whole numbers from 0", field=field)
        number = type(bias) in (int, float)
        # A comparison with NaN is false, so NaN is refused as well.
        if not number or not (-MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS or bias == -math.inf):
            raise InvalidRequest(
                f"`{field}` of token {token} must be from -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}, or -infinity, "
                f"not {bias!r}",
                field=field,
            )
    return {int(token): float(bias) for token, bias in biases.items()}


def check_stop_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that end an answer, each once; whether they exist only the runner knows.

    Raises:
        InvalidRequest: there are too many, or an id is negative.
    """
    field = "stop_tokens"
    if len(tokens) > MAX_STOP_TOKENS:
        raise InvalidRequest(f"`{field}` has {len(tokens)} tokens; at most {MAX_STOP_TOKENS} are legal", field=field)
    for token in tokens:
        if not _is_token(token):
            raise InvalidRequest(f"`{field}` names the token {token!r}; ids are whole numbers from 0", field=field)
    return tuple(dict.fromkeys(tokens))


def _is_token(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= INT32_MAX


def _texts(parameters: Mapping[str, ParameterValue], name: str) -> tuple[str, ...]:
    return cast(tuple[str, ...], parameters[name])


def _int(parameters: Mapping[str, ParameterValue], name: str) -> int:
    return int(cast(int, parameters[name]))


def _float(parameters: Mapping[str, ParameterValue], name: str) -> float:
    return float(cast(float, parameters[name]))
