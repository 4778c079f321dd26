"""``loraformat merge`` and ``unmerge`` on the command line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from loraformat.cli import main
from tests.adapters.merging import Q, gauss, save_model, weights_of


@pytest.fixture
def run(capsys):
    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return call


@pytest.fixture
def files(tmp_path):
    """A base, and a PEFT adapter of its one linear."""
    base = save_model(tmp_path / "base", {Q: gauss(64, 32).bfloat16()})
    save_adapter(tmp_path / "adapter", Q)
    return base, tmp_path / "adapter", tmp_path / "out", tmp_path / "undo.lfu"


def save_adapter(path, name):
    path.mkdir()
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    tensors = {
        f"{prefix}.lora_A.weight": 0.1 * gauss(4, 32, seed=1),
        f"{prefix}.lora_B.weight": 0.1 * gauss(64, 4, seed=2),
    }
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))


def test_there_and_back(run, files, tmp_path):
    base, adapter, out, undo = files
    code, text, _ = run("merge", base, adapter, "-o", out, "--undo", undo, "--modules")
    assert code == 0
    assert "wrote safetensors" in text and "bits per weight" in text and Q in text
    code, text, _ = run("unmerge", out, "--undo", undo, "-o", tmp_path / "back")
    assert code == 0
    assert "the original" in text
    assert torch.equal(weights_of(base)[Q], weights_of(tmp_path / "back")[Q])


def test_json_and_quiet(run, files, tmp_path):
    base, adapter, out, undo = files
    code, text, _ = run("merge", base, adapter, "-o", out, "--undo", undo, "--json", "--quiet")
    report = json.loads(text)
    assert (code, report["schema"], report["merged"]) == (0, "loraformat.merge", 1)
    code, text, _ = run("unmerge", out, "--undo", undo, "-o", tmp_path / "b", "--json", "-q")
    report = json.loads(text)
    assert (code, report["schema"], report["exact"]) == (0, "loraformat.unmerge", True)
    assert run("unmerge", out, "--adapter", adapter, "-o", tmp_path / "c", "-q") == (0, "", "")
    assert run("merge", base, adapter, "-o", tmp_path / "d", "-q") == (0, "", "")


def test_exit_codes(run, files, tmp_path):
    base, adapter, out, undo = files
    assert run("merge", base, "-o", out)[0] == 2
    assert run("merge", base, adapter, "-o", out, "--weight", 1, "--weight", 2)[0] == 2
    assert run("merge", base, adapter, "-o", out, "--to", "loraformat")[0] == 2
    assert run("merge", base, tmp_path / "nowhere", "-o", out)[0] == 3
    assert run("unmerge", base, "-o", out)[0] == 2
    assert run("unmerge", base, "--undo", tmp_path / "nowhere", "-o", out)[0] == 3
    assert run("merge", base, adapter, "-o", out, "--undo", undo)[0] == 0
    code, _, message = run("merge", base, adapter, "-o", out)
    assert (code, message.count("\n")) == (5, 1)
    save_adapter(tmp_path / "other", Q.replace("q_proj", "q_prj"))
    code, _, message = run("merge", base, tmp_path / "other", "-o", tmp_path / "new")
    assert (code, message.count("\n")) == (3, 1)
    assert "q_proj" in message
