"""Batches against their samples; cursors cut anywhere; ranks together as one."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraformat.errors import FileChangedError, InputError
from loraformat.train.batch import IGNORED
from loraformat.train.data import DataOptions, open_data
from loraformat.train.data.batch_plan import DataPosition

ROWS = [{"prompt": f"add {i}:", "completion": " four" * (1 + i % 7)} for i in range(45)]


def flat(batch):
    return (
        batch.input_ids.tolist(), batch.labels.tolist(), batch.position_ids.tolist(),
        batch.segments.tolist(), batch.samples,
    )  # fmt: skip


def segments(batch):
    """Every sample in a batch as (number, ids, labels, positions)."""
    for row, numbers in enumerate(batch.samples):
        for segment, number in enumerate(numbers, 1):
            here = batch.segments[row] == segment
            yield (
                number, batch.input_ids[row][here].tolist(), batch.labels[row][here].tolist(),
                batch.position_ids[row][here].tolist(),
            )  # fmt: skip


@pytest.mark.parametrize("packing", [True, False])
def test_packed_or_padded_every_sample_is_what_it_is_alone(dataset, tokenizer, packing):
    opened = dataset(ROWS, seq_len=48, batch_size=3, packing=packing)
    seen = []
    trained = tokens = 0
    for batch, _ in opened.batches(epochs=1):
        trained += batch.trained
        tokens += batch.tokens
        for number, ids, labels, positions in segments(batch):
            row = ROWS[number]
            alone = tokenizer(row["prompt"] + row["completion"])["input_ids"]
            assert ids == [*alone, tokenizer.eos_token_id]
            kept = [label for label in labels if label != IGNORED]
            assert tokenizer.decode(kept) == row["completion"] + "</s>"
            assert labels[0] == IGNORED
            assert positions == list(range(len(ids)))
            seen.append(number)
        outside = batch.segments == 0
        assert (batch.labels[outside] == IGNORED).all()
        assert (batch.position_ids[outside] == 0).all()
        assert batch.input_ids.shape[1] <= 48
        for row in batch.segments.tolist():  # 1 1 2 2 2 3 0 0: in order, and padding last
            assert row == sorted(row, key=lambda segment: segment or 99)
    assert sorted(seen) == list(range(len(ROWS)))
    assert (trained, tokens) == (opened.audit.trained, opened.audit.tokens)


def test_packing_fills_rows(dataset):
    opened = dataset(ROWS, seq_len=64)
    filled = [batch.tokens for batch, _ in opened.batches(epochs=1)]
    assert sum(filled) / (64 * len(filled)) > 0.9


def test_eos_is_learned_and_padding_is_not_though_they_are_one_id(dataset, tokenizer):
    assert tokenizer.pad_token_id is None  # so that padding is EOS
    opened = dataset(ROWS[:8], batch_size=8, packing=False)
    ((batch, _),) = opened.batches(epochs=1)
    eos = tokenizer.eos_token_id
    padding = batch.segments == 0
    assert padding.any() and (batch.input_ids[padding] == eos).all()
    assert ((batch.labels == eos).sum(1) == 1).all()  # each row learns to end once


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tokenizers):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizers["byte_level"].chat_template = None

    def at(rank=0, world=1, **options):
        options = DataOptions(**{"seq_len": 48, "batch_size": 2, **options})
        return open_data(path, tokenizers["byte_level"], options, rank=rank, world=world)

    return at


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cut=st.integers(0, 40), seed=st.integers(0, 99), packing=st.booleans(), shuffle=st.booleans()
)
def test_any_cut_continues_with_exactly_the_rest(opened, cut, seed, packing, shuffle):
    first = opened(packing=packing, shuffle=shuffle, seed=seed)
    whole = [(flat(batch), cursor) for batch, cursor in first.batches(epochs=3)]
    cut = min(cut, len(whole) - 1)
    saved = json.loads(json.dumps(whole[cut][1].to_json()))
    again = opened(packing=packing, shuffle=shuffle, seed=seed)
    rest = [
        (flat(batch), cursor) for batch, cursor in
        again.batches(DataPosition.from_json(saved), epochs=3)
    ]  # fmt: skip
    assert rest == whole[cut + 1 :]


def test_the_last_cursor_of_an_epoch_is_the_next_ones_first(opened):
    data = opened()
    cursors = [cursor for _, cursor in data.batches(epochs=2)]
    count = data.batches_in(0)
    assert (cursors[count - 1].epoch, cursors[count - 1].batch) == (1, 0)
    assert (cursors[-1].epoch, cursors[-1].batch) == (2, 0)
    assert list(data.batches(cursors[-1], epochs=2)) == []


def test_without_a_number_of_epochs_there_is_no_end(opened):
    data = opened()
    stream = data.batches()
    epochs = {cursor.epoch for _, cursor in (next(stream) for _ in range(50))}
    assert max(epochs) > 2
    stream.close()


@pytest.mark.parametrize("world", [2, 3, 12])
def test_ranks_share_one_order_and_take_as_many_steps(opened, world):
    alone = [batch for batch, _ in opened().batches(epochs=1)]
    ranks = [list(opened(rank, world).batches(epochs=1)) for rank in range(world)]
    counts = {len(batches) for batches in ranks}
    assert counts == {-(-len(alone) // world)} == {opened(0, world).batches_in(0)}
    dealt = [batches[step][0] for step in range(counts.pop()) for batches in ranks]
    for number, batch in enumerate(dealt):
        if number < len(alone):
            assert flat(batch) == flat(alone[number])
        else:
            assert batch.trained == 0 and torch.equal(batch.input_ids, alone[0].input_ids)


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 3}, {"train_on": "all"}])
def test_a_cursor_of_other_data_is_refused(opened, other):
    _, cursor = next(opened().batches())
    with pytest.raises(InputError, match="not those of the cursor"):
        opened(**other).batches(cursor)
    with pytest.raises(InputError, match="not those of the cursor"):
        opened(0, 2).batches(cursor)


@pytest.mark.parametrize(
    "fields",
    [{}, {"epoch": 0, "batch": -1, "data": ""}, {"epoch": True, "batch": 0, "data": ""},
     {"epoch": 0, "batch": 0, "data": 5}, {"epoch": 0, "batch": 0, "data": "", "more": 1}],
)  # fmt: skip
def test_what_is_no_cursor(fields):
    with pytest.raises(InputError, match="not a data cursor"):
        DataPosition.from_json(fields)


def test_a_cursor_behind_the_end(opened):
    with pytest.raises(InputError, match="behind the end of epoch 0"):
        opened().batches(DataPosition(0, 10_000))


def test_a_file_that_changes_is_noticed(dataset, write):
    opened = dataset(ROWS)
    write("rows.jsonl", ROWS[::-1] + ROWS)
    with pytest.raises(FileChangedError, match="changed while it was being trained on"):
        list(opened.batches(epochs=1))


def test_a_sample_is_shown_and_found(dataset):
    opened = dataset(ROWS)
    assert opened.preview(3) == "add 3:⟦ four four four four</s>⟧"
    assert opened.place(3).endswith("rows.jsonl: line 4")
    assert len(opened) == len(ROWS)
