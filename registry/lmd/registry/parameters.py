"""The engine settings a model or a request may have: names, kinds and legal ranges.

Names are those of Ollama's Modelfile where it has them. The table mirrors the message ``Parameters`` of the wire API,
which a test holds against it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lmd.registry.errors import InvalidRequest
from lmd.registry.kv_types import KV_TYPES

ParameterValue = int | float | bool | str | tuple[str, ...]

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_STOPS = 1024
MAX_STOP_BYTES = 512


class Kind(StrEnum):
    """What a parameter's value is."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    TEXTS = "list of texts"
    CHOICE = "one of some words"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting.

    *minimum* and *maximum* are legal themselves unless *above_minimum*; of a choice, *choices* are. *default* None
    means that it depends on the model or on the daemon. *load_time* settings take effect when the model is loaded, the
    others with each request.
    """

    name: str
    kind: Kind
    doc: str
    minimum: float | None = None
    maximum: float | None = None
    default: ParameterValue | None = None
    load_time: bool = False
    above_minimum: bool = False
    choices: tuple[str, ...] = ()

    @property
    def legal(self) -> str:
        """The legal values in words."""
        if self.kind is Kind.BOOL:
            return "true or false"
        if self.kind is Kind.TEXTS:
            return f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes"
        if self.kind is Kind.CHOICE:
            return f"one of {', '.join(self.choices)}"
        what = "a whole number" if self.kind is Kind.INT else "a number"
        if self.maximum in (INT32_MAX, INT64_MAX):
            return f"{what}, at least {self.minimum:g}"
        if self.above_minimum:
            return f"{what} above {self.minimum:g}, up to {self.maximum:g}"
        return f"{what} from {self.minimum:g} to {self.maximum:g}"


_ALL = (
    Parameter("num_ctx", Kind.INT, "Tokens of context for one request", 8, INT32_MAX, load_time=True),
    Parameter("num_batch", Kind.INT, "Tokens of prompt decoded in one step", 1, 16384, 512, load_time=True),
    Parameter("num_gpu", Kind.INT, "Layers on the accelerator; -1 means all", -1, INT32_MAX, -1, load_time=True),
    # The engine has a fixed table of 512 threads (GGML_MAX_N_THREADS).
    Parameter("num_thread", Kind.INT, "CPU threads; 0 means measured at load", 0, 512, 0, load_time=True),
    Parameter("use_mmap", Kind.BOOL, "Whether the weights are memory-mapped", default=True, load_time=True),
    Parameter(
        "kv_type",
        Kind.CHOICE,
        "How keys and values are kept: q8_0 takes half the memory of f16, q4_0 a quarter, for less exact answers",
        load_time=True,
        choices=tuple(KV_TYPES),
    ),
    Parameter("temperature", Kind.FLOAT, "Sampling temperature; 0 is greedy", 0, 100, 0.8),
    Parameter("top_k", Kind.INT, "Keep the k most likely tokens; 0 keeps all", 0, INT32_MAX, 40),
    Parameter("top_p", Kind.FLOAT, "Keep the most likely tokens that together reach this probability", 0, 1, 0.9),
    Parameter("min_p", Kind.FLOAT, "Drop tokens less likely than this share of the most likely one", 0, 1, 0.0),
    Parameter("typical_p", Kind.FLOAT, "Locally typical sampling; 1 is off", 0, 1, 1.0),
    Parameter(
        "repeat_last_n",
        Kind.INT,
        "How many tokens back penalties look; 0 is off, -1 is the whole context",
        -1,
        INT32_MAX,
        64,
    ),
    Parameter(
        "repeat_penalty", Kind.FLOAT, "Divides the score of repeated tokens; 1 is off", 0, 10, 1.0, above_minimum=True
    ),
    Parameter("presence_penalty", Kind.FLOAT, "Subtracted once from the score of tokens seen", -2, 2, 0.0),
    Parameter("frequency_penalty", Kind.FLOAT, "Subtracted for each occurrence of a token", -2, 2, 0.0),
    Parameter("mirostat", Kind.INT, "Mirostat's version; 0 is off", 0, 2, 0),
    Parameter("mirostat_tau", Kind.FLOAT, "Mirostat's target entropy", 0, 100, 5.0),
    Parameter("mirostat_eta", Kind.FLOAT, "Mirostat's learning rate", 0, 1, 0.1),
    Parameter("seed", Kind.INT, "The random seed; -1 picks one for each request", -1, INT64_MAX, -1),
    Parameter("num_predict", Kind.INT, "The most tokens to generate; -1 is no limit", -1, INT32_MAX, -1),
    Parameter("stop", Kind.TEXTS, "Texts that end the answer and are not part of it", default=()),
    Parameter("ignore_eos", Kind.BOOL, "Whether tokens that end an answer are never sampled", default=False),
    Parameter("xtc_probability", Kind.FLOAT, "The chance that XTC cuts at a token; 0 is off", 0, 1, 0.0),
    # Two tokens cannot both be likelier than a half.
    Parameter(
        "xtc_threshold",
        Kind.FLOAT,
        "XTC drops all tokens at least this likely but the least likely of them",
        0,
        0.5,
        0.1,
    ),
    Parameter(
        "dry_multiplier", Kind.FLOAT, "Strength of DRY, which penalizes continued repetition; 0 is off", 0, 100, 0.0
    ),
    Parameter("dry_base", Kind.FLOAT, "DRY's penalty grows by this factor for each further token", 1, 100, 1.75),
    Parameter("dry_allowed_length", Kind.INT, "Repetitions up to this many tokens cost nothing", 1, INT32_MAX, 2),
    Parameter(
        "dry_penalty_last_n",
        Kind.INT,
        "How many tokens back DRY looks; 0 is off, -1 is the whole context",
        -1,
        INT32_MAX,
        -1,
    ),
    Parameter(
        "dry_sequence_breakers", Kind.TEXTS, "Texts that end a repetition for DRY", default=("\n", ":", '"', "*")
    ),
    Parameter(
        "draft_num_predict",
        Kind.INT,
        "The most tokens to draft speculatively in a step; 0 is off, -1 leaves it to the engine",
        -1,
        64,
        -1,
    ),
    Parameter(
        "prompt_lookup",
        Kind.BOOL,
        "Whether to draft what followed the last tokens when they were in the context before",
        default=False,
    ),
    Parameter(
        "deterministic",
        Kind.BOOL,
        "Whether requests are decoded by themselves, so that others cannot change the rounding of numbers",
        default=False,
    ),
)

PARAMETERS: dict[str, Parameter] = {parameter.name: parameter for parameter in _ALL}
"""Every parameter by name."""

IGNORED = frozenset(
    {
        "embedding_only",
        "f16_kv",
        "logits_all",
        "low_vram",
        "main_gpu",
        "num_keep",
        "numa",
        "penalize_newline",
        "tfs_z",
        "use_mlock",
        "use_mlx",
        "vocab_only",
    }
)
"""Names that existing Modelfiles and clients send and that have no effect here."""

_TRUE = frozenset({"1", "t", "true", "yes", "on"})
_FALSE = frozenset({"0", "f", "false", "no", "off"})


def validate(values: Mapping[str, object]) -> dict[str, ParameterValue]:
    """Check names, kinds and ranges; return the values in their own types, in the given order.

    A whole float is a legal int and an int a legal float. Texts may be one text or a list of them.

    Raises:
        InvalidRequest: with the parameter's name as field, the value and the legal range in the message.
    """
    return {name: _check(lookup(name), value) for name, value in values.items()}


def parse_text(name: str, text: str) -> ParameterValue:
    """Read a parameter written as text, as in a Modelfile or after ``-o``; one stop text makes a list of one.

    Raises:
        InvalidRequest: as :func:`validate`.
    """
    parameter = lookup(name)
    value: object = text
    if parameter.kind not in (Kind.TEXTS, Kind.CHOICE) and (not text.isascii() or "_" in text):
        # Python reads `1_000` and digits of other scripts; nobody who writes a Modelfile expects that.
        raise _invalid(parameter, text)
    try:
        if parameter.kind is Kind.INT:
            value = int(text)
        elif parameter.kind is Kind.FLOAT:
            value = float(text)
        elif parameter.kind is Kind.BOOL and text.lower() in _TRUE | _FALSE:
            value = text.lower() in _TRUE
    except ValueError:
        raise _invalid(parameter, text) from None
    return _check(parameter, value)


def format_value(value: ParameterValue) -> str:
    """The text of a single value, such that :func:`parse_text` reads it back; lists have one text for each item."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else repr(value)


