"""The template language of Ollama's Modelfiles: Go's text/template, as far as prompts need it.

`lexer` and `parser` turn text into `nodes`, in time and depth that are bounded by the text; `identifiers` says what a
template uses. They run where a Modelfile is read. `execute` and what it builds on (`values`, `printing`, `functions`)
run templates, in bounded steps and bytes, and belong in the render process alone.

Source: the documentation of Go's text/template, and differential runs against Go 1.19's implementation of it; range
over a number and `else with` are those of Go 1.24.
"""
