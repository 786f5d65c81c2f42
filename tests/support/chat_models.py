"""A daemon with models that chat, call functions and think, for the clients of the HTTP gateway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.families import HERMES, THINKING
from tests.support.product import Product, installed
from tests.support.tiny_models import CHATML, make_scripted_llama, make_tiny_llama

#: What a model that never ends by itself needs minutes to fill.
ENDLESS_CTX = 1 << 18
CALL = '\n{"name": "weather", "arguments": {"city": "Rome"}}\n'

_SCRIPTS: dict[str, tuple[str, Sequence[str]]] = {
    "ending": (CHATML, [" one", " two", " three", " four"]),
    "caller": (HERMES, ["sure", "<tool_call>", CALL, "</tool_call>"]),
    "thinker": (THINKING, ["<think>", "\nmaybe", " yes\n", "</think>", "\n\nsure", " one"]),
}
_WORDS = (" one", " two", " three", " four")


@contextmanager
def chatting(folder: Path, home: Path) -> Iterator[Product]:
    """Run a daemon.

    Its models: `chat` of random weights, `endless` that is the same with room for minutes of talk,
    `random` that knows functions too, `ending` that says one to four,
    `caller` that says "sure" and calls `weather`, `thinker` that thinks "maybe yes" and says "sure one".
    """
    make_tiny_llama(folder / "chat.gguf", chat_template=CHATML, n_ctx=512)
    make_tiny_llama(folder / "endless.gguf", chat_template=CHATML, n_ctx=ENDLESS_CTX)
    make_tiny_llama(folder / "random.gguf", chat_template=HERMES, n_ctx=2048)
    for name, (template, script) in _SCRIPTS.items():
        texts = [piece for piece in script if piece not in _WORDS]
        make_scripted_llama(folder / f"{name}.gguf", script, chat_template=template, texts=texts, n_ctx=2048)
    with installed(home, LMD_HTTP_LISTEN="127.0.0.1:0") as product:
        product.start()
        for path in sorted(folder.glob("*.gguf")):
            product.lm("pull", str(path))
        yield product
