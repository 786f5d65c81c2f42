"""What a saved KV cache spares after a restart of the daemon: ours against ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from bench.answers import Answer, check
from bench.meter import settle
from bench.our_server import OurServer
from bench.prompts import prompt, words

CONVERSATION_TOKENS = 2000
LIMIT = 0.15
_ANSWER_TOKENS = 16


def restart(model: Path, *, rounds: int, threads: int, settings: Mapping[str, str]) -> dict[str, object]:
    """Return how long the next turn of a conversation takes to begin after a restart, and one as long that is new.

    The daemon is stopped as the system stops it, and the model is loaded again before the clock starts: what is
    compared is reading a conversation with finding it.
    """
    resumed: list[Answer] = []
    read: list[Answer] = []
    with OurServer(model, slots=2, num_ctx=4096, threads=threads, settings=settings) as server:
        for number in range(rounds):
            conversation = prompt(CONVERSATION_TOKENS, "conversation", number)
            check(server, server.ask(conversation, _ANSWER_TOKENS), _ANSWER_TOKENS)
            server.stop()
            server.start()
            server.load()
            settle(server.pids)
            turn = words(16, "turn", number)
            resumed.append(server.ask(f"{conversation} {turn}", _ANSWER_TOKENS))
            read.append(server.ask(f"{prompt(CONVERSATION_TOKENS, 'new', number)} {turn}", _ANSWER_TOKENS))
    for answer in (*resumed, *read):
        check(server, answer, _ANSWER_TOKENS)
    ours, theirs = (statistics.median(answer.first_token_s for answer in side) for side in (resumed, read))
    return {
        "resumed_ttft_s": ours,
        "read_ttft_s": theirs,
        "ratio": ours / theirs,
        "met": ours / theirs <= LIMIT,
        "prompt_tokens": [answer.prompt_tokens for answer in resumed],
        "cached_tokens": [answer.cached_tokens for answer in resumed],
        "resumed_s": [answer.first_token_s for answer in resumed],
        "read_s": [answer.first_token_s for answer in read],
    }
