"""Renders chats with Go templates, as Ollama does.

A template that reads `.Messages` goes through the turns itself. One that does not is older: it renders one exchange
(`.System`, `.Prompt`, `.Response`), and is run for each in turn; what it writes after the response is left out of the
last, because the model's answer goes there. A template that reads neither `.Messages` nor `.Response` ends with the
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmd.gotemplate.execute import MAX_STEPS, execute
from lmd.gotemplate.nodes import Action, Branch, Command, Field, Node, Pipeline, Range, Template
from lmd.gotemplate.parser import parse
from lmd.gotemplate.survey import pipeline_names, used_names
from lmd.gotemplate.values import Budget, Value
from lmd.runner.go_values import message_values, system_text, thinking_values, tool_values
from lmd.runner.v1 import frames_pb2


class GoRenderer:
    """A parsed Go template, which renders chats."""

    def __init__(self, source: str, *, max_bytes: int, max_steps: int = MAX_STEPS) -> None:
        """Parse it. Raises: TemplateSyntax."""
        template = parse(source)
        names = frozenset(used_names(template))
        self._by_turns = "Messages" in names
        if not self._by_turns and "Response" not in names:
            template = replace(template, body=(*template.body, _response()))
        self._template = template
        self._last = _cut(template)
        self._max_bytes = max_bytes
        self._max_steps = max_steps

    def render_chat(self, chat: frames_pb2.Chat) -> str:
        """Return the prompt for a chat.

        Raises:
            TemplateFailure: the template fails, or takes or makes more than it may.
        """
        budget = Budget(self._max_steps, self._max_bytes)
        think = thinking_values(chat)
        if chat.suffix:
            prompt = "".join(turn.content for turn in chat.messages if turn.role != "system")
            values = {"Prompt": prompt, "Suffix": chat.suffix, "Response": "", **think}
            return execute(self._template, values, budget)
        if self._by_turns:
            values = {
                "System": system_text(chat.messages),
                "Messages": message_values(chat.messages),
                "Tools": tool_values(chat),
                "Response": "",
                **think,
            }
            return execute(self._template, values, budget)
        *earlier, last = _exchanges(chat.messages)
        parts = [execute(self._template, exchange.values() | think, budget) for exchange in earlier]
        parts.append(execute(self._last, last.values() | think, budget))
        return "".join(parts)


@dataclass(slots=True)
class _Exchange:
    """What a template of one exchange is given."""

    system: str = ""
    prompt: str = ""
    response: str = ""

    def values(self) -> dict[str, Value]:
        return {"System": self.system, "Prompt": self.prompt, "Response": self.response}


def _exchanges(turns: Sequence[frames_pb2.ChatMessage]) -> list[_Exchange]:
    """Return the exchanges of a chat; there is one at least."""
    exchanges = [_Exchange()]
    for role, content in _joined(turns):
        current = exchanges[-1]
        if (role == "system" and (current.prompt or current.response)) or (role == "user" and current.response):
            exchanges.append(current := _Exchange())
        if role == "system":
            current.system = content
        elif role == "user":
            current.prompt = content
        elif role == "assistant":
            current.response = content
    return exchanges


def _joined(turns: Sequence[frames_pb2.ChatMessage]) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for turn in turns:
        if joined and joined[-1][0] == turn.role != "tool":
            joined[-1] = (turn.role, f"{joined[-1][1]}\n\n{turn.content}")
        else:
            joined.append((turn.role, turn.content))
    return joined


def _response() -> Action:
    return Action(Pipeline((), False, (Command((Field(("Response",), 0),), 0),), 0))


def _cut(template: Template) -> Template:
    """Return the template without all that follows the first action that reads `.Response`."""
    body, _ = _before_response(template.body)
    return replace(template, body=body)


def _before_response(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Branch | Range):
            # Whichever of the two is taken: what follows them follows the response.
            body, in_body = _before_response(node.body)
            otherwise, in_other = _before_response(node.otherwise)
            kept.append(replace(node, body=body, otherwise=otherwise))
            if in_body or in_other:
                return tuple(kept), True
            continue
        kept.append(node)
        if isinstance(node, Action) and "Response" in pipeline_names(node.pipeline):
            return tuple(kept), True
    return tuple(kept), False
