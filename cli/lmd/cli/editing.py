"""Editing a model's Modelfile, with another try after mistakes."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmd.cli.context import App, note
from lmd.cli.editor import editor_from, run_editor
from lmd.cli.errors import UNREACHABLE, ClientError, show_error
from lmd.cli.terminal import is_terminal

if TYPE_CHECKING:
    from lmd.v1 import model_pb2


def edit(app: App, name: str) -> tuple[model_pb2.Model, model_pb2.Model]:
    """Have the user edit a model's Modelfile, and make what comes of it; return the model before and after.

    The text lies in a directory of its own that only the user can enter. It goes when all is well; otherwise an error
    says where it is, so that no work is lost.

    Raises:
        ClientError: there is no such model, the editor fails, what it left is no Modelfile and there is nobody to go
            on editing, or the model was changed meanwhile.
    """
    from lmd.v1 import model_service_pb2 as pb

    editor = editor_from(os.environ)
    with app.daemon() as client:
        info = client.call(client.models.GetModel, pb.GetModelRequest(name=name)).info
    directory = Path(tempfile.mkdtemp(prefix="lm-edit-"))
    path = directory / f"{re.sub('[^a-z0-9._-]', '-', info.model.name.lower()).lstrip('.-')[-100:]}.modelfile"
    keep = False
    try:
        path.touch(mode=0o600)
        path.write_text(info.modelfile, encoding="utf-8")
        try:
            return info.model, _edit(app, info, editor, path)
        except BaseException:
            keep = _worth_keeping(path, info.modelfile)
            raise
    finally:
        if keep:
            note(f"your text is kept in {path}")
        else:
            _remove(directory)


def _edit(app: App, info: model_pb2.ModelInfo, editor: str, path: Path) -> model_pb2.Model:
    from lmd.cli.modelfiles import read_modelfile

    while True:
        run_editor(editor, path)
        try:
            text = read_modelfile(str(path))
            if text == info.modelfile or not text.strip():
                return info.model
            return _make(app, info.model, text, path)
        except ClientError as error:
            # What another try cannot mend, or nobody would see, ends it here.
            hopeless = error.reason in (UNREACHABLE, "TAG_CHANGED")
            if hopeless or not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
                raise
            show_error(error)
            if not click.confirm("edit again?", default=True, err=True):
                raise _GaveUp() from None


def _make(app: App, before: model_pb2.Model, text: str, path: Path) -> model_pb2.Model:
    from lmd.cli.commands.create import create_model
    from lmd.cli.pulling import token_from_environment
    from lmd.v1 import model_service_pb2 as pb

    request = pb.CreateModelRequest(
        name=before.name, modelfile=text, edited_digest=before.digest, token=token_from_environment()
    )
    with app.daemon() as client:
        return create_model(client, request, Path.cwd(), path.name)


class _GaveUp(ClientError):
    """Raised when the user leaves the mistakes in."""

    def __init__(self) -> None:
        super().__init__("the model is as it was", reason="EDIT_GIVEN_UP")


def _worth_keeping(path: Path, original: str) -> bool:
    """Return whether the file has something that was not there before, even if it is no text."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return bool(data.strip()) and data != original.encode()


def _remove(directory: Path) -> None:
    """Remove the directory with what an editor may have put beside the text, such as a backup."""
    with suppress(OSError):
        for left in directory.iterdir():
            left.unlink()
        directory.rmdir()
