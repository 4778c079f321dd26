"""Permutation, packing and plan: what must hold for any lengths, seeds and sizes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.train.data import DataOptions
from loraformat.train.data.batch_plan import BatchPlan, Permutation, best_fit, next_fit

quick = settings(max_examples=60, deadline=None)
lengths_up_to_16 = st.lists(st.integers(1, 16), max_size=200)


@quick
@given(st.integers(0, 3000), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_a_permutation_holds_everything_once(n, seed, epoch):
    items = Permutation(n, seed, epoch)(np.arange(n))
    assert sorted(items.tolist()) == list(range(n))


def _in_plain_integers(n, *key):
    """The same network on Python's integers, which do not overflow."""
    word = 2**64 - 1

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    state = 0
    for number in key:
        state = mixed(state ^ number)
    half = next(bits for bits in range(1, 40) if 4**bits >= n)

    def through(x):
        left, right = x >> half, x % 2**half
        for turn in range(6):
            left, right = right, left ^ (mixed(right ^ mixed(state ^ turn)) % 2**half)
        return left << half | right

    for x in range(n):
        x = through(x)
        while x >= n:
            x = through(x)
        yield x


@quick
@given(st.integers(2, 70), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_permutation_is_the_same_everywhere(n, seed, epoch):
    items = Permutation(n, seed, epoch)(np.arange(n))
    assert items.tolist() == list(_in_plain_integers(n, seed, epoch))


def test_a_resumed_run_of_an_older_version_finds_its_order():
    # A change of this list is a change of what --resume continues with.
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [8, 4, 6, 3, 9, 1, 0, 2, 5, 7]


def test_permutations_differ_and_mix():
    n = 4096
    seen = {tuple(Permutation(n, *key)(np.arange(8)).tolist()) for key in
            ((s, e, p) for s in range(4) for e in range(4) for p in range(2))}  # fmt: skip
    assert len(seen) == 32
    moved = Permutation(n, 1)(np.arange(n))
    # Neighbours go apart: the mean distance of two random places is n / 3.
    assert abs(np.abs(np.diff(moved)).mean() - n / 3) < n / 30
    assert abs(np.corrcoef(np.arange(n), moved)[0, 1]) < 0.06


def test_a_permutation_of_very_many_needs_no_memory():
    order = Permutation(2**40, 7)
    assert len(set(order(np.arange(1000)).tolist())) == 1000


@quick
@given(lengths_up_to_16)
def test_best_fit_packs_everything_once_and_tightly(lengths):
    rows = best_fit(lengths, 16)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    sums = [sum(lengths[position] for position in row) for row in rows]
    assert all(total <= 16 for total in sums)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 16) + 1 or any(n > 8 for n in lengths)
    assert sum(total <= 8 for total in sums) <= 1  # two half-empty rows would be one
    assert rows == best_fit(lengths, 16)


@quick
@given(lengths_up_to_16)
def test_next_fit_keeps_the_order(lengths):
    rows = list(next_fit(enumerate(lengths), 16))
    assert [sample for row in rows for sample in row] == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= 16 for row in rows)


@quick
@given(
    lengths_up_to_16, st.booleans(), st.booleans(), st.integers(1, 5), st.integers(0, 9),
    st.integers(0, 3),
)  # fmt: skip
def test_every_epoch_holds_every_sample_once(lengths, packing, shuffle, batch_size, seed, epoch):
    options = DataOptions(
        seq_len=16, batch_size=batch_size, packing=packing, shuffle=shuffle, seed=seed
    )
    batches = list(BatchPlan(np.array(lengths, dtype=np.uint32), options).batches(epoch))
    samples = [sample for batch in batches for row in batch for sample in row]
    assert sorted(samples) == list(range(len(lengths)))
    if not shuffle:
        assert samples == sorted(samples)
    assert all(len(batch) == batch_size for batch in batches[:-1]) or (shuffle and not packing)
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(packing or len(row) == 1 for batch in batches for row in batch)


def test_batches_are_of_similar_lengths():
    lengths = np.array([1 + 37 * i % 500 for i in range(640)], dtype=np.uint32)
    options = DataOptions(seq_len=512, batch_size=8, packing=False)
    batches = list(BatchPlan(lengths, options).batches(0))
    padded = sum(max(lengths[list(map(lambda r: r[0], b))]) * len(b) for b in batches)
    assert padded < 1.05 * lengths.sum()
    means = [lengths[[row[0] for row in batch]].mean() for batch in batches]
    assert means != sorted(means)  # but the batches themselves are shuffled


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = np.full(64, 4, dtype=np.uint32)

    def order(seed, epoch):
        plan = BatchPlan(lengths, DataOptions(seq_len=16, seed=seed))
        return [row for batch in plan.batches(epoch) for row in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
