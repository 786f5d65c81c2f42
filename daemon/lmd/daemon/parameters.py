"""The settings in effect for a request: the daemon's defaults, then the model's manifest, then the request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import cast

from lmd.daemon.residency.values import LoadSettings
from lmd.registry.parameters import PARAMETERS, ParameterValue, validate
from lmd.runner.v1 import frames_pb2 as frames

#: The engine takes 2**32 - 1 for "pick one".
SEEDS = 2**32 - 1


def effective(
    requested: Mapping[str, object], manifest: Mapping[str, ParameterValue], *, num_ctx: int, train_ctx: int
) -> dict[str, ParameterValue]:
    """Merge settings; later wins, `stop` as a whole.

    *num_ctx* is the daemon's default for the context, cut to *train_ctx*, what the model was trained with (0: not
    known). What somebody asks for by name stays as it is; residency keeps to what the model can.

    Raises:
        InvalidRequest: a requested setting is unknown or out of its range.
    """
    defaults = {name: setting.default for name, setting in PARAMETERS.items() if setting.default is not None}
    defaults["num_ctx"] = min(num_ctx, train_ctx) if train_ctx > 0 else num_ctx
    return defaults | dict(manifest) | validate(requested)


def load_settings(parameters: Mapping[str, ParameterValue]) -> LoadSettings:
    """Return the part that takes effect when the model is loaded."""
    return LoadSettings(
        num_ctx=_int(parameters, "num_ctx"),
        num_batch=_int(parameters, "num_batch"),
        num_gpu=_int(parameters, "num_gpu"),
        num_thread=_int(parameters, "num_thread"),
        use_mmap=bool(parameters["use_mmap"]),
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
        stop=cast(tuple[str, ...], parameters["stop"]),
    )


def _int(parameters: Mapping[str, ParameterValue], name: str) -> int:
    return int(cast(int, parameters[name]))


def _float(parameters: Mapping[str, ParameterValue], name: str) -> float:
    return float(cast(float, parameters[name]))
