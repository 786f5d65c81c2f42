"""Modelfiles with mistakes, and what is said about each: where, what, and what is legal."""

from __future__ import annotations

import pytest

from lmd.registry.errors import ModelfileSyntax
from lmd.registry.modelfile import parse_modelfile

Mistake = tuple[int, int, str]

#: Lists that messages end with, by what stands for them below.
LEGAL = {
    "<directives>": (
        "FROM, PARAMETER, TEMPLATE, SYSTEM, LICENSE, MESSAGE, DRAFT, ADAPTER, PROJECTOR, QUANTIZE, REQUIRES"
    ),
    "<quantizations>": (
        "F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1, Q4_0, IQ4_NL, "
        "IQ4_XS, Q3_K_L, Q3_K_M, Q3_K_S, IQ3_M, IQ3_S, IQ3_XS, IQ3_XXS, Q2_K, Q2_K_S, IQ2_M, IQ2_S, "
        "IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S, Q2_0, Q1_0, TQ2_0, TQ1_0, MXFP4_MOE"
    ),
    "<parameters>": (
        "num_ctx, num_batch, num_gpu, num_thread, use_mmap, kv_type, temperature, top_k, top_p, min_p, "
        "typical_p, repeat_last_n, repeat_penalty, presence_penalty, frequency_penalty, mirostat, mirostat_tau, "
        "mirostat_eta, seed, num_predict, stop, ignore_eos, xtc_probability, xtc_threshold, dry_multiplier, "
        "dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers, draft_num_predict, "
        "prompt_lookup, deterministic"
    ),
}

