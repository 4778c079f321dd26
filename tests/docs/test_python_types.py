"""The Python of the documents under ``mypy --strict``: public functions have usable types."""

from pathlib import Path

import pytest
from mypy import api

from tools.pages import examples

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/python.md", "docs/training.md")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what mypy says of every block, each a module of its own."""
    folder = tmp_path_factory.mktemp("blocks")
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = [example.code for example in examples(text) if example.language == "python"]
        assert blocks
        for number, code in enumerate(blocks, 1):
            name = page.replace("/", "_").replace(".", "_")
            (folder / f"{name}_{number}.py").write_text(code, encoding="utf-8")
    (folder / "wrong.py").write_text("import loraformat\nloraformat.info(1).path + 1\n")
    found, problems, _ = api.run(
        ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary",
         *map(str, sorted(folder.glob("*.py")))]
    )  # fmt: skip
    assert problems == ""
    return found


def test_what_is_wrong_is_found(said: str) -> None:
    """Types reach the caller: were the names Any, nothing below could fail."""
    wrong = [line for line in said.splitlines() if "wrong.py" in line]
    assert len(wrong) == 2 and "arg-type" in wrong[0] and "operator" in wrong[1]


def test_every_block_has_types(said: str) -> None:
    assert [line for line in said.splitlines() if "wrong.py" not in line] == []
