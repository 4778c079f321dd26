"""Masks from rendered prefixes against those of TRL's patched templates, which mark what to learn.

TRL ships its templates of public models twice, the second time with ``{% generation %}``
around what the assistant writes, from which transformers makes a mask. The two ways know
nothing of each other, and may differ in three things only:

- TRL learns the line end behind an end of turn, which nothing that is generated contains;
- it learns all that a template writes for the assistant, also where the generation prompt
  has already written it ("<think>");
- transformers' mask has holes in characters of several tokens.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken

from loraformat.train.data.encode import RowEncoder
from loraformat.train.data.row import Row
from loraformat.train.data.row_formats import KindError
from loraformat.train.data.tokenizer import TextEncoder
from tests.train.data.tokenizers_and_templates import byte_level

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted(
        Path(find_spec("trl").submodule_search_locations[0], "chat_templates").glob("*.jinja")
    )
}
MARKED = [name for name in TEMPLATES if name.endswith("_training")]
#: They begin an answer with "<think>" and write one without it.
NOT_AS_ASKED = re.compile("deepseek|nemotron")
#: What is said is a list of parts there; transformers' mask wants it so as well.
PARTS = re.compile("idefics|smolvlm|llava")
#: They write the last turn otherwise than earlier ones: one sample per turn.
REWRITES = re.compile("gptoss")
#: Says today's date, which is one day for us.
DATED = re.compile("muse")

SAID = ("two plus two?", "It is four.", "It is four.", "Yes: vier 😀")
MESSAGES = [
    {"role": role, "content": text}
    for role, text in zip(("user", "assistant") * 2, SAID, strict=True)
]


def tokenizer_for(template):
    tokenizer = byte_level()
    special = set(re.findall(r"<[|｜]?[\w▁|.-]+[|｜]?>|\[/?[A-Z_]+\]", template))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True)
            for token in sorted(special)
            if "think" not in token and "tool" not in token.lower()
        ],
        special_tokens=True,
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer):
    encoder = RowEncoder(TextEncoder(tokenizer, "test"), everything=False, longest_piece=4096)
    return list(encoder.encode(Row({"messages": MESSAGES})))


def test_there_are_templates_to_compare():
    assert len(TEMPLATES) > 50 and len(MARKED) > 25


@pytest.mark.parametrize("name", MARKED)
def test_mask(name):
    tokenizer = tokenizer_for(TEMPLATES[name])
    if NOT_AS_ASKED.search(name):
        with pytest.raises(KindError, match="the chat template asks for it with"):
            encode(tokenizer)
        return
    samples = encode(tokenizer)
    if REWRITES.search(name):
        assert len(samples) == 2
        return
    (sample,) = samples
    said = [
        m | {"content": [{"type": "text", "text": m["content"]}]} if PARTS.search(name) else m
        for m in MESSAGES
    ]
    marked = tokenizer.apply_chat_template(
        said, return_dict=True, return_assistant_tokens_mask=True
    )
    if not DATED.search(name):
        assert sample.ids == marked["input_ids"]
        assert_near(tokenizer, sample, marked["assistant_masks"], said)
    learned = "".join(t for t, yes in zip(sample.shown, sample.learned, strict=True) if yes)
    assert SAID[1] in learned and SAID[3] in learned and SAID[0] not in learned


def assert_near(tokenizer, sample, theirs, said):
    asked = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
    run = ""
    for shown, ours, their in zip(
        [*sample.shown, ""], [*sample.learned, False], [*theirs, 0], strict=True
    ):
        if ours and not their:
            assert not shown.isascii() or shown == ""
        if their and not ours:
            run += shown
        elif run and shown:
            assert run.isspace() or asked.endswith(run), run
            run = ""


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not NOT_AS_ASKED.search(name)])
def test_every_public_template_learns_all_answers_and_no_question(name):
    samples = encode(tokenizer_for(TEMPLATES[name]))
    learned = [
        "".join(t for t, yes in zip(one.shown, one.learned, strict=True) if yes) for one in samples
    ]
    assert "".join(learned).count(SAID[1]) == 1
    assert "".join(learned).count(SAID[3]) == 1
    assert SAID[0] not in "".join(learned)
    assert all(one.ends for one in samples) or name == "glm4moe"  # ends with the next turn's role
