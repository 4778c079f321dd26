"""The tutorial is run, from the model to the Hub and back; it prints what the page says."""

from pathlib import Path

import pytest

from tools.pages import Example, examples, loopback_hub, run, wording

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
Ran = list[tuple[Example, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Every block, and what it printed."""
    with loopback_hub(tmp_path_factory.mktemp("home")) as variables:
        return [
            (example, run(example, folder, variables))
            for example in examples(PAGE.read_text(encoding="utf-8"))
        ]


def writes_text(example: Example) -> bool:
    """Tell whether a model writes freely in it, which another Python's manual makes otherwise."""
    return "generate" in example.code or "xllamacpp" in example.code


def output_of(ran: Ran, words: str) -> str:
    (found,) = [output for example, output in ran if words in example.code]
    return found


def test_commands_print_what_the_page_says(ran: Ran) -> None:
    shown = [(example, output) for example, output in ran if example.shown is not None]
    assert len(shown) >= 12
    for example, output in shown:
        assert output.strip(), example.code
        if not writes_text(example):
            assert wording(output) == wording(example.shown or ""), example.code


def test_it_learns(ran: Ran) -> None:
    rows = [line.split() for line in output_of(ran, "loraformat eval").splitlines()[1:3]]
    (_, _, base, _), (_, _, adapted, change) = rows
    assert float(adapted) < 0.93 * float(base)
    assert float(change) < 0


def test_llama_cpp_writes_what_generate_wrote(ran: Ran) -> None:
    base = output_of(ran, "generate my-bundle --prompt")
    ours = output_of(ran, "generate my-bundle --adapter")
    # Not all of it: a later token may be a tie between values in NF4 and in float16.
    assert output_of(ran, "xllamacpp")[:24] == ours[:24]
    assert base[:24] != ours[:24]


def test_what_it_makes_is_there(ran: Ran, folder: Path) -> None:
    made = ["errors.png", "mine.run/loss.png", "merged.gguf", "fetched/training_record.json"]
    assert not [name for name in made if not (folder / name).stat().st_size]
    assert "perplexity" in (folder / "fetched" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in (folder / "plan.txt").read_text(encoding="utf-8")
