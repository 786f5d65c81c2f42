"""What can be wrong with a template.

TemplateError
├── TemplateSyntax      it does not compile
└── TemplateFailure     it compiles, and fails on what it was given
    └── TemplateTooMuch     it takes more steps, or makes more text, than it may
"""

from __future__ import annotations


class TemplateError(Exception):
    """Something is wrong at a place of a template.

    Attributes:
        message: what is wrong, in one sentence.
        line: counted from 1.
        column: in characters, counted from 1.
    """

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.message = message
        self.line = line
        self.column = column


class TemplateSyntax(TemplateError):
    """Raised when a template does not compile."""


class TemplateFailure(TemplateError):
    """Raised when a template fails on what it was given."""


class TemplateTooMuch(TemplateFailure):
    """Raised when a template takes more steps, or makes more text, than it may."""


def position(text: str, offset: int) -> tuple[int, int]:
    """Return the line and the column of a character, both counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
