"""What the documents show is run: every command of the README, every block of Python."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraformat.demo import ADAPTERS, SMALL_MODEL

ROOT = Path(__file__).parents[2]
#: These are run in tests/hub, where there is one.
ON_THE_HUB = re.compile(r"loraformat (push|pull) ")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).splitlines()
    return [line.split("   #")[0].strip() for line in lines if line.startswith("loraformat ")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(SMALL_MODEL, tmp_path / "my-model")
    for adapter, names in (("manual", ("A", "my-adapter")), ("tests", ("B", "other-adapter"))):
        for name in names:
            shutil.copytree(ADAPTERS[adapter], tmp_path / name)
    for name in ("data.jsonl", "held-out.jsonl"):
        rows = [{"prompt": "To be", "completion": f" or not to be, {n}"} for n in range(6)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> subprocess.CompletedProcess[str]:
    arguments = shlex.split(line)[1:]
    return subprocess.run(
        [sys.executable, "-m", "loraformat", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_readme_commands_run_in_order(workplace: Path) -> None:
    lines = [line for line in commands("README.md") if not ON_THE_HUB.match(line)]
    assert len(lines) >= 14
    for line in lines:
        result = run(line)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
    assert (workplace / "dense" / "model.safetensors").exists()
    assert (workplace / "spectrum.png").exists()


def test_gguf_commands_run_in_order(workplace: Path) -> None:
    lines = commands("docs/gguf.md")
    assert len(lines) >= 6
    assert run("loraformat merge my-model A -o tuned").returncode == 0
    for line in lines:
        result = run(line)
        assert result.returncode == 0, f"{line}\n{result.stderr}"


def test_training_commands_run_in_order(workplace: Path) -> None:
    lines = commands("docs/training.md")
    assert len(lines) >= 5
    for line in lines:
        result = run(line)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
    for directory in (workplace / "mine", workplace / "mine.run"):
        shutil.rmtree(directory)
    (snippet,) = blocks("docs/training.md", "python")
    exec(compile(snippet, "docs/training.md", "exec"), {})
    assert (workplace / "mine" / "adapter_model.safetensors").exists()


def test_runtime_commands_run_in_order(workplace: Path) -> None:
    """The manual's adapter has rank 24, which one runtime pads: found (4), then fixed."""
    codes = [run(line).returncode for line in commands("docs/runtimes.md")]
    assert codes == [4, 0, 0]
    assert (workplace / "run" / "Modelfile").exists()


@pytest.fixture
def tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as docs/adapters.md wants it."""
    shutil.copytree(SMALL_MODEL, tmp_path / "my-model")
    for name, adapter in ADAPTERS.items():
        shutil.copytree(adapter, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wording(text: str) -> str:
    """Return a command's output without its numbers, which may differ in their last digit."""
    return " ".join(re.sub(r"\d[\d.,]*(e-\d+)?", "0", text).split())


def test_the_tutorial_prints_what_it_says(tutorial: Path) -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```sh\n(loraformat .*)\n```\n\n```text\n((?:.*\n)*?)```$", text, re.M)
    assert len(shown) >= 9
    assert len(shown) == len(re.findall(r"^```sh\nloraformat ", text, re.M)), (
        "a command without output"
    )
    for line, printed in shown:
        result = run(line)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        for part in printed.split("...\n"):
            assert wording(part) in wording(result.stdout), line
    assert (tutorial / "spectrum.png").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_blocks_run_in_order(page: str, workplace: Path) -> None:
    snippets = blocks(page, "python")
    assert snippets
    if page == "README.md":
        # Its first block opens the bundle that the second makes.
        snippets = snippets[::-1]
    for number, snippet in enumerate(snippets):
        if 'convert("my-model", "my-bundle"' in snippet:
            shutil.rmtree(workplace / "my-bundle", ignore_errors=True)
        exec(compile(snippet, f"{page}, block {number}", "exec"), {})


def test_links_lead_somewhere() -> None:
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("converters/*.md"),
        *ROOT.glob("spec/*.md"),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("README.md", "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", ["make_cli_docs.py", "make_runtime_docs.py"])
def test_made_pages_are_up_to_date(name: str) -> None:
    tool = ROOT / "tools" / name
    result = subprocess.run(
        [sys.executable, tool, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
