"""What a template wants, how it frames turns, and what of a row it leaves out."""

import pytest

from loraformat.chat_templates.probe import CallForm
from loraformat.errors import InputError
from loraformat.train.data.row_formats import KindError
from tests.train.data.test_masks import encode, messages
from tests.train.data.tokenizers_and_templates import TEMPLATES

ARGUMENTS = {"city": "Paris", "near": ["ä"]}
AS_TEXT = '{"city": "Paris", "near": ["ä"]}'
FORMS = {
    "calls_if_none": (CallForm(None, True, "string"), f"CALL weather {AS_TEXT}</s>"),
    "calls_in_json": (CallForm("", True, "object"), f"<call>weather {AS_TEXT}</call><|im_end|>"),
    "calls_if_absent": (CallForm(None, False, "string"), f"weather {AS_TEXT}<|im_end|>"),
    "calls_by_item": (CallForm(None, True, "object"), "weather city=Paris near=['ä']<|im_end|>"),
}


def call(arguments, **members):
    function = {"name": "weather", "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "tool_calls": calls} | members


def learned_of(encoded):
    return "".join(t for t, yes in zip(encoded.shown, encoded.learned, strict=True) if yes)


def text_of(encoded):
    return "".join(encoded.shown)


@pytest.mark.parametrize("members", [{}, {"content": None}, {"content": ""}, {"content": []}])
@pytest.mark.parametrize("arguments", [ARGUMENTS, AS_TEXT])
@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_learned_in_the_form_that_the_template_writes(
    tokenizer, name, arguments, members
):
    tokenizer.chat_template = TEMPLATES[name]
    form, written = FORMS[name]
    (encoded,) = encode(
        tokenizer, {"messages": [*messages([("user", "?")]), call(arguments, **members)]}
    )
    assert learned_of(encoded) == written
    from loraformat.train.data.chat import ChatRenderer
    from loraformat.train.data.tokenizer import TextEncoder

    assert ChatRenderer(TextEncoder(tokenizer, "test"))._trials.call_form == form


@pytest.mark.parametrize(
    "spelling",
    [
        {"messages": [*messages([("user", "?")]), call(AS_TEXT) | {"tool_calls": f'[{{"name": '
         f'"weather", "arguments": {AS_TEXT}}}]'}]},
        {"messages": [*messages([("user", "?")]), {"role": "assistant", "content": None,
         "function_call": {"name": "weather", "arguments": AS_TEXT}}]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value":
         f'{{"name": "weather", "arguments": {AS_TEXT}}}'}]},
    ],
)  # fmt: skip
def test_spellings_of_a_call(tokenizer, spelling):
    tokenizer.chat_template = TEMPLATES["calls_in_json"]
    (encoded,) = encode(tokenizer, spelling)
    assert learned_of(encoded) == FORMS["calls_in_json"][1]


def test_sharegpt_of_a_whole_call(tokenizer):
    tokenizer.chat_template = TEMPLATES["calls_in_json"]
    spoken = [
        ("human", "?"), ("function_call", '{"name": "weather", "arguments": {}}'),
        ("observation", "12 C"), ("gpt", "It is 12"),
    ]  # fmt: skip
    row = {"conversations": [{"from": who, "value": what} for who, what in spoken]}
    (encoded,) = encode(tokenizer, row | {"tools": '[{"name": "weather"}]'})
    assert learned_of(encoded) == "<call>weather {}</call><|im_end|>It is 12<|im_end|>"
    assert text_of(encoded).startswith('<|im_start|>system\n[{"name": "weather"}]<|im_end|>')
    assert "<|im_start|>tool\n12 C<|im_end|>" in text_of(encoded)


@pytest.mark.parametrize("tools", [[], None, "", "[]"])
def test_no_tools_are_no_tools(chat, tools):
    row = {"messages": messages()}
    assert encode(chat, row | {"tools": tools}) == encode(chat, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, '"tools" is a string, and not strict JSON'),
        ({"tools": 5}, '"tools" is a number'),
        ({"messages": [call("{oops")]}, '"arguments" is a string, and not strict JSON'),
        ({"messages": [call("[1]")]}, "a string of JSON, and not of an object"),
        ({"messages": [call([1])]}, '"arguments" of a call are a list'),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, 'with a "function"'),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, 'a message without "content"'),
    ],
)
def test_calls_and_tools_that_are_none(tokenizer, row, message):
    tokenizer.chat_template = TEMPLATES["calls_in_json"]
    with pytest.raises(KindError, match=message):
        encode(tokenizer, {"messages": messages()} | row)


@pytest.mark.parametrize("name", ["two_roles", "always_asks"])
@pytest.mark.parametrize("members", [{"content": None}, {"content": "I look"}])
def test_an_answer_that_the_template_leaves_out_is_refused(tokenizer, dataset, name, members):
    tokenizer.chat_template = TEMPLATES[name]
    turns = [*messages([("user", "?")]), call(ARGUMENTS, **members)]
    with pytest.raises(InputError, match="message 2: the chat template does not write tool_calls"):
        dataset([{"messages": turns}])
    # Both remedies of the message lead to the goal.
    turns += messages([("user", "so?"), ("assistant", "12")])
    turns[1]["weight"] = 0
    opened = dataset([{"messages": turns}])
    assert opened.audit.unwritten == {"tool_calls of the role assistant": 1}
    tokenizer.chat_template = TEMPLATES["calls_in_json"]
    del turns[1]["weight"]
    assert dataset([{"messages": turns}]).audit.unwritten == {}