def lookup(name: str) -> Parameter:
    """Find a parameter.

    Raises:
        InvalidRequest: when there is none of this name; the hint has close ones.
    """
    parameter = PARAMETERS.get(name)
    if parameter is not None:
        return parameter
    if name in IGNORED:
        raise InvalidRequest(f"parameter `{name}` is not supported", field=name, hint="leave it out")
    close = difflib.get_close_matches(name[:64].lower(), PARAMETERS, 2)
    hint = f"did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else ""
    shown = ascii(name[:64])[1:-1]
    raise InvalidRequest(
        f"unknown parameter `{shown}`", field=shown, hint=hint or f"the parameters are {', '.join(PARAMETERS)}"
    )


def _check(parameter: Parameter, value: object) -> ParameterValue:
    if parameter.kind is Kind.TEXTS:
        return _check_texts(parameter, value)
    if parameter.kind is Kind.BOOL:
        if isinstance(value, bool):
            return value
        raise _invalid(parameter, value)
    if parameter.kind is Kind.CHOICE:
        if isinstance(value, str) and value.lower() in parameter.choices:
            return value.lower()
        raise _invalid(parameter, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(parameter, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _invalid(parameter, value)
    if parameter.kind is Kind.INT and value != int(value):
        raise _invalid(parameter, value)
    number = int(value) if parameter.kind is Kind.INT else value
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and (number < low or (parameter.above_minimum and number == low))) or (
        high is not None and number > high
    ):
        raise _invalid(parameter, value)
    return number if parameter.kind is Kind.INT else float(number)


def _check_texts(parameter: Parameter, value: object) -> tuple[str, ...]:
    items: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) != len(items) or not (isinstance(value, str | list | tuple)) or len(texts) > MAX_STOPS:
        raise _invalid(parameter, value)
    for text in texts:
        try:
            legal = 1 <= len(text.encode()) <= MAX_STOP_BYTES
        except UnicodeEncodeError:
            legal = False
        if not legal:
            raise _invalid(parameter, text)
    return texts


def _invalid(parameter: Parameter, value: object) -> InvalidRequest:
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    legal = parameter.legal
    if isinstance(value, int) and parameter.maximum in (INT32_MAX, INT64_MAX) and value > parameter.maximum:
        legal = f"{legal} and at most {parameter.maximum}"
    return InvalidRequest(f"parameter `{parameter.name}` must be {legal}, not {shown}", field=parameter.name)
