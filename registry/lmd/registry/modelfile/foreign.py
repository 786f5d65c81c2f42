"""Directives that others know and that mean nothing here: what they are, and what to do instead."""

from __future__ import annotations

FOREIGN = {
    "RENDERER": (
        "Ollama knows RENDERER since 0.12: it names one of the prompt formats built into Ollama, which are not here; "
        "leave it out to use the template of the GGUF file, or write TEMPLATE"
    ),
    "PARSER": (
        "Ollama knows PARSER since 0.12: it names one of the readers of answers built into Ollama, which are not here; "
        "leave it out: tool calls and thoughts are found by the template"
    ),
    "EMBED": (
        "Ollama knew EMBED in its first versions: it put a file's text into the model; leave it out, and put the text "
        "into SYSTEM or MESSAGE"
    ),
    "PROMPT": "Ollama knew PROMPT in its first versions; its place was taken by TEMPLATE",
    "TOOLS": "Ollama does not know TOOLS as of 0.32; functions are sent with each request, in `tools`",
    "STOP": "stop texts are a parameter: PARAMETER stop …",
    "INCLUDE": "Ollama does not know INCLUDE as of 0.32; a Modelfile builds on another model with FROM",
    "RUN": "RUN is a directive of Dockerfiles; a Modelfile runs nothing",
    "COPY": "COPY is a directive of Dockerfiles; files are named with FROM, DRAFT, ADAPTER and PROJECTOR",
    "ARG": "ARG is a directive of Dockerfiles; a Modelfile has no variables",
    "ENV": "ENV is a directive of Dockerfiles; settings of the model are written with PARAMETER",
    "CMD": "CMD is a directive of Dockerfiles; a Modelfile runs nothing",
    "ENTRYPOINT": "ENTRYPOINT is a directive of Dockerfiles; a Modelfile runs nothing",
}
"""Directive → what a Modelfile that has it is told."""
