"""reduce, combine, spectrum and extract as verbs: words in, tables, JSON and exit codes out."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loraformat import plugins
from loraformat.cli import main
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.opening.adapter import open_adapter
from loraformat.testing import save
from tests.adapters.memory_adapters import effects, in_memory, random_adapter
from tests.adapters.test_extract import pair


class Shelf:
    """Adapters in the current directory, by name."""

    def __contains__(self, name):
        return Path(name).exists()

    def __getitem__(self, name):
        """Return an adapter with all its factors in memory."""
        with open_adapter(name) as adapter:
            return in_memory(adapter)

    def drop(self, name):
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """Two adapters, and room for what a verb writes."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        write_adapter(random_adapter(number), name)
    return Shelf()


@pytest.fixture
def models(tmp_path):
    """A base and its fine-tune on disk."""
    base, tuned, _ = pair(name="model.layers.0.self_attn.q_proj.weight", model_type="llama")
    safetensors = plugins.get("safetensors")
    return save(safetensors, base, tmp_path / "base"), save(safetensors, tuned, tmp_path / "tuned")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=out, err=err)

    return call


def calls(models):
    return {
        "reduce": ["reduce", "a", "-o", "out", "--rank", 2],
        "dry run": ["reduce", "a", "-o", "out", "--budget", "1k", "--max-rank", 3, "--dry-run"],
        "combine": ["combine", "a", "b", "-o", "out", "--weight", 1, "--weight", -0.5],
        "ties": ["combine", "a", "b", "-o", "out", "--method", "ties", "--density", 0.3],
        "spectrum": ["spectrum", "a"],
        "extract": ["extract", *models, "-o", "out", "--rank", "auto"],
        "dry combine": ["combine", "a", "b", "-o", "out", "--dry-run"],
        "dry extract": ["extract", *models, "-o", "out", "--energy", 0.9, "--dry-run"],
    }


CALLS = list(calls(["base", "tuned"]))


@pytest.mark.parametrize("call", CALLS)
def test_text_json_and_silence(shelf, models, run, call):
    arguments = calls(models)[call]
    shown = run(*arguments)
    assert (shown.code, shown.err) == (0, "")
    assert "q_proj.weight" in shown.out
    assert max(map(len, shown.out.splitlines())) < 160 + len(str(models[0]))
    assert ("out" in shelf) == (call != "spectrum" and "--dry-run" not in arguments)
    shelf.drop("out")
    members = json.loads(run(*arguments, "--json").out)
    assert members["schema"] == f"loraformat.{arguments[0]}"
    assert members["schema_version"] == 1
    assert members["modules"][0]["target"].endswith("q_proj.weight")
    shelf.drop("out")
    quiet = run(*arguments, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_what_is_written_is_what_was_computed(shelf, run):
    assert run("combine", "a", "b", "-o", "out", "--method", "linear", "--weight", "2",
               "--weight", "-1").code == 0  # fmt: skip
    for target, d in effects(shelf["out"]).items():
        expected = 2 * effects(shelf["a"])[target] - effects(shelf["b"])[target]
        assert torch.allclose(d, expected, atol=1e-4)


def test_a_picture(shelf, run, tmp_path):
    assert run("spectrum", "a", "--plot", tmp_path / "s.png", "--quiet").code == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["reduce", "a", "-o", "out"], 2),
        (["reduce", "a", "-o", "out", "--rank", "2", "--energy", "0.5"], 2),
        (["reduce", "a", "-o", "out", "--budget", "lots"], 2),
        (["reduce", "a", "-o", "out", "--budget", "1"], 3),
        (["reduce", "a", "--rank", "2"], 2),
        (["reduce", "nothing", "-o", "out", "--rank", "2"], 3),
        (["reduce", "a", "-o", "b", "--rank", "2"], 5),
        (["combine", "a", "b", "-o", "out", "--weight", "1"], 2),
        (["combine", "a", "b", "-o", "out", "--method", "mean"], 2),
        (["combine", "a", "b", "-o", "out", "--method", "cat", "--rank", "3"], 2),
        (["combine", "a", "a", "-o", "out", "--weight", "1", "--weight", "-1"], 3),
        (["combine", "-o", "out"], 2),
        (["spectrum", "nothing"], 3),
        (["spectrum", "a", "--plot", "picture.xyz"], 2),
        (["extract", "nowhere", "nowhere", "-o", "out", "--rank", "2"], 3),
        (["extract", "nowhere", "nowhere", "-o", "out"], 3),
        (["extract", "a", "b", "-o", "out", "--rank", "2", "--energy", "0.5"], 2),
        (["extract", "nowhere", "nowhere", "-o", "out", "--rank", "some"], 2),
        (["extract", "nowhere", "nowhere", "-o", "out", "--rank", "0"], 2),
    ],
)
def test_exit_codes(shelf, run, arguments, code):
    result = run(*arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.rstrip().splitlines()[-1].lower().startswith("error: ")
    assert "out" not in shelf


def test_force(shelf, run):
    assert run("reduce", "a", "-o", "b", "--rank", "2", "--force").code == 0
    assert {change.rank for change in shelf["b"].deltas.values()} == {2}
