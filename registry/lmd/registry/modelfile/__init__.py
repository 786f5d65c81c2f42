'''Modelfiles: recipes for models.

    # a comment, at the start of a line only
    FROM llama3                          a model, a GGUF file, a folder of shards, or a digest; several for shards
    DRAFT llama3-small                   a smaller model that drafts for this one; named as in FROM
    ADAPTER ./pirate.gguf 0.5            a LoRA adapter and its scale, 1 when left out; may be repeated
    PROJECTOR ./mmproj.gguf              what turns images into embeddings; FROM knows one as well
    QUANTIZE Q4_K_M                      the quantization to make of full-precision weights
    REQUIRES 0.14.0                      the release of Ollama whose behaviour the model needs
    PARAMETER temperature 0.5            PARAMETER stop "<|end|>" may be repeated, each adds one
    SYSTEM You are a pirate.
    TEMPLATE """{% for message in messages %}…{% endfor %}"""     Jinja, or Go: {{ range .Messages }}…{{ end }}
    LICENSE MIT
    MESSAGE user Hello

Directives are words in any case, in any order. A value is the rest of its line without the spaces around it, or begins
with `"` or `"""` and ends where the same quotes end a line, so it may span lines. There are no escapes. An empty value
(`SYSTEM ""`) removes what the base has. Control characters are dropped, with a warning.

A name after FROM stands for a model with all it has, which is inherited. A digest (``sha256:…``) stands for bytes: a
GGUF, or the files of the manifest it names with nothing inherited. What drafts and what adapts is inherited from a name
as well, and not from a digest. A model named after DRAFT gives its weights and nothing else.
'''

from __future__ import annotations

from lmd.registry.modelfile.arguments import QUANTIZATIONS, read_version
from lmd.registry.modelfile.parsing import MAX_BYTES, MAX_PROBLEMS, parse_modelfile
from lmd.registry.modelfile.printing import format_modelfile
from lmd.registry.modelfile.templates import is_go_template, why_not
from lmd.registry.modelfile.text import decode_modelfile
from lmd.registry.modelfile.values import DIRECTIVES, MESSAGE_ROLES, Adapter, From, Modelfile

__all__ = [
    "DIRECTIVES",
    "MAX_BYTES",
    "MAX_PROBLEMS",
    "MESSAGE_ROLES",
    "QUANTIZATIONS",
    "Adapter",
    "From",
    "Modelfile",
    "decode_modelfile",
    "format_modelfile",
    "is_go_template",
    "parse_modelfile",
    "read_version",
    "why_not",
]