MISTAKES: list[tuple[str, list[Mistake]]] = [
    ("", [(1, 1, "there is no FROM; it names the model or the GGUF file to start from")]),
    ("# only a comment", [(1, 1, "there is no FROM; it names the model or the GGUF file to start from")]),
    ("SYSTEM x", [(1, 1, "there is no FROM; it names the model or the GGUF file to start from")]),
    ("DRAFT x", [(1, 1, "there is no FROM; it names the model or the GGUF file to start from")]),
    (
        "PARAMETER top_k 5\nADAPTER a.gguf",
        [(1, 1, "there is no FROM; it names the model or the GGUF file to start from")],
    ),
    ("FRM x", [(1, 1, "unknown directive `FRM` (did you mean FROM?); legal are <directives>")]),
    ("FROM x\nSYSTM y", [(2, 1, "unknown directive `SYSTM` (did you mean SYSTEM?); legal are <directives>")]),
    ("FROM x\n  zzz", [(2, 3, "unknown directive `zzz`; legal are <directives>")]),
    ("FROM x\nfrom_ y", [(2, 1, "unknown directive `from_` (did you mean FROM?); legal are <directives>")]),
    ('FROM x\n{"from": 1}', [(2, 1, 'unknown directive `{"from":` (did you mean FROM?); legal are <directives>')]),
    ("FROM x\n你好 y", [(2, 1, "unknown directive `你好`; legal are <directives>")]),
    ("FROM x\nFROM: y", [(2, 1, "unknown directive `FROM:` (did you mean FROM?); legal are <directives>")]),
    ("FROM x\n= y", [(2, 1, "unknown directive `=`; legal are <directives>")]),
    (
        'FROM x\nTOOLS """\nFROM y\nFRM z\n"""',
        [
            (
                2,
                1,
                (
                    "TOOLS cannot be used here: no version of Ollama up to 0.32 knows it; functions are sent "
                    "with each request, in `tools`"
                ),
            )
        ],
    ),
    (
        "FROM x\nRENDERER qwen3-coder",
        [
            (
                2,
                1,
                (
                    "RENDERER cannot be used here: Ollama 0.12 and later know it as the name of a prompt format "
                    "built into Ollama; leave it out to use the template of the GGUF file, or write TEMPLATE"
                ),
            )
        ],
    ),
    (
        "FROM x\nparser qwen3-coder",
        [
            (
                2,
                1,
                (
                    "PARSER cannot be used here: Ollama 0.12 and later know it as the name of a reader of "
                    "answers built into Ollama; leave it out: tool calls and thoughts are found by the template"
                ),
            )
        ],
    ),
    (
        "FROM x\nEMBED ./notes.txt",
        [
            (
                2,
                1,
                (
                    "EMBED cannot be used here: Ollama's first versions put a file's text into the model with "
                    "it; put the text into SYSTEM or MESSAGE"
                ),
            )
        ],
    ),
    (
        "FROM x\nPROMPT hi",
        [(2, 1, "PROMPT cannot be used here: Ollama's first versions had it; TEMPLATE took its place")],
    ),
    (
        "FROM x\nSTOP </s>",
        [(2, 1, ("STOP cannot be used here: texts that end an answer are a parameter: PARAMETER stop, then the text"))],
    ),
    (
        "FROM x\nRUN apt-get",
        [(2, 1, "RUN cannot be used here: it is a directive of Dockerfiles; a Modelfile runs nothing")],
    ),
    (
        "FROM x\nENV A=1",
        [
            (
                2,
                1,
                (
                    "ENV cannot be used here: it is a directive of Dockerfiles; settings of the model are "
                    "written with PARAMETER"
                ),
            )
        ],
    ),
    (
        "FROM x\nCOPY a b",
        [
            (
                2,
                1,
                (
                    "COPY cannot be used here: it is a directive of Dockerfiles; files are named with FROM, "
                    "DRAFT, ADAPTER and PROJECTOR"
                ),
            )
        ],
    ),
    (
        "FROM x\nINCLUDE y",
        [
            (
                2,
                1,
                (
                    "INCLUDE cannot be used here: no version of Ollama up to 0.32 knows it; a Modelfile builds "
                    "on another model with FROM"
                ),
            )
        ],
    ),
    ("FROM x\nCMD y", [(2, 1, "CMD cannot be used here: it is a directive of Dockerfiles; a Modelfile runs nothing")]),
    (
        "FROM x\nARG y",
        [(2, 1, "ARG cannot be used here: it is a directive of Dockerfiles; a Modelfile has no variables")],
    ),
    (
        "FROM x\nENTRYPOINT y",
        [(2, 1, "ENTRYPOINT cannot be used here: it is a directive of Dockerfiles; a Modelfile runs nothing")],
    ),
    ("FROM", [(1, 1, "FROM needs a value")]),
    ("FROM   ", [(1, 1, "FROM needs a value")]),
    ('FROM ""', [(1, 6, "FROM needs the name of a model or a file, on one line")]),
    ('FROM "a\nb"', [(1, 6, "FROM needs the name of a model or a file, on one line")]),
    ('FROM """a', [(1, 6, 'the text that begins here never ends; """ must end a line')]),
    ("FROM sha256:abc", [(1, 6, "`sha256:abc` is not a digest; a digest is `sha256:` and 64 lower-case hex digits")]),
    (
        "FROM sha256:" + "g" * 64,
        [(1, 6, "`sha256:" + "g" * 64 + "` is not a digest; a digest is `sha256:` and 64 lower-case hex digits")],
    ),
    ('FROM x\n"', [(2, 1, 'unknown directive `"`; legal are <directives>')]),
    ("FROM x\nDRAFT", [(2, 1, 'DRAFT needs a value; write "" for an empty one')]),
    ('FROM x\nDRAFT "a\nb"', [(2, 7, "DRAFT needs the name of a model or a file, on one line")]),
    (
        "FROM x\nDRAFT sha256:12",
        [(2, 7, "`sha256:12` is not a digest; a digest is `sha256:` and 64 lower-case hex digits")],
    ),
    ("FROM x\nADAPTER", [(2, 1, 'ADAPTER needs a value; write "" for an empty one')]),
    ('FROM x\nADAPTER "a\nb"', [(2, 9, "ADAPTER needs the path of a file, on one line")]),
    ('FROM x\nADAPTER "a', [(2, 9, 'the text that begins here never ends; " must end a line')]),
    (
        "FROM x\nADAPTER a.gguf much",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `much`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        "FROM x\nADAPTER a.gguf 101",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `101`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        "FROM x\nADAPTER a.gguf -1e9",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `-1e9`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        "FROM x\nADAPTER a.gguf nan",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `nan`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        "FROM x\nADAPTER a.gguf inf",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `inf`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        'FROM x\nADAPTER "a b" 0.5x',
        [
            (
                2,
                15,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `0.5x`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    ('FROM x\nADAPTER "" 0.5', [(2, 9, "ADAPTER needs the path of a file before the scale")]),
    (
        "FROM x\nADAPTER sha256:12 0.5",
        [(2, 9, "`sha256:12` is not a digest; a digest is `sha256:` and 64 lower-case hex digits")],
    ),
    ("FROM x\nADAPTER a.gguf\nADAPTER a.gguf 0.5", [(3, 9, "this adapter is named twice; give it one scale")]),
    (
        "FROM x\nADAPTER a.gguf 0,5",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `0,5`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    (
        "FROM x\nADAPTER a.gguf 50%",
        [
            (
                2,
                16,
                (
                    "the scale of an adapter must be a number from -100 to 100, not `50%`; 1 applies it as it "
                    "was trained"
                ),
            )
        ],
    ),
    ("FROM x\nPROJECTOR", [(2, 1, 'PROJECTOR needs a value; write "" for an empty one')]),
    ('FROM x\nPROJECTOR "a\nb"', [(2, 11, "PROJECTOR needs the path of a file, on one line")]),
    (
        "FROM x\nPROJECTOR a.gguf\nPROJECTOR b.gguf",
        [(3, 11, "a model has one projector at most; line 2 names it already")],
    ),
    (
        "FROM x\nPROJECTOR sha256:1",
        [(2, 11, "`sha256:1` is not a digest; a digest is `sha256:` and 64 lower-case hex digits")],
    ),
    ("FROM x\nQUANTIZE", [(2, 1, "QUANTIZE needs a value")]),
    ('FROM x\nQUANTIZE ""', [(2, 10, "an empty value is no quantization; legal are <quantizations>")]),
    (
        "FROM x\nQUANTIZE q4",
        [(2, 10, "`q4` is no quantization (did you mean Q4_1 or Q4_0?); legal are <quantizations>")],
    ),
    (
        "FROM x\nQUANTIZE Q4_K_X",
        [(2, 10, "`Q4_K_X` is no quantization (did you mean Q4_K_S or Q4_K_M?); legal are <quantizations>")],
    ),
    ("FROM x\nQUANTIZE 4", [(2, 10, "`4` is no quantization; legal are <quantizations>")]),
    (
        "FROM x\nQUANTIZE Q4_K_M Q8_0",
        [(2, 10, "`Q4_K_M Q8_0` is no quantization (did you mean Q4_K_M?); legal are <quantizations>")],
    ),
    ("FROM x\nREQUIRES", [(2, 1, "REQUIRES needs a value")]),
    ("FROM x\nREQUIRES latest", [(2, 10, "`latest` is no version; a version of Ollama looks like 0.14.0")]),
    ("FROM x\nREQUIRES >=0.14", [(2, 10, "`>=0.14` is no version; a version of Ollama looks like 0.14.0")]),
    ("FROM x\nREQUIRES 0.14.0.1", [(2, 10, "`0.14.0.1` is no version; a version of Ollama looks like 0.14.0")]),
    ('FROM x\nREQUIRES ""', [(2, 10, "an empty value is no version; a version of Ollama looks like 0.14.0")]),
    ("FROM x\nPARAMETER", [(2, 1, "PARAMETER needs a name and a value")]),
    ("FROM x\nPARAMETER top_k", [(2, 1, "PARAMETER needs a value")]),
    ("FROM x\nPARAMETER topk 4", [(2, 11, "unknown parameter `topk`; did you mean `top_k` or `stop`?")]),
    ("FROM x\nPARAMETER zzz 4", [(2, 11, "unknown parameter `zzz`; the parameters are <parameters>")]),
    ("FROM x\nPARAMETER top_k four", [(2, 17, "parameter `top_k` must be a whole number, at least 0, not 'four'")]),
    ("FROM x\nPARAMETER top_k 1.5", [(2, 17, "parameter `top_k` must be a whole number, at least 0, not '1.5'")]),
    ("FROM x\nPARAMETER top_k -1", [(2, 17, "parameter `top_k` must be a whole number, at least 0, not -1")]),
    ("FROM x\nPARAMETER top_p  1.5", [(2, 18, "parameter `top_p` must be a number from 0 to 1, not 1.5")]),
    ("FROM x\nPARAMETER temperature nan", [(2, 23, "parameter `temperature` must be a number from 0 to 100, not nan")]),
    (
        "FROM x\nPARAMETER temperature 1_0",
        [(2, 23, "parameter `temperature` must be a number from 0 to 100, not '1_0'")],
    ),
    ("FROM x\nPARAMETER num_ctx 0", [(2, 19, "parameter `num_ctx` must be a whole number, at least 8, not 0")]),
    (
        "FROM x\nPARAMETER num_ctx 99999999999",
        [(2, 19, "parameter `num_ctx` must be a whole number, at least 8 and at most 2147483647, not 99999999999")],
    ),
    ("FROM x\nPARAMETER use_mmap maybe", [(2, 20, "parameter `use_mmap` must be true or false, not 'maybe'")]),
    ('FROM x\nPARAMETER stop ""', [(2, 16, "parameter `stop` must be at most 1024 texts of 1 to 512 bytes, not ''")]),
    (
        "FROM x\nPARAMETER repeat_penalty 0",
        [(2, 26, "parameter `repeat_penalty` must be a number above 0, up to 10, not 0.0")],
    ),
    ("FROM x\nPARAMETER mirostat 3", [(2, 20, "parameter `mirostat` must be a whole number from 0 to 2, not 3")]),
    ("FROM x\nPARAMETER seed \u0661", [(2, 16, "parameter `seed` must be a whole number, at least -1, not '\\u0661'")]),
    ('FROM x\nPARAMETER top_k "4\n5"', [(2, 17, "parameter `top_k` must be a whole number, at least 0, not '4\\n5'")]),
    ("FROM x\nPARAMETER temperature=1 2", [(2, 11, "unknown parameter `temperature=1`; did you mean `temperature`?")]),
    (
        "FROM x\nPARAMETER stop " + "s" * 513,
        [
            (
                2,
                16,
                (
                    "parameter `stop` must be at most 1024 texts of 1 to 512 bytes, not "
                    "'sssssssssssssssssssssssssssssssssssssssssssssssssssssssssss…"
                ),
            )
        ],
    ),
    ("FROM x\nMESSAGE", [(2, 1, "MESSAGE needs a role and a text")]),
    ("FROM x\nMESSAGE user", [(2, 1, 'MESSAGE needs a value; write "" for an empty one')]),
    ("FROM x\nMESSAGE  robot hi", [(2, 10, "`robot` is not a role of a message; legal are system, user, assistant")]),
    ("FROM x\nMESSAGE tool {}", [(2, 9, "`tool` is not a role of a message; legal are system, user, assistant")]),
    ('FROM x\nMESSAGE user "hi', [(2, 14, 'the text that begins here never ends; " must end a line')]),
    ("FROM x\nSYSTEM", [(2, 1, 'SYSTEM needs a value; write "" for an empty one')]),
    ('FROM x\nSYSTEM "never ends', [(2, 8, 'the text that begins here never ends; " must end a line')]),
    ('FROM x\nSYSTEM """never\nends\n', [(2, 8, 'the text that begins here never ends; """ must end a line')]),
    ('FROM x\nSYSTEM """', [(2, 8, 'the text that begins here never ends; """ must end a line')]),
    ('FROM x\nSYSTEM """"', [(2, 8, 'the text that begins here never ends; """ must end a line')]),
    ('FROM x\nSYSTEM "a" b', [(2, 8, 'the text that begins here never ends; " must end a line')]),
    ("FROM x\nLICENSE", [(2, 1, 'LICENSE needs a value; write "" for an empty one')]),
    ('FROM x\nLICENSE """MIT', [(2, 9, 'the text that begins here never ends; """ must end a line')]),
    ("FROM x\nTEMPLATE", [(2, 1, 'TEMPLATE needs a value; write "" for an empty one')]),
    ('FROM x\nTEMPLATE """{{ a }}', [(2, 10, 'the text that begins here never ends; """ must end a line')]),
    ("FROM x\x00", [(1, 7, "U+0000 does not occur in text; a Modelfile is UTF-8, or UTF-16 with a byte order mark")]),
    (
        "FROM x\nSYSTEM a\ud800b",
        [(2, 9, "U+D800 does not occur in text; a Modelfile is UTF-8, or UTF-16 with a byte order mark")],
    ),
    (
        "FROM x\nSYSTEM \x00",
        [
            (2, 1, 'SYSTEM needs a value; write "" for an empty one'),
            (2, 8, "U+0000 does not occur in text; a Modelfile is UTF-8, or UTF-16 with a byte order mark"),
        ],
    ),
    (
        "FRM x\nPARAMETER top_k x\nFROM y\nMESSAGE me hi\nSYSTEM",
        [
            (1, 1, "unknown directive `FRM` (did you mean FROM?); legal are <directives>"),
            (2, 17, "parameter `top_k` must be a whole number, at least 0, not 'x'"),
            (4, 9, "`me` is not a role of a message; legal are system, user, assistant"),
            (5, 1, 'SYSTEM needs a value; write "" for an empty one'),
        ],
    ),
]


@pytest.mark.parametrize(("text", "mistakes"), MISTAKES)
def test_mistakes(text: str, mistakes: list[Mistake]) -> None:
    with pytest.raises(ModelfileSyntax) as caught:
        parse_modelfile(text)
    assert [(found.line, found.column, found.message) for found in caught.value.problems] == [
        (line, column, expanded(message)) for line, column, message in mistakes
    ]


def expanded(message: str) -> str:
    for short, legal in LEGAL.items():
        message = message.replace(short, legal)
    return message
