"""Directives that others know and that mean nothing here: what they are, and what to do instead."""

from __future__ import annotations

FOREIGN = {
    "RENDERER": (
        "Ollama 0.12 and later know it as the name of a prompt format built into Ollama; leave it out to use the "
        "template of the GGUF file, or write TEMPLATE"
    ),
    "PARSER": (
        "Ollama 0.12 and later know it as the name of a reader of answers built into Ollama; leave it out: tool calls "
        "and thoughts are found by the template"
    ),
    "EMBED": "Ollama's first versions put a file's text into the model with it; put the text into SYSTEM or MESSAGE",
    "PROMPT": "Ollama's first versions had it; TEMPLATE took its place",
    "TOOLS": "no version of Ollama up to 0.32 knows it; functions are sent with each request, in `tools`",
    "INCLUDE": "no version of Ollama up to 0.32 knows it; a Modelfile builds on another model with FROM",
    "STOP": "texts that end an answer are a parameter: PARAMETER stop, then the text",
    "ARG": "it is a directive of Dockerfiles; a Modelfile has no variables",
    "CMD": "it is a directive of Dockerfiles; a Modelfile runs nothing",
    "COPY": "it is a directive of Dockerfiles; files are named with FROM, DRAFT, ADAPTER and PROJECTOR",
    "ENTRYPOINT": "it is a directive of Dockerfiles; a Modelfile runs nothing",
    "ENV": "it is a directive of Dockerfiles; settings of the model are written with PARAMETER",
    "RUN": "it is a directive of Dockerfiles; a Modelfile runs nothing",
}
"""Directive → what a Modelfile that has it is told."""
