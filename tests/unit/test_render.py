"""Chat templates render as the Hub's are meant to, and hostile ones cost their own request and nothing else."""

from __future__ import annotations

import datetime
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pytest

from lmd.runner.render import PromptTooLong, Renderer, describe_error
from lmd.runner.templates import Rendered, TemplateClient, TemplateSetup
from lmd.runner.v1 import frames_pb2
from tests.support.tiny_models import CHATML

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&</b>"}]


def render(template: str, messages: list[dict[str, str]] | None = None, *, max_bytes: int = 10_000) -> str:
    renderer = Renderer(template, bos_token="<s>", eos_token="</s>", max_bytes=max_bytes)
    turns = TURNS if messages is None else messages
    return renderer.render({"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True})


def test_chatml() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>&</b><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[1]['content'] }}{{ eos_token }}", "<s>Hi <b>&</b></s>"),
        # Blocks on lines of their own leave no blank lines.
        ("{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "system!"),
        ("{{ 'yes' if tools is none else 'no' }}", "yes"),
        ("{% if undefined_thing is defined %}a{% else %}b{% endif %}", "b"),
        ("{{ messages[0].content is string }}", "True"),
        ("{% macro turn(m) %}[{{ m.role }}]{% endmacro %}{{ turn(messages[0]) }}", "[system]"),
        ("{{ messages[1].content.split(' ')[0].strip() }}", "Hi"),
    ],
)
def test_what_templates_use(template: str, expected: str) -> None:
    assert render(template) == expected


def test_todays_date() -> None:
    before = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
    assert render("{{ strftime_now('%Y-%m-%d') }}") >= before


def test_a_template_says_what_it_does_not_like() -> None:
    with pytest.raises(jinja2.TemplateError, match="no system role") as caught:
        render("{{ raise_exception('no system role') }}")
    assert describe_error(caught.value) == "no system role"


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError) as caught:
        render("line one\n{% if %}")
    assert describe_error(caught.value).startswith("line 2: ")


def test_errors_are_one_short_line() -> None:
    assert describe_error(ValueError("a\nb\x1b[31m" + "x" * 1000)) == ("ValueError: a b [31m" + "x" * 1000)[:300]


