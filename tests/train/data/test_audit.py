"""What is counted and what is refused before training."""

from itertools import pairwise

import pytest

from loraformat.errors import InputError, UsageError
from loraformat.train.data import DataOptions

GOOD = {"prompt": "two plus two?", "completion": " It is four."}
LONG = {"prompt": "two plus two? " * 20, "completion": " It is four. It is four." * 20}


def asked(content, answer=None):
    turns = [{"role": "user", "content": content}]
    return {"messages": turns + ([{"role": "assistant", "content": answer}] if answer else [])}


def test_counts_agree_with_the_batches(dataset):
    opened = dataset([GOOD] * 7 + [{"prompt": "It", "completion": " is"}])
    audit = opened.audit
    batches = [batch for batch, _ in opened.batches(epochs=1)]
    assert audit.tokens == sum(batch.tokens for batch in batches)
    assert audit.trained == sum(batch.trained for batch in batches)
    assert (audit.rows, audit.samples, audit.over_length) == (8, 8, 0)
    assert audit.sources[0][1] == 8
    assert audit.lines()[0].startswith(f"8 rows, 8 samples, {audit.tokens} tokens")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([asked("a"), asked("b")], "no token to learn in 2 rows.*2 without .* an assistant's turn"),
        ([{"prompt": "", "completion": "a b"}] * 3, "all 3 samples would be learned: no sample"),
        ([{"text": ""}], "no token to learn"),
        ([{"id": 1, "body": "a"}], "line 1: fields body, id; wanted text, prompt and completion"),
        ([{}], "line 1: fields nothing"),
        ([GOOD, {"text": "a"}], "line 2: a row of text in a file of prompt and completion"),
        ([GOOD | {"text": "a"}], "line 1: has the fields of two kinds of row: text, and prompt"),
        ([GOOD | {"prompt": 5}], 'line 1: "prompt" is a number, wanted a string'),
        ([{"text": None}], "line 1: fields nothing"),
        ([{"text": ["a"]}], 'line 1: "text" is a list, wanted a string'),
        ([{"messages": []}], 'line 1: "messages" is empty, wanted a list'),
        ([{"messages": "hi"}], 'line 1: "messages" is a string, wanted a list'),
        ([{"messages": [{"content": "a"}]}], 'line 1: a message is not an object with a "role"'),
        ([{"messages": [{"role": "user"}]}], 'line 1: a message without "content"'),
        ([{"messages": [{"role": "user", "content": {"a": 1}}]}], '"content" .* is an object'),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "that is not text"),
        ([{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}], "neither 0 nor 1"),
        ([{"conversations": [{"from": "alien", "value": "a"}]}], '"from" is \'alien\', wanted one'),
        ([{"conversations": ["a"]}], 'not an object with "from" and "value"'),
        ([{"instruction": "a", "output": 4}], '"output" is a number'),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(dataset, chat, rows, message):
    with pytest.raises(InputError, match=message) as error:
        dataset(rows)
    assert "rows.jsonl" in str(error.value)


def test_everything_learned_is_no_error_when_it_is_meant(dataset):
    rows = [{"prompt": "", "completion": "a b"}] * 3
    assert dataset(rows, train_on="all").audit.all_learned == 3
    opened = dataset([GOOD, *rows])
    assert opened.audit.all_learned == 3
    assert "3 samples without a prompt" in "\n".join(opened.audit.lines())
    # Everything but the first token, which nothing stands before.
    everything = dataset([GOOD] * 2, train_on="all")
    assert everything.audit.trained == everything.audit.tokens - 2


def test_samples_without_a_learned_token_are_counted_and_left_out(dataset, chat):
    opened = dataset([asked("a"), asked("a", "b"), asked("c")])
    assert (opened.audit.unlearned, opened.audit.samples, len(opened)) == (2, 1, 1)
    assert "2 samples left out" in "\n".join(opened.audit.lines())
    assert opened.place(0).endswith("line 2")


def test_over_length_is_refused_with_numbers_and_remedies(dataset):
    with pytest.raises(InputError) as error:
        dataset([GOOD, LONG, LONG], seq_len=64)
    words = str(error.value)
    longest = dataset([LONG], seq_len=4096).audit.longest
    assert f"2 samples are longer than 64 tokens, the longest {longest}" in words
    assert "rows.jsonl: line 2; allow" in words and f"--seq-len {longest}" in words
    assert "--over-length drop" in words


def test_over_length_is_dropped(dataset):
    opened = dataset([GOOD, LONG, LONG], seq_len=64, over_length="drop")
    audit = opened.audit
    assert (audit.rows, audit.samples, audit.over_length, audit.dropped) == (3, 1, 2, 2)
    assert "2 samples longer than seq-len dropped" in "\n".join(audit.lines())


@pytest.mark.parametrize("policy", ["truncate", "truncate-start"])
def test_over_length_is_truncated(dataset, tokenizer, policy):
    row = {"prompt": "two plus two?", "completion": " It is four." * 40}
    opened = dataset([row], seq_len=64, over_length=policy)
    ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
    ((batch, _),) = opened.batches(epochs=1)
    kept = batch.input_ids[0].tolist()
    assert kept == (ids[:64] if policy == "truncate" else ids[-64:])
    assert opened.audit.truncated == 1 and opened.audit.cut == len(ids) - 64
    learns_to_stop = batch.labels[0, -1] == tokenizer.eos_token_id
    assert learns_to_stop == (policy == "truncate-start")
    assert batch.trained == opened.audit.trained


