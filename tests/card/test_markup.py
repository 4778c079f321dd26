"""Nothing in a stranger's text becomes Markdown, HTML or YAML."""

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.card.front_matter import compose, licence_of, merge, split
from loraformat.card.markup import code, fence, json_block, plain
from loraformat.errors import InputError

#: PyYAML itself does not bring these line breaks back; they come back as spaces.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"))
HOSTILE = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![](https://evil.example/pixel.png)",
    "a | b\n| --- |",
    "x\n\n# Heading",
    "---\nlicense: mit\n---",
    "`code` ``more``",
    "</details>",
    "line\u2028separator",
    "right\u202eto left",
    "zero\u200bwidth",
    "\x1b[31mred",
    "{{ jinja }} $math$ :emoji: @person #1",
    "&lt;entity&gt; &#60;",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("function", [plain, code])
def test_inline(function, text):
    shown = function(text)
    assert "\n" not in shown
    bare = re.sub(r"\\.", "", re.sub(r"^`[\w ]+`$", "", shown))
    assert not re.search(r"[<>\[\]|`#!$@]", bare)
    assert not re.search(r"&(?!amp;|lt;|gt;)", bare)
    assert not any(ord(c) < 32 or c in "\u2028\u202e\u200b" for c in shown)


@settings(max_examples=60)
@given(st.text())
def test_any_text_is_one_tame_line(text):
    for shown in (plain(text), code(text)):
        assert len(shown.splitlines()) <= 1
        assert "<" not in shown
        assert not re.search(r"(?<!\\)(\\\\)*[|]", shown)


def test_names_are_code():
    assert code("model.layers.0/q_proj") == "`model.layers.0/q_proj`"
    assert code(" padded") == "`padded`"


@settings(max_examples=60)
@given(st.text(alphabet="`a\n~"))
def test_a_fence_is_not_closed_from_inside(text):
    marks, *inside, end = fence(text).split("\n")
    assert marks == end
    assert not any(line.startswith(marks) for line in inside)


@settings(max_examples=60)
@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner)))
def test_json_is_ascii_and_comes_back(value):
    block = json_block(value)
    assert block.isascii()
    assert json.loads("\n".join(block.split("\n")[1:-1])) == value


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(["license", "language", "x"]), WORDS, min_size=1))
def test_front_matter_is_data(fields):
    """Also when it holds the dashes that end it, quotes, anchors, or control characters."""
    text = compose(fields)
    try:
        again = yaml.safe_load(text.split("---\n", 1)[1].rsplit("---\n", 1)[0])
    except yaml.reader.ReaderError:
        pytest.fail("not YAML")
    assert again == fields
    found, body = split(text + "# Title\n")
    assert (found, body) == (fields, "# Title\n")


@pytest.mark.parametrize(
    "front",
    [
        "a: [",
        "- a\n- b",
        "a: &x [1]\nb: *x",
        "1: 2",
        "!!python/object/apply:os.system ['true']",
        "x: " + "[" * 5000,
        "x: " + "[{" * 5000,
        "x" * 70_000 + ": 1",
        "a: \x00",
        "date: 2020-99-99",
    ],
)
def test_front_matter_that_is_none(front):
    with pytest.raises(InputError, match="front matter"):
        split(f"---\n{front}\n---\n# X\n")


def test_no_front_matter():
    assert split("# X\n") == ({}, "# X\n")
    assert split("---\n---\n# X\n") == ({}, "# X\n")
    assert split("\ufeff---\r\nlicense: mit\r\n---\r\nX") == ({"license": "mit"}, "X")


def test_what_people_wrote_wins_but_facts():
    written = {"license": "mit", "base_model": "/home/me/x", "tags": ["mine"], "language": "de"}
    ours = {"license": "other", "license_name": "n", "base_model": "org/base", "tags": ["lora"]}
    merged = merge(written, ours, facts={"base_model"})
    assert merged == {
        "license": "mit", "base_model": "org/base", "tags": ["mine", "lora"], "language": "de",
    }  # fmt: skip


def test_licence():
    assert licence_of({"license": ["mit"]}) is None
    found = licence_of({"license": "other", "license_name": "llama", "license_link": 3})
    assert (found.identifier, found.name, found.link) == ("other", "llama", None)
