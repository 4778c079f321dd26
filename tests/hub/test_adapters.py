"""Adapters from the Hub: by themselves, in a bundle in the cache, and as pickles."""

import json
import shutil

import numpy
import torch
from safetensors.numpy import save_file

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from tests.hub.conftest import BASE_COMMIT, Repository, files_of


def write_adapter(path):
    path.mkdir()
    random = numpy.random.default_rng(0)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": random.standard_normal((4, 64), dtype=numpy.float32),
        f"{prefix}.lora_B.weight": random.standard_normal((64, 4), dtype=numpy.float32),
    }
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (path / "README.md").write_text("# An adapter")
    return tensors


def test_an_adapter_goes_into_a_bundle(ask, hub, hub_bundle, tmp_path):
    write_adapter(tmp_path / "adapter")
    hub.repositories["org/adapter"] = Repository(files_of(tmp_path / "adapter"))
    result = ask("convert", "org/adapter@v1", "bundle/adapters/polite")
    assert (result.returncode, result.stderr) == (0, "")
    assert "peft org/adapter" in result.stdout
    assert files_of(tmp_path / "bundle" / "adapters" / "polite") == files_of(tmp_path / "adapter")
    assert ask("verify", "bundle").returncode == 0
    assert ask("info", "org/adapter").returncode == 0


def test_an_adapter_of_a_bundle_in_the_cache(ask, hub, hub_bundle, tmp_path):
    write_adapter(tmp_path / "adapter")
    convert(tmp_path / "adapter", hub_bundle / "adapters" / "polite")
    hub.repositories["org/bundle"] = Repository(files_of(hub_bundle), "b" * 40)
    result = ask("info", "org/bundle")
    assert "polite, rank 4" in result.stdout, result.stderr
    assert ask("verify", "org/bundle").returncode == 0
    cached = tmp_path / "hf-home" / "hub" / "models--org--bundle" / "snapshots" / ("b" * 40)
    result = ask("convert", cached / "adapters" / "polite", "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "adapter")
    result = ask("convert", "adapter", cached / "adapters" / "another")
    assert result.returncode in (3, 5)
    assert (cached / "loraformat.json").is_symlink()


def test_a_pickle_is_fetched_only_on_request(ask, hub, tmp_path):
    tensors = write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(value) for name, value in tensors.items()},
        tmp_path / "adapter" / "adapter_model.bin",
    )
    hub.repositories["org/old"] = Repository(files_of(tmp_path / "adapter"))
    assert ask("convert", "org/old", "out").returncode == 3
    assert "adapter_model.bin" not in hub.bodies()
    result = ask("convert", "org/old", "out", "--allow-pickle")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_checking_one_from_the_hub_names_its_base_by_its_id(ask, hub, tmp_path):
    write_adapter(tmp_path / "adapter")
    hub.repositories["org/adapter"] = Repository(files_of(tmp_path / "adapter"))
    arguments = ("--base", "org/dense", "--runtime", "transformers")
    result = ask("check", "org/adapter@main", *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["verdicts"] == {"transformers": "right"}
    result = ask("check", "org/adapter", *arguments, "--fix", "-o", "fixed", "--write", "run")
    assert (result.returncode, result.stderr) == (0, "")
    config = json.loads((tmp_path / "fixed" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/dense"
    assert 'base = "org/dense"' in (tmp_path / "run" / "run_transformers.py").read_text()


def test_a_gguf_file_that_is_all_there_is(ask, push, shelf, tmp_path):
    """``push`` makes such repositories."""
    shutil.copytree(
        SMALL_MODEL, tmp_path / "config-only", ignore=shutil.ignore_patterns("*.safetensors")
    )
    convert(tmp_path / "adapter", tmp_path / "polite.gguf", base=tmp_path / "config-only")
    assert push("polite.gguf", "me/polite", "--base-model", "org/base").returncode == 0
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = ask("info", "me/polite", "--json", **environment)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["format"] == "gguf-lora"
    assert ask("verify", "me/polite").returncode == 0
    shelf.repositories["me/polite"].files["another.gguf"] = b"GGUF"
    result = ask("info", "me/polite")
    assert result.returncode == 3
    assert result.stderr == (
        "error: me/polite: holds 2 GGUF files, another.gguf, polite.gguf; download one: "
        "loraformat pull me/polite DST --include NAME\n"
    )


def test_an_adapter_inside_a_bundle_on_the_hub(ask, hub, hub_bundle, tmp_path):
    write_adapter(tmp_path / "adapter")
    convert(tmp_path / "adapter", hub_bundle / "adapters" / "polite")
    hub.repositories["org/bundle"] = Repository(files_of(hub_bundle), "b" * 40)
    shutil.rmtree(hub_bundle)
    for word in ("org/bundle", "org/bundle@v1"):
        result = ask("convert", f"{word}/adapters/polite", f"out-{len(word)}", "--quiet")
        assert (result.returncode, result.stderr) == (0, "")
        assert files_of(tmp_path / f"out-{len(word)}") == files_of(tmp_path / "adapter")
    assert ask("verify", "org/bundle/adapters/polite").returncode == 0
    assert ask("merge", "org/bundle", "org/bundle/adapters/polite", "-o", "m").returncode == 0
    assert ask("info", "org/bundle/adapters/rude").returncode == 3
    assert ask("info", "org/nowhere/adapters/polite").returncode == 7


def test_another_commit_of_the_base(ask, shelf, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for commit, rules in ((BASE_COMMIT, []), ("a" * 40, ["BASE_REVISION"]), ("main", [])):
        path.write_text(json.dumps({**config, "revision": commit}))
        result = ask("check", "adapter", "--base", "org/base", "--runtime", "sglang", "--json")
        findings = json.loads(result.stdout)["findings"]
        found = [(finding["rule"], finding["level"]) for finding in findings]
        assert found == [(rule, "warn") for rule in rules], result.stderr