def test_a_call_beside_words_that_is_written_only_without_them_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATES["calls_if_none"]
    turns = [*messages([("user", "?")]), call(ARGUMENTS, content="I look")]
    with pytest.raises(KindError, match="of a message that also says something, so that"):
        encode(tokenizer, {"messages": turns})


def test_what_the_template_leaves_out_of_the_context_is_said(tokenizer, dataset):
    tokenizer.chat_template = TEMPLATES["two_roles"]
    said = [("developer", "Be brief."), ("user", "?"), ("assistant", "12")]
    rows = [
        {"messages": messages(said), "tools": [{"name": "weather"}]},
        {"messages": messages([("system", "Hi"), *said[1:]])},
        {"messages": messages(said)},
        {"messages": messages(said[1:])},
    ]
    rows[3]["messages"][1]["reasoning_content"] = "hm"
    opened = dataset(rows)
    assert opened.audit.unwritten == {
        "messages of the role developer": 2, "messages of the role system": 1,
        "descriptions of tools": 1, "reasoning_content of the role assistant": 1,
    }  # fmt: skip
    line = "2 messages of the role developer left out: the chat template does not write them"
    assert line in opened.audit.lines()
    assert dataset(rows, train_on="all").audit.unwritten == opened.audit.unwritten
    tokenizer.chat_template = TEMPLATES["calls_in_json"]
    rows[3]["messages"][1].pop("reasoning_content")
    assert dataset(rows).audit.unwritten == {}


def test_reasoning_that_is_left_out_only_later_counts_as_written(tokenizer, dataset):
    tokenizer.chat_template = TEMPLATES["thoughts"]
    turns = messages()
    for place in (1, 3):
        turns[place]["reasoning_content"] = f"so {place}"
    opened = dataset([{"messages": turns}], packing=False, shuffle=False)
    assert (opened.audit.unwritten, opened.audit.rewritten) == ({}, 1)
    assert [f"⟦<think>so {place}</think>" in opened.preview(number)
            for number, place in enumerate((1, 3))] == [True, True]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "end", "trailer"),
    [
        ("always_asks", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("always_asks_in_words", "\n", "### assistant: "),
    ],
)
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_the_header_of_a_turn_that_nobody_takes_is_not_learned(
    tokenizer, dataset, name, end, trailer, train_on
):
    tokenizer.chat_template = TEMPLATES[name]
    said = [("user", "two plus two?"), ("assistant", "It is four."), ("user", "So?"),
            ("assistant", "Yes")]  # fmt: skip
    opened = dataset([{"messages": messages(said)}], train_on=train_on)
    shown = opened.preview()
    assert len(opened) == 1 and shown.endswith(f"Yes{end}⟧{trailer}")
    if train_on == "completions":
        assert shown.count("⟦") == 2 and f"⟦It is four.{end}⟧" in shown


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "always_asks", "calls_in_json"])
@pytest.mark.parametrize("system", [(), (("system", "Be brief."),)])
def test_what_is_said_before_anybody_asks_is_learned(tokenizer, name, system):
    tokenizer.chat_template = TEMPLATES[name]
    turns = [*system, ("assistant", "Hello!"), ("user", "two plus two?"), ("assistant", "Four.")]
    (encoded,) = encode(tokenizer, {"messages": messages(turns)})
    end = tokenizer.convert_ids_to_tokens(encoded.stops[0])
    assert learned_of(encoded) == f"Hello!{end}Four.{end}"


@pytest.mark.parametrize(
    ("name", "stop"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"),
     ("phi3", "<|end|>"), ("mistral", "</s>"), ("always_asks", "<|eot_id|>")],
)  # fmt: skip
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_where_turns_end(tokenizer, dataset, name, stop, train_on):
    tokenizer.chat_template = TEMPLATES[name]
    opened = dataset([{"messages": messages()}], train_on=train_on)
    assert tokenizer.convert_ids_to_tokens(opened.stops) == [stop]


def test_where_text_and_completions_end(dataset, tokenizer):
    for row in ({"text": "a b"}, {"prompt": "two plus two?", "completion": " b"}):
        assert dataset([row]).stops == [tokenizer.eos_token_id]


def test_history_of_alpaca_is_earlier_turns(chat):
    row = {"instruction": "And now?", "input": "", "output": "4", "history": [["1+1", "2"]]}
    said = [("user", "1+1"), ("assistant", "2"), ("user", "And now?"), ("assistant", "4")]
    assert encode(chat, row) == encode(chat, {"messages": messages(said)})
    assert encode(chat, row | {"history": []}) == encode(chat, row | {"history": None})
    with pytest.raises(KindError, match='"history" is not a list of pairs'):
        encode(chat, row | {"history": [["1+1"]]})


def test_the_four_columns_of_alpaca(chat):
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    told = {"text": "Below is an instruction.\n\nAdd.\n\n### Response:\n4"}
    assert encode(chat, row | told) == encode(chat, row)
    turns = {"messages": messages()}
    assert encode(chat, turns | {"text": "…Yes: vier → 4 😀"}) == encode(chat, turns)
    with pytest.raises(KindError, match="has the fields of two kinds of row: text, and instruct"):
        encode(chat, row | {"text": "something else"})
