"""The word checker finds planted phrases where users read them, and nothing elsewhere."""

from pathlib import Path

import pytest

from tools.check_words import findings, main, words

PLANTED = '''\
"""The house of a module."""

swallowed = "house"  # the house, in a comment


def mend(swallowed):
    """Return a sum.

    What is told here is not a first line.
    """
    return f"{swallowed} written " "anew", "mends"
'''


def found(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return [line.removeprefix(f"{path}:") for line in findings(path, words())]


def test_a_module(tmp_path: Path) -> None:
    assert found(tmp_path / "module.py", PLANTED) == [
        "1: 'The house'; use: layout, package",
        "11: 'written anew'; use: converted, rewritten",
    ]


def test_a_page(tmp_path: Path) -> None:
    page = "# A page\n\nAn adapter is written\nanew.\n"
    assert found(tmp_path / "page.md", page) == ["3: 'written anew'; use: converted, rewritten"]


def test_whole_words_only(tmp_path: Path) -> None:
    assert found(tmp_path / "page.md", "commended, recommends, greenhouse, the household\n") == []


def test_a_planted_phrase_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("`check` mends it.\n")
    assert main([str(page)]) == 1
    assert "page.md:1: 'mends'; use: fix" in capsys.readouterr().err


def test_the_tree_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0, capsys.readouterr().err


def test_a_broken_line(tmp_path: Path) -> None:
    broken = tmp_path / "words.txt"
    broken.write_text("mend\n")
    with pytest.raises(ValueError, match="not PATTERN => TERM: mend"):
        words(broken)
