"""The pieces of a chat template, and what Ollama's language makes of them: the same text.

Ollama is no part of the tests. What of Go's template language is used is read here by a few lines:
``{{ if .System }}``, ``{{ end }}``, the three words, and a quoted text.
"""

import dataclasses
import re

import pytest

from loraformat.runtimes.chat import Chat, ChatFormat, chat_of
from loraformat.runtimes.modelfile import ollama
from loraformat.runtimes.use import Use
from loraformat.train.data.chat import ChatRenderer
from loraformat.train.data.tokenizer import TextEncoder
from tests.train.data.test_masks_against_trl import TEMPLATES as PUBLIC
from tests.train.data.test_masks_against_trl import tokenizer_for
from tests.train.data.tokenizers_and_templates import TEMPLATES

#: First turns of its own, an answer begun otherwise than asked for, or nothing of what is said.
WITHOUT = {"prefilled"}


def as_go_writes(template, **words):
    """Execute a template as Go's text/template does, as far as it is used here."""
    written, hidden = [], False
    for piece in re.split(r"(\{\{.*?\}\})", template.replace('{{ "{{" }}', "\0")):
        action = piece[2:-2].strip() if piece.startswith("{{") else None
        if action is None:
            written.append("" if hidden else piece.replace("\0", "{{"))
        elif action == "if .System":
            hidden = not words.get("System")
        elif action == "end":
            hidden = False
        else:
            assert action in (".System", ".Prompt", ".Response"), action
            written.append("" if hidden else words.get(action[1:], ""))
    return "".join(written)


def conversation(template, turns, system=""):
    """Write a conversation as Ollama does: turn after turn, the last up to its answer."""
    said = ""
    for place, (asked, answered) in enumerate(turns):
        words = {"System": system if place == 0 else "", "Prompt": asked}
        if answered is None:
            said += as_go_writes(template[: template.index("{{ .Response }}")], **words)
        else:
            said += as_go_writes(template, Response=answered, **words)
    return said


def format_of(tokenizer):
    return ChatRenderer(TextEncoder(tokenizer, "test")).format()


def hf_writes(tokenizer, turns, system=""):
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages.append({"role": "user", "content": asked})
        if answered is not None:
            messages.append({"role": "assistant", "content": answered})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token)


TURNS = [("Hi there", "Hello"), ("So {{what}}?", None)]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in WITHOUT])
def test_ollama_writes_what_the_template_writes(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    found = format_of(tokenizer)
    template = found.ollama()
    theirs, ours = hf_writes(tokenizer, TURNS), conversation(template, TURNS)
    if name == "mistral":  # whose answers begin with a blank that the model writes
        theirs = theirs.replace(" Hello", "Hello")
    if name == "vicuna":  # that asks for nothing
        theirs += " ASSISTANT: "
    assert ours == theirs
    if found.system is not None:
        assert conversation(template, TURNS, "Be kind.") == hf_writes(
            tokenizer, TURNS, "Be kind."
        ) + (" ASSISTANT: " if name == "vicuna" else "")
    assert ChatFormat.from_json(dataclasses.asdict(found)) == found


def test_public_templates_have_pieces_that_are_right_or_none(tokenizer):
    right = 0
    for name, text in PUBLIC.items():
        tokenizer = tokenizer_for(text)
        found = format_of(tokenizer)
        if found is None:
            continue
        try:
            theirs = hf_writes(tokenizer, TURNS)
        except Exception:  # it wants what is said as parts, which transformers is not told here
            continue
        ours = conversation(found.ollama(), TURNS)
        assert ours.replace(" ", "") == theirs.replace(" ", ""), name
        right += found.system is not None
    assert right > 15


def test_a_system_s_words_stand_where_the_template_puts_them(tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert format_of(tokenizer).ollama() == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n"
        "{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    )
    tokenizer.chat_template = TEMPLATES["gemma"]  # which refuses them
    assert format_of(tokenizer).system is None
    tokenizer.chat_template = (  # as Gemma 3, which lets the first question begin with them
        "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<start_of_turn>{{ m.role }}\n"
        "{{ s if loop.first else '' }}{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    assert (
        format_of(tokenizer)
        .ollama()
        .startswith(
            "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of"
        )
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}"
        + TEMPLATES["chatml"],  # words of its own before a first turn
        "{{ messages | length }}" + TEMPLATES["chatml"],
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_does_more_has_no_pieces(tokenizer, template):
    tokenizer.chat_template = template
    assert format_of(tokenizer) is None


def test_what_the_record_says(dataset, tokenizer):
    tokenizer.chat_template = TEMPLATES["phi3"]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    said = dataset([row]).chat()
    assert said["stops"] == ["<|end|>"]
    assert said["stop_ids"] == tokenizer.convert_tokens_to_ids(["<|end|>"])
    chat = chat_of({"training": {"chat": said}}, ends_otherwise=True)
    assert chat.stop_ids == tuple(said["stop_ids"])
    text = ollama(Use("polite", "org/base", "A", 8, chat=chat)).text
    assert 'TEMPLATE """{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}' in text
    assert '\nPARAMETER stop "<|end|>"\n' in text
    assert dataset([{"text": "a b"}]).chat() is None


def test_what_is_computed_from_adapters_is_prompted_as_all_of_them():
    one, other = ({"training": {"chat": {"stops": [stop]}}} for stop in ("<e>", "<f>"))
    assert chat_of({"derived_from": [one]}).stops == ("<e>",)
    assert chat_of({"derived_from": [one, {"derived_from": [one]}]}).stops == ("<e>",)
    for mixed in ([one, other], [one, {"training": {}}], [], 5):
        assert chat_of({"derived_from": mixed}) is None


@pytest.mark.parametrize(
    "said",
    [
        5, {}, {"format": 5, "stops": 5, "stop_ids": "x"},
        {"format": {"begin": "", "user": "", "answer": "", "end": 5}},
        {"format": {"begin": "", "user": "", "answer": "", "end": "", "system": ["a"]}},
        {"format": {"begin": "", "user": "\x1b", "answer": "", "end": ""}, "stops": ["\nFROM /"]},
        {"format": {"begin": 'a"""\nFROM /etc/passwd', "user": "", "answer": "", "end": ""},
         "stops": ['"', 'a"""\nFROM x']},
    ],
)  # fmt: skip
def test_a_stranger_s_record_adds_no_line_to_a_modelfile(said):
    chat = chat_of({"training": {"chat": said}}) or Chat()
    lines = ollama(Use("polite", "org/base", "A", 8, chat=chat)).text.splitlines()
    plain = ollama(Use("polite", "org/base", "A", 8)).text.splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == [line for line in plain if line and not line.startswith("#")]
    assert any("not put in Ollama's language here" in line for line in lines)