@pytest.mark.parametrize("seq_len", [2, 3, 16, 64])
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_over_length_is_split_and_each_token_learned_once(dataset, tokenizer, seq_len, train_on):
    prompt, completion = LONG["prompt"], LONG["completion"]
    ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    options = {"train_on": train_on, "shuffle": False, "packing": False}
    whole = dataset([LONG], seq_len=4096, **options)
    ((one, _),) = whole.batches(epochs=1)
    opened = dataset([LONG], seq_len=seq_len, over_length="split", **options)
    audit = opened.audit
    assert audit.trained == whole.audit.trained  # not one is lost
    assert (audit.over_length, audit.split, audit.longest) == (1, 1, len(ids))
    assert audit.parts == audit.samples + audit.unlearned == -(-(len(ids) - 1) // (seq_len - 1))
    assert f"1 samples longer than seq-len split into {audit.parts}" in audit.lines()
    batches = [batch for batch, _ in opened.batches(epochs=1)]
    assert all(batch.input_ids.shape[1] <= seq_len for batch in batches)
    learned = [label for batch in batches for label in batch.labels[0].tolist() if label >= 0]
    assert learned == [label for label in one.labels[0].tolist() if label >= 0]
    # Each begins with the last token of the one before.
    for before, after in pairwise(batches):
        assert before.input_ids[0, -1] == after.input_ids[0, 0]


def test_a_prompt_alone_is_no_sample_of_a_split(dataset):
    opened = dataset([GOOD, LONG], seq_len=16, over_length="split")
    audit = opened.audit
    assert audit.unlearned > 0 and audit.parts == audit.samples - 1 + audit.unlearned
    assert {opened.place(number) for number in range(len(opened))} == {
        opened.place(0), opened.place(len(opened) - 1)
    }  # fmt: skip
    assert all(batch.trained for batch, _ in opened.batches(epochs=1))


def test_a_long_conversation_is_split(dataset, chat):
    turns = [turn for i in range(8) for turn in asked(f"say {i}", f"{i} it is")["messages"]]
    whole = dataset([{"messages": turns}], seq_len=4096)
    opened = dataset([{"messages": turns}], seq_len=24, over_length="split", packing=False)
    assert opened.audit.split == 1 and opened.audit.samples > 3
    assert opened.audit.trained == whole.audit.trained
    assert sum(batch.trained for batch, _ in opened.batches(epochs=1)) == whole.audit.trained


def test_truncation_that_leaves_nothing_to_learn_is_no_training(dataset):
    with pytest.raises(InputError, match="no token to learn in 2 rows"):
        dataset([LONG, LONG], seq_len=8, over_length="truncate")


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path, dataset, write, tokenizer):
    from loraformat.train.data import open_data

    path = write("bad.jsonl", [GOOD, {"text": "other kind"}, GOOD, 5, {"prompt": 1}, GOOD])
    with path.open("a") as file:
        file.write("{broken\n" * 6)
    opened = open_data(path, tokenizer, DataOptions(bad_rows="skip"))
    assert (opened.audit.rows, opened.audit.bad, opened.audit.samples) == (12, 9, 3)
    assert len(opened.audit.bad_examples) == 5
    assert [opened.place(number).rsplit(" ")[-1] for number in range(3)] == ["1", "3", "6"]
    said = "\n".join(opened.audit.lines())
    assert "9 bad rows skipped" in said and "bad.jsonl: line 4: is JSON, but not" in said


def test_each_file_has_a_kind_of_its_own(write, chat):
    from loraformat.train.data import open_data

    files = [write("d/a.jsonl", [GOOD]), write("d/b.jsonl", [{"text": "a b"}]),
             write("d/c.jsonl", [asked("a", "b")])]  # fmt: skip
    for named in (files, files[0].parent):
        opened = open_data(named, chat)
        assert [rows for _, rows in opened.audit.sources] == [1, 1, 1]
        assert opened.audit.samples == 3 and opened.audit.pieces == 1


def test_many_files(tmp_path, tokenizer):
    from loraformat.train.data import open_data

    for number in range(400):
        (tmp_path / f"{number:03}.txt").write_text(f"four {number}")
    opened = open_data(tmp_path, tokenizer, DataOptions(shuffle=False))
    assert opened.audit.samples == 400
    assert opened.preview(399) == "f⟦our 399</s>⟧" or "399</s>⟧" in opened.preview(399)


def test_progress(dataset, write, tokenizer):
    from loraformat.train.data import open_data

    seen = []
    path = write("rows.jsonl", [GOOD] * 600)
    open_data(path, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 600), (512, 600), (600, 600)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", 1), ("batch_size", 0), ("seed", -1), ("train_on", "prompts"),
     ("over_length", "cut"), ("bad_rows", "ignore"), ("split_text", "lines")],
)  # fmt: skip
def test_options_that_make_no_sense(name, value):
    flag = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"^{flag} is {value!r}, wanted"):
        DataOptions(**{name: value})


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"text": "one"}, None),
        ({"prompt": "one", "completion": " two"}, "{prompt}{completion}"),
        (
            {"instruction": "one", "output": "two"},
            "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n",
        ),
    ],
)
def test_the_prompt_format(dataset, chat, row, shown):
    assert dataset([row], tokenizer=chat).prompt_format() == shown


def test_a_file_that_has_gone_has_no_prompt_format(dataset, write):
    opened = dataset([{"prompt": "one", "completion": " two"}])
    write("rows.jsonl", [])
    assert opened.prompt_format() is None
