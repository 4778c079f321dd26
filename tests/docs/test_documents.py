"""What the documents show is run: every command of the README, every block of Python."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest

import loraformat
import loraformat.train
from loraformat.demo import ADAPTERS, SMALL_MODEL
from tests.adapters import moe_models
from tools.pages import elided, examples, figures, wording
from tools.pages import run as run_block

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


def test_the_page_on_adapters_prints_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    found = examples(page)
    assert len(found) >= 10
    for example in found:
        output = run_block(example, tmp_path, {"HF_HUB_OFFLINE": "1"})
        if example.shown is not None:
            output = elided(output)
            assert wording(output) == wording(example.shown), example.code
            # Another machine's LAPACK may find another last digit, or one rank more.
            assert figures(output) == pytest.approx(figures(example.shown), rel=0.05, abs=1e-4)
    assert (tmp_path / "spectrum.png").exists()


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


def test_the_page_on_mixtures_is_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = moe_models.make("qwen3_moe")
    model.save_pretrained("my-model")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=stacks)
    peft.get_peft_model(model, config).save_pretrained("my-adapter")
    assert [run(line).returncode for line in commands("docs/mixtures.md")] == [0] * 6
    made: dict[str, Any] = {}
    for snippet in blocks("docs/mixtures.md", "python"):
        exec(compile(snippet, "docs/mixtures.md", "exec"), made)
    assert type(made["model"]).__name__ == "Qwen3MoeForCausalLM"


def test_every_public_name_is_in_the_page_on_python() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    public = {*loraformat.__all__, *loraformat.train.__all__} - {"__version__", "Batch"}
    assert not {name for name in public if not re.search(rf"\b{name}\b", text)}


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {page for page in pages if f"({page})" not in index}
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_with_commands_is_run_somewhere() -> None:
    """A new page with commands needs a test, and a line here."""
    run_here = {"adapters", "gguf", "mixtures", "python", "runtimes", "training", "tutorial"}
    run_in_hub = {"hub"}
    with_blocks = {
        path.stem
        for path in (ROOT / "docs").glob("*.md")
        if re.search(r"^```(sh|python)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert with_blocks == run_here | run_in_hub


def test_every_picture_is_shown_and_small() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert len(pictures) >= 3
    for path in pictures:
        assert f"(pictures/{path.name})" in shown
        assert path.stat().st_size <= 60_000


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


@pytest.mark.parametrize("name", ["make_cli_docs.py", "make_model_docs.py", "make_runtime_docs.py"])
def test_made_pages_are_up_to_date(name: str) -> None:
    tool = ROOT / "tools" / name
    result = subprocess.run(
        [sys.executable, tool, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
