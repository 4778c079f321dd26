"""Patterns of names: the verdict of Python's own engine, without its running time."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraformat_converters.peft import patterns
from loraformat_converters.peft.patterns import Pattern, PatternTable

from loraformat.errors import InputError, UnsupportedError

ATOMS = ["a", "b", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "[a-c0-9]", "[]a]", r"[\d.]",
         "layers", "_", "7", r"\b", "(?:^|.)", "$", r"\x61", "{", "-", r"\-", ""]  # fmt: skip
REPEATS = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{,2}", "{1,}", "{0,3}", "{1,2}?"]


def wrapped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.tuples(st.sampled_from(["(", "(?:", "(?P<x>"]), inner).map(
        lambda p: f"{p[0]}{p[1]})"
    )
    repeated = st.tuples(group, st.sampled_from(REPEATS)).map("".join)
    return st.one_of(
        repeated,
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
    )


PATTERNS = st.recursive(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map("".join), wrapped, max_leaves=8
)
NAMES = st.text("ab.c7_-{", max_size=9)


@settings(max_examples=600, deadline=None)
@given(PATTERNS, NAMES)
@example("a)|(b", "xb")
@example("(a|ab)(c|bcd)*", "abcd")
@example("a*+", "")
def test_the_verdict_is_that_of_re(key: str, name: str) -> None:
    try:
        wanted = re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error:
        with pytest.raises(InputError):
            Pattern(key)
        return
    if re.search(r"[*+?}]\+", key):  # possessive, as Python 3.11 reads it
        with pytest.raises(UnsupportedError):
            Pattern(key)
        return
    assert Pattern(key).matches(name) == wanted


@pytest.mark.parametrize(
    "key",
    ["(a+)+", "(a|a)*", "(a|aa)+", "(((a*)*)*)*", "((a{1,50}){1,50}){1,50}", "(.*a){20}", "a?" * 60
     + "a" * 60, ".*.*.*.*.*.*.*.*.*b"],
)  # fmt: skip
def test_hostile_patterns_finish(key: str) -> None:
    # With re, each of these takes longer than anybody waits.
    assert not Pattern(key).matches("a" * 59 + "!")


@pytest.mark.parametrize(
    "key",
    [
        r"(a)\1", "(?=a)b", "(?!a)b", "(?<=a)b", "(?P<x>a)(?P=x)",
        "a" * 600, "(" * 40 + ")" * 40,
    ],
)  # fmt: skip
def test_what_is_not_regular_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedError, match="pattern"):
        Pattern(key)


@pytest.mark.parametrize("key", ["(", "a**", "[", "*", "a{2,1}", r"\q", "a)"])
def test_what_is_no_pattern_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="no regular expression"):
        Pattern(key)


def test_the_first_pattern_of_the_file_comes_first() -> None:
    table = PatternTable({r"model\.layers\.1\.q": 1, "layers.*q": 2, "q": 3}, "alpha_pattern")
    assert [value for _, value in table.all("model.layers.1.q")] == [1, 2, 3]
    assert [value for _, value in table.all("model.layers.2.q")] == [2, 3]
    assert table.all("model.layers.1.r") == []


def test_too_many_patterns_for_too_many_modules_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "_MOST_STEPS", 20_000)
    table = PatternTable({f"(a|b)*{n}": n for n in range(100)}, "alpha_pattern")
    with pytest.raises(UnsupportedError, match="too many patterns"):
        for n in range(100):
            table.all(f"model.{n}")


def test_many_modules_that_are_named_in_full_cost_nothing() -> None:
    table = PatternTable({re.escape(f"m.{n}.q"): n for n in range(20_000)}, "alpha_pattern")
    assert all(table.all(f"m.{n}.q")[0][1] == n for n in range(20_000))
