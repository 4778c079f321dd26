"""When scores and merges cut alike: against BPE of `tokenizers` and SentencePiece's procedure."""

from __future__ import annotations

import itertools
import random

import pytest
from loraformat_converters.gguf.tokenizers.merging import order_of, splits
from tokenizers import Tokenizer, models

from loraformat.errors import UnsupportedError


def by_score(text, order):
    """Merge as llama.cpp does: the best token first, the leftmost of them."""
    place = {token: number for number, token in enumerate(order)}
    parts = list(text)
    while True:
        found = [(place[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b in place]  # fmt: skip
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def by_rank(merges, texts, letters="abc"):
    vocabulary = {text: number for number, text in enumerate([*letters, *sorted(texts)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    return lambda text: tokenizer.encode(text).tokens


def vocabularies(count, longest=5):
    """Yield texts, their merges in some order of the texts, and strings to cut."""
    chance = random.Random(7)
    for _ in range(count):
        letters = chance.choice(["ab", "abc"])
        pool = [
            "".join(p) for n in range(2, longest + 1) for p in itertools.product(letters, repeat=n)
        ]
        texts = set(chance.sample(pool, chance.randrange(2, min(14, len(pool)))))
        pairs = splits(texts)
        order = chance.sample(list(pairs), len(pairs))
        strings = ["".join(chance.choices(letters, k=chance.randrange(2, 10))) for _ in range(60)]
        yield texts, [pair for text in order for pair in pairs[text]], strings


def test_random_vocabularies():
    compared = 0
    for texts, merges, strings in vocabularies(200):
        order, cut = order_of(merges, texts), by_rank(merges, texts)
        assert not order.unsure
        for string in strings:
            assert by_score(string, order.texts) == cut(string), (string, merges)
            compared += 1
    assert compared == 12000


def test_a_missing_merge_is_a_difference():
    """What is refused would really be cut otherwise, in half the vocabularies by few strings."""
    refused = different = 0
    for texts, merges, strings in vocabularies(200, longest=3):
        left, right = merges[0] if merges else ("", "")
        if not merges or len(splits(texts)[left + right]) < 2:
            continue
        with pytest.raises(UnsupportedError, match=f"merges {left} and {right}"):
            order_of(merges[1:], texts)
        order, cut = order_of(merges, texts), by_rank(merges[1:], texts)
        refused += 1
        different += any(by_score(one, order.texts) != cut(one) for one in strings)
    assert different > refused / 4 > 5


RUNS = [mark * count for mark in " \n" for count in range(2, 12)]


@pytest.mark.parametrize("reverse", [False, True])
def test_runs_with_pairs_between_each_other(reverse):
    merges = [pair for pairs in splits(RUNS).values() for pair in pairs]
    merges.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=reverse)
    order = order_of(merges, RUNS)
    assert sorted(order.texts) == sorted(RUNS) and not order.unsure
    cut = by_rank(merges, RUNS, " \n")
    for count in range(2, 60):
        assert by_score(" " * count, order.texts) == cut(" " * count)


def test_what_has_no_exact_order_is_named():
    texts = {"ab", "bc", "abc", "bcd", "cd"}
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "bc"), ("b", "cd"), ("ab", "c"),
              ("bc", "d")]  # fmt: skip
    assert order_of(merges, texts).unsure == ["abc", "bcd"]
    chance = random.Random(1)
    pairs = [pair for pairs in splits(RUNS).values() for pair in pairs]
    named = [order_of(chance.sample(pairs, len(pairs)), RUNS).unsure for _ in range(20)]
    assert any(named) and all(set(one) <= {" " * 11, "\n" * 11} for one in named)


def test_pieces_that_cannot_be_built():
    assert splits({"abc", "ab", "xyz"}) == {"ab": [("a", "b")], "abc": [("ab", "c")]}
    assert splits({"a\n", "b"}, never={"\n"}) == {}
    with pytest.raises(UnsupportedError, match="300 characters"):
        splits({"x" * 300})
