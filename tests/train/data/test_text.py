"""Text: documents in pieces, pieces in samples, and nothing of them lost."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraformat.train.data import DataOptions, open_data
from loraformat.train.data.row_sources import open_sources
from loraformat.train.data.text_file import piece_size, pieces
from tests.train.data.tokenizers_and_templates import TEMPLATES

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(st.text(st.sampled_from("ab \né😀"), max_size=300), st.integers(4, 40))
def test_pieces_are_the_text(text, longest):
    cut = list(pieces(text.encode(), longest))
    assert b"".join(cut).decode() == text
    assert "".join(piece.decode() for piece in cut) == text  # no character is split
    assert all(0 < len(piece) <= longest for piece in cut) or not text


def documents(path, **options):
    (source,) = open_sources(path, DataOptions(**options))
    found, text = [], ""
    for number in range(len(source)):
        row = source.read(number)
        assert row.begins == (not text)
        text += row.fields["text"]
        if row.ends:
            found.append(text)
            text = ""
    assert not text
    return found


@pytest.mark.parametrize("filling", ["word ", "line\n", "é", "😀x"])
def test_a_long_file_is_one_document_in_pieces(tmp_path, filling):
    path = tmp_path / "a.txt"
    text = filling * (3 * piece_size(512) // len(filling.encode()) + 7)
    path.write_text(text, encoding="utf-8")
    assert documents(path) == [text]
    (source,) = open_sources(path, DataOptions())
    assert len(source) >= 4


def test_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    long = "word " * 30_000
    path.write_text(f"\ufeff\n\none\ntwo\n \t\n\r\nthree\r\n\n{long}\n\n", encoding="utf-8")
    assert documents(path, split_text="paragraphs") == ["one\ntwo", "three", long]
    assert len(documents(path)) == 1


@quick
@given(st.lists(st.text(st.sampled_from("ab c"), min_size=1).filter(str.strip), max_size=5))
def test_any_paragraphs(tmp_path, wanted):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(wanted) + "\n")
    assert documents(path, split_text="paragraphs") == wanted


@pytest.mark.parametrize("packing", [True, False])
def test_samples_of_text_are_all_of_it(tmp_path, tokenizer, packing):
    path = tmp_path / "a.txt"
    text = "The quick brown fox. " * 200
    path.write_text(text)
    opened = open_data(path, tokenizer, DataOptions(seq_len=64, packing=packing, shuffle=False))
    ids, labels = [], 0
    for batch, _ in opened.batches(epochs=1):
        ids += batch.input_ids[batch.segments > 0].tolist()
        labels += batch.trained
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    # Each sample but its first token.
    assert labels == len(ids) - len(opened) == opened.audit.trained
    assert opened.audit.over_length == 0 and opened.audit.longest == 64


def test_a_long_row_of_text_is_tokenized_in_pieces(dataset, tokenizer):
    text = "two plus two is four\n" * 2000
    opened = dataset([{"text": text}], seq_len=512, shuffle=False, packing=False)
    ids = [i for batch, _ in opened.batches(epochs=1) for i in batch.input_ids[0].tolist()]
    assert ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert opened._index[len(opened) - 1].part == 2


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_every_piece_of_a_document_begins_with_bos_and_the_last_one_ends_with_eos(
    tmp_path, tokenizers, suffix
):
    tokenizer = tokenizers["metaspace"]
    path = tmp_path / f"a.{suffix}"
    said = ["It is four.\n" * 1000, "It is."]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in said)
    path.write_text(rows if suffix == "jsonl" else "\n\n".join(said))
    options = DataOptions(seq_len=128, shuffle=False, split_text="paragraphs", packing=False)
    opened = open_data(path, tokenizer, options)
    batches = [batch for batch, _ in opened.batches(epochs=1)]
    samples = [batch.input_ids[0].tolist() for batch in batches]
    assert len(samples) > 15
    assert all(ids[0] == tokenizer.bos_token_id for ids in samples)
    assert sum(ids.count(tokenizer.bos_token_id) for ids in samples) == len(samples)
    ends = [n for n, ids in enumerate(samples) if ids[-1] == tokenizer.eos_token_id]
    assert ends == [len(samples) - 2, len(samples) - 1]
    assert max(map(len, samples)) == 128
    # What stands at a cut has its context in the piece before, and is not learned from BOS.
    assert batches[0].labels[0, 1] >= 0 and batches[-1].labels[0, 1] >= 0
    assert all(batch.labels[0, :2].tolist() == [-100, -100] for batch in batches[1:-1])
    assert sum(batch.trained for batch in batches) == opened.audit.trained


@pytest.mark.parametrize("over_length", ["split", "truncate-start"])
def test_later_pieces_of_a_conversation_begin_with_bos(dataset, tokenizer, over_length):
    tokenizer.chat_template = TEMPLATES["llama3"]
    turns = [
        {"role": role, "content": f"two plus two is four {place}"}
        for place, role in enumerate(("user", "assistant") * 6)
    ]
    whole = dataset([{"messages": turns}], seq_len=4096)
    opened = dataset(
        [{"messages": turns}], seq_len=40, over_length=over_length, packing=False, shuffle=False
    )
    samples = [batch.input_ids[0].tolist() for batch, _ in opened.batches(epochs=1)]
    assert all(ids[0] == tokenizer.bos_token_id and len(ids) <= 40 for ids in samples)
    if over_length == "split":
        assert len(samples) > 3 and opened.audit.trained == whole.audit.trained
    else:
        assert opened.audit.cut == whole.audit.longest - 40 and len(samples) == 1


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_memory_does_not_hold_a_large_file(tmp_path, suffix):
    size = 200_000_000 if suffix in ("txt", "jsonl") else 50_000_000
    path = tmp_path / f"a.{suffix}"
    with path.open("wb") as file:
        word = b"a" * 99_900
        line = {"jsonl": b'{"text": "%s"}\n', "json": b'{"text": "%s"},\n', "csv": b"%s\n"}
        if suffix == "txt":
            file.truncate(size)  # sparse: NUL is a character, too
        else:
            file.write({"json": b"[", "csv": b"text\n"}.get(suffix, b""))
            for _ in range(size // len(word)):
                file.write(line[suffix] % word)
            file.write(b'{"text": "b"}]' if suffix == "json" else b"")
    tracemalloc.start()
    (source,) = open_sources(path, DataOptions())
    middle = source.read(len(source) // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) >= 500 and len(middle.fields["text"]) > 16_000
    assert peak < 4_000_000


def test_memory_does_not_hold_the_tokens_of_a_long_row(tmp_path):
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "b c d e " * 50_000}))
    tracemalloc.start()
    opened = open_data(path, tokenizer, DataOptions(seq_len=256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened.audit.tokens == 200_001
    assert peak < 3_000_000  # three lists of 200,000 pointers alone would be 4.8 MB