def test_output_is_capped() -> None:
    assert len(render("{% for i in range(10) %}0123456789{% endfor %}", max_bytes=100)) == 100
    with pytest.raises(PromptTooLong):
        render("{% for i in range(10) %}0123456789{% endfor %}", max_bytes=99)
    with pytest.raises(PromptTooLong):
        render("éé", max_bytes=3)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ '%s' | attr('__class__') }}{{ ('' | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{m.__class__}'.format_map({'m': ''}) }}",
    "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (range.__self__ or 1).__import__('os') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_escapes_are_blocked(template: str) -> None:
    """Whatever does come out shows nothing of Python: an undefined value renders as nothing."""
    try:
        text = render(template)
    except (jinja2.TemplateError, TypeError, AttributeError, LookupError):
        return
    assert "class" not in text
    assert "module" not in text
    assert "root:" not in text
    assert "uid=" not in text


@pytest.mark.parametrize(
    "template",
    ["{% set _ = messages.append(1) %}", "{% set _ = messages[0].update({'a': 1}) %}", "{% do messages.clear() %}"],
)
def test_messages_cannot_be_changed(template: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        render(template)


# The client and its child


class Client:
    """A client with its answers; waits as the engine does."""

    def __init__(self, template: str, *, timeout_s: float = 1.0, max_bytes: int = 100_000) -> None:
        setup = TemplateSetup(template, "<s>", "</s>", max_bytes=max_bytes, timeout_s=timeout_s)
        self.client = TemplateClient(setup)
        self.answers: dict[int, Rendered] = {}

    def submit(self, request_id: int, content: str = "hi") -> None:
        chat = frames_pb2.Chat(messages=[frames_pb2.ChatMessage(role="user", content=content)])
        self.client.submit(request_id, chat.SerializeToString())

    def advance(self) -> None:
        self.answers.update((rendered.request_id, rendered) for rendered in self.client.advance())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 40
        self.advance()
        while not condition():
            assert time.monotonic() < deadline
            fileno, due = self.client.fileno(), self.client.deadline
            wait_s = None if due is None else max(0.0, due - time.monotonic())
            watched = [] if fileno is None else [fileno]
            select.select(watched, watched if self.client.has_unsent else [], [], wait_s)
            self.advance()

    def answer(self, request_id: int) -> Rendered:
        self.until(lambda: request_id in self.answers)
        return self.answers[request_id]


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(template: str, *, timeout_s: float = 20.0, max_bytes: int = 100_000) -> Client:
        made.append(Client(template, timeout_s=timeout_s, max_bytes=max_bytes))
        return made[-1]

    yield make
    for client in made:
        client.client.close()


def test_the_child_starts_at_the_first_request_and_stays(make_client: Callable[..., Client]) -> None:
    client = make_client(CHATML)
    client.advance()
    assert client.client.fileno() is None
    for request_id in range(3):
        client.submit(request_id, f"turn {request_id}")
    for request_id in range(3):
        expected = f"<|im_start|>user\nturn {request_id}<|im_end|>\n<|im_start|>assistant\n"
        assert client.answer(request_id) == Rendered(request_id, expected.encode(), "")
    assert client.client.generation == 1
    assert client.client.pending == 0
    assert client.client.deadline is None


def test_a_large_conversation_passes_in_both_directions(make_client: Callable[..., Client]) -> None:
    client = make_client("{{ messages[0].content }}", max_bytes=8 << 20)
    client.submit(1, "x" * (4 << 20))
    assert len(client.answer(1).prompt) == 4 << 20


BOMBS = {
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** (8 + messages | length)) }}",
    "memory": "{% set ns = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padding": "{{ 'x'.center(10 ** 12) }}",
    "a list": "{{ ([0] * 10 ** 11) | length }}",
    "output": "{% for a in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "range": "{{ range(10 ** 12) | list | length }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_end_and_others_are_served(make_client: Callable[..., Client], bomb: str) -> None:
    template = "{% if messages[0].content == 'boom' %}" + bomb + "{% endif %}{{ messages[0].content }}"
    client = make_client(template, timeout_s=2.0)
    client.submit(1, "before")
    client.submit(2, "boom")
    client.submit(3, "after")
    assert client.answer(1).prompt == b"before"
    assert client.answer(2).error
    assert client.answer(3).prompt == b"after"


def test_a_template_that_dies_with_its_process_is_reported(make_client: Callable[..., Client]) -> None:
    client = make_client("{{ messages[0].content }}")
    client.submit(1)
    client.answer(1)
    (child,) = children()
    client.submit(2)
    os.kill(child, 9)
    assert "died" in client.answer(2).error
    client.submit(3)
    assert client.answer(3).prompt == b"hi"


def test_a_template_that_does_not_compile_is_not_tried_again(make_client: Callable[..., Client]) -> None:
    client = make_client("{% if %}")
    client.submit(1)
    client.submit(2)
    assert client.answer(1).error.startswith("line 1: ")
    assert client.answer(2).error == client.answer(1).error
    client.submit(3)
    assert client.answer(3).error == client.answer(1).error
    assert client.client.generation == 1


def test_a_bomb_that_goes_off_while_compiling_is_ended(make_client: Callable[..., Client]) -> None:
    # Constants are computed by the compiler.
    client = make_client("{{ 9 ** (9 ** 9) }}", timeout_s=1.0)
    client.submit(1)
    assert client.answer(1).error == "it takes longer than 1 s"
    client.submit(2)
    assert client.answer(2).error == "it takes longer than 1 s"
    assert client.client.generation == 1


def test_cancelled_requests_are_not_answered(make_client: Callable[..., Client]) -> None:
    client = make_client("{{ messages[0].content }}")
    for request_id in (1, 2, 3):
        client.submit(request_id)
    assert client.client.cancel(2)
    assert not client.client.cancel(9)
    assert client.client.pending == 2
    client.answer(3)
    assert sorted(client.answers) == [1, 3]


def test_the_child_has_little_to_work_with(make_client: Callable[..., Client]) -> None:
    client = make_client("{{ messages[0].content }}")
    client.submit(1)
    client.answer(1)
    (child,) = children()
    limits = Path(f"/proc/{child}/limits").read_text()
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert int(rows["Max address space"]) < 2 << 30
    assert rows["Max file size"] == "0"
    assert rows["Max core file size"] == "0"
    assert rows["Max processes"] == "0"
    assert int(rows["Max open files"]) <= 16
    assert "NoNewPrivs:\t1" in Path(f"/proc/{child}/status").read_text()


def children() -> list[int]:
    """Return this process's children that are render processes."""
    pids = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in pids if b"lmd.runner.render" in Path(f"/proc/{pid}/cmdline").read_bytes()]
