"""Whether a model can draft for another one: what can be told from the headers, before anything is loaded."""

from __future__ import annotations

import re
from itertools import zip_longest

from lmd.registry.capabilities import is_embedding
from lmd.registry.digest import Digest
from lmd.registry.errors import InvalidRequest
from lmd.registry.gguf import GgufHeader, iter_strings
from lmd.registry.model_store import ModelStore, Tag

TOKENS_KEY = "tokenizer.ggml.tokens"

# What converters fill a vocabulary up with to a round size. Siblings of one family, such as Qwen 2.5's, differ in it.
_PADDING = re.compile(rb"\[PAD\d+\]")
_COMPARED_IDS = ("bos", "eos")
_HINT = "draft with a smaller model of the same family, or leave DRAFT out"


def check_draft(
    store: ModelStore[Tag], target: GgufHeader, target_file: Digest, draft: GgufHeader, draft_file: Digest
) -> None:
    """Make sure that the tokens of two models are the same, and that both generate.

    Headers and files are those of the first shard, which has the metadata. Architectures may differ, and so may the
    number of `[PAD…]` tokens at the end, which nobody ever says.

    Raises:
        InvalidRequest: when the draft would be of no use.
    """
    for header, who in ((target, "the model"), (draft, "the draft")):
        if is_embedding(header):
            raise _refused(f"{who} only embeds (architecture `{header.architecture}`), so there is nothing to draft")
    if is_recurrent(draft):
        raise _refused(
            f"the draft is a recurrent model (architecture `{draft.architecture}`), which cannot take a token back"
        )
    _check_tokens(store, target_file, target.vocabulary_size, draft_file, draft.vocabulary_size)
    for name in _COMPARED_IDS:
        ids = target.special_tokens.get(name), draft.special_tokens.get(name)
        # A header without the id leaves it to the kind of tokenizer, which is then the same for both.
        if None not in ids and ids[0] != ids[1]:
            raise _refused(f"the {name.upper()} token of the draft is {ids[1]}, and that of the model {ids[0]}")


def is_recurrent(header: GgufHeader) -> bool:
    """Whether a model has a state that is overwritten by every token (Mamba, RWKV, and hybrids with them)."""
    return header.arch_number("ssm.state_size") > 0 or header.arch_number("wkv.head_size") > 0


def _check_tokens(
    store: ModelStore[Tag], target_file: Digest, target_size: int, draft_file: Digest, draft_size: int
) -> None:
    sizes = f"the draft has {draft_size} tokens and the model {target_size}"
    count = 0
    with store.open_blob(target_file) as ours, store.open_blob(draft_file) as theirs:
        pairs = zip_longest(
            iter_strings(ours, store.blob_size(target_file), TOKENS_KEY),
            iter_strings(theirs, store.blob_size(draft_file), TOKENS_KEY),
        )
        for token, (mine, its) in enumerate(pairs):
            count += 1
            if mine == its or (mine is None and _is_padding(its)) or (its is None and _is_padding(mine)):
                continue
            raise _refused(
                f"the vocabularies differ: {sizes}, and token {token} is {_shown(its)} in the draft and {_shown(mine)} "
                "in the model"
            )
    if not count:
        raise _refused(f"neither the draft nor the model has a list of tokens: {sizes}")


def _is_padding(token: bytes | None) -> bool:
    return token is not None and _PADDING.fullmatch(token) is not None


def _shown(token: bytes | None) -> str:
    """Write a token for a message: it may be any bytes of any length."""
    if token is None:
        return "missing"
    text = token[:40].decode(errors="backslashreplace")
    return "`" + "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text) + "`"


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="draft", hint=_HINT)
