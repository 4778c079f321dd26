"""Turns that end with a text of several tokens: `generate` stops there, too."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from loraformat.train.data.tokenizer import open_tokenizer
from loraformat.train.run.text_generation import TextStream, turn_end

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}### Q: {{ m.content }}\n"
    "{% else %}{{ m.content }}END{% endif %}{% endfor %}"
)


@pytest.fixture
def model(place, tmp_path):
    """Return a function: a model whose answers end so, by its chat template."""

    def make(end, template=TEMPLATE):
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(place / "dense", path)
        (path / "chat_template.jinja").write_text(template.replace("END", end))
        return path

    return make


def answer(run, path):
    words = ["--chat", "--prompt", "lamp", "--temperature", 0, "--max-tokens", 40, "--json"]
    result = run("generate", path, *words)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_generate_stops_there_and_shows_nothing_of_it(run, model):
    whole = answer(run, model("zzz-zzz"))
    text = whole["text"]
    assert whole["tokens"] == 40 and len(text) > 30
    begin = next(n for n in range(8, len(text)) if not text[n].isspace())
    end = text[begin : begin + 9].rstrip()
    stopped = answer(run, model(end))
    assert stopped["text"] == text.partition(end)[0]
    assert stopped["tokens"] < whole["tokens"]


@pytest.mark.parametrize(
    ("end", "found"),
    [
        ("</turn>\n", "</turn>"),
        ("\n", "### Q:"),  # an answer may have lines
        ("<|eos|>", None),  # a token, at which it stops already
        ("<|eos|>\n", None),
        ("<|pad|>\n", "<|pad|>"),  # at which it does not
    ],
)
def test_what_ends_a_turn(model, end, found):
    path = model(end)
    stops = [AutoTokenizer.from_pretrained(path).eos_token_id]
    assert turn_end(open_tokenizer(path), stops) == found


def test_a_template_of_another_form_ends_nothing(model):
    odd = "{% for m in messages %}{{ loop.index }}{{ m.content }}END{% endfor %}"
    assert turn_end(open_tokenizer(model("</t>", odd)), []) is None


class _Letters:
    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("text", ["one</t>two", "one</", "</t>", "a<b</tx</t></t>", "plain", ""])
def test_a_stream_tells_no_part_of_the_end(text):
    import torch

    told = []
    stream = TextStream(_Letters(), told.append, "</t>")
    stream.put(torch.tensor([1]))  # the prompt
    for letter in text:
        stream.put(torch.tensor([ord(letter)]))
        assert "</t" not in "".join(told) or "</tx" in "".join(told)
    stream.end()
    assert "".join(told) == stream.text() == text.partition("</t>")[0]
