"""Patterns of names: the verdict of Python's own engine, without its running time."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraformat_converters.peft import pattern_table
from loraformat_converters.peft.pattern_table import PatternTable
from loraformat_converters.peft.patterns import Budget, Pattern, TooCostlyError

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
@example(r"a*\.b", "a.b")
@example("(a|b)*.c", "c")
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
    with pytest.raises(InputError, match="not a regular expression"):
        Pattern(key)


def test_the_first_pattern_of_the_file_comes_first() -> None:
    table = PatternTable({r"model\.layers\.1\.q": 1, "layers.*q": 2, "q": 3}, "alpha_pattern")
    assert [value for _, value in table.all("model.layers.1.q")] == [1, 2, 3]
    assert [value for _, value in table.all("model.layers.2.q")] == [2, 3]
    assert table.all("model.layers.1.r") == []


def test_too_many_patterns_for_too_many_modules_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(pattern_table, "_MOST_STEPS", 2_000)
    table = PatternTable({f"(a|b)*{n}": n for n in range(100)}, "alpha_pattern")
    with pytest.raises(UnsupportedError, match="too many patterns"):
        for n in range(100):
            table.all(f"model.{n}")


COSTLY = [
    *(rf"(?:(?:(?:\w?){{60}}){{60}}){{{count}}}[xy]" for count in (50, 60)),
    r"(?:(?:\w{0,60}){60}\w?){512}[xy]",
]


@pytest.mark.parametrize("key", COSTLY)
def test_what_costs_much_is_refused_when_its_budget_is_spent(key: str) -> None:
    table = PatternTable({key: 1}, "alpha_pattern")
    with pytest.raises(UnsupportedError, match=r"alpha_pattern.*intricate.*one pattern for each"):
        for number in range(10_000):
            table.all(f"model.layers.{number}.{'a' * 420}.q_proj")


def test_every_step_of_a_repetition_is_counted() -> None:
    budget = Budget(10_000)
    assert not Pattern(r"(?:\w?){60}[xy]").matches("a" * 70, budget)
    assert 70 < 10_000 - budget.left < 10_000
    with pytest.raises(TooCostlyError):
        Pattern(r"(?:(?:\w?){60}){60}[xy]").matches("a" * 70, Budget(4_000))


def test_patterns_that_cost_much_to_compile_are_refused() -> None:
    for keys in ([f"a*{n}" for n in range(5000)], [f"[\u0100-\uffff]*{n}" for n in range(60)]):
        with pytest.raises(UnsupportedError, match="too many patterns"):
            PatternTable(dict.fromkeys(keys, 1), "rank_pattern")


@pytest.mark.parametrize(
    "name", ["m.10.q", "xm.1.q", "m.1.qq", "m1.q", "m.1.q", "mx1.q", "a.m.1.q"]
)
def test_a_dot_in_a_name_stands_for_any_character(name: str) -> None:
    keys = ["m.1.q", r"m\.1\.q", r"m\.1.q", "1.q", "q", "m...q", r"m.1\-q"]
    wanted = [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
    assert [key for key, _ in PatternTable(dict.fromkeys(keys, 1), "f").all(name)] == wanted


def test_many_modules_that_are_named_in_full_cost_nothing() -> None:
    table = PatternTable({re.escape(f"m.{n}.q"): n for n in range(20_000)}, "alpha_pattern")
    assert all(table.all(f"m.{n}.q")[0][1] == n for n in range(20_000))
    table = PatternTable({f"m.{n}.q": n for n in range(20_000)}, "alpha_pattern")  # as PEFT does
    assert all(table.all(f"m.{n}.q")[0][1] == n for n in range(20_000))
