"""`check` says of transformers what PEFT does: adapters that it loads, ignores and refuses."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import bases
import peft
import pytest
import torch
from bases import make_base, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraformat.cli import main
from loraformat.ops.check.check import check
from loraformat.ops.merge.merge import merge

WEIGHTS = "adapter_model.safetensors"
TEXT = "model.layers."


def opened(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def trained(base, target, rows=None, save=None, **settings):
    """A random adapter that PEFT saves; of a resized vocabulary if `rows` are given."""
    torch.manual_seed(0)
    model = opened(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(**defaults | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(target, **(save or {}))
    return target


def in_peft(base, adapter) -> str:
    """What PEFT does: ``works``, ``nothing``, or ``raises``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(opened(base), adapter)
        except Exception:
            return "raises"
    apart = bases.apart(run(model.eval(), "llama"), run(opened(base), "llama"))
    return "works" if apart > 1e-6 else "nothing"


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def emptied(word):
    return lambda tensors: {
        name: torch.zeros(0) if word in name else tensor for name, tensor in tensors.items()
    }


WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
#: What PEFT is asked to train, and how its file is changed after that.
ADAPTERS = {
    "plain": ({}, None),
    "all linears": ({"target_modules": "all-linear"}, None),
    "a regular expression": ({"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"}, None),
    "a costly expression": ({"target_modules": r".*layers.*\.self_attn.*\.(q|v)_proj"}, None),
    "one layer": ({"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]}, None),
    "ranks": ({"rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}, None),
    "other ranks than it says": ({"target_modules": ["q_proj"]}, {"r": 8}),
    "a module that it does not name": ({"target_modules": ["q_proj", "v_proj"]},
                                       {"target_modules": ["v_proj"]}),
    "DoRA": ({"use_dora": True}, None),
    "the embedding": ({"target_modules": ["embed_tokens", "lm_head"]}, None),
    "whole modules": (WHOLE, None),
    "whole modules, empty": (WHOLE, lambda tensors: {
        n: t if "lora_" in n else torch.zeros(0) for n, t in tensors.items()}),
    "whole modules of more tokens": (WHOLE | {"rows": 2052}, None),
    "whole modules of fewer tokens": (WHOLE | {"rows": 2040}, None),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [7, 9]}}, None),
    "tokens beyond the vocabulary": (
        {"trainable_token_indices": {"embed_tokens": [7, 2050]}, "rows": 2052,
         "save": {"save_embedding_layers": False}}, None),
    "names of a wrapped model": ({}, renamed(TEXT, "model.language_model.layers.")),
    "old names of a wrapped model": ({}, renamed(TEXT, "language_model.model.layers.")),
    "a doubled prefix": ({}, renamed(TEXT, "model.model.layers.")),
    "no prefix": ({}, renamed("base_model.model.", "")),
    "its own name": ({}, renamed(".weight", ".polite.weight")),
    "the default name": ({}, renamed(".weight", ".default.weight")),
    "compiled": ({}, renamed("base_model.", "_orig_mod.base_model.")),
    "never gathered": ({}, emptied("lora_")),
    "half of it never gathered": ({}, emptied("lora_B")),
    "no tensors": ({}, lambda tensors: {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_check_says_is_what_peft_does(base, name, tmp_path):
    settings, change = ADAPTERS[name]
    adapter = trained(base, tmp_path / "adapter", **settings)
    if callable(change):
        tensors = change(load_file(adapter / WEIGHTS))
        save_file({n: t.contiguous() for n, t in tensors.items()}, adapter / WEIGHTS)
    elif change is not None:
        config = adapter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    report = check(adapter, base=base, runtime=["transformers"])
    truth = in_peft(base, adapter)
    partly = any(finding.rule == "LOAD_IGNORES" for finding in report.findings)
    assert report.failed == (truth != "works" or partly), report.findings
    assert report.facts.loading is None or report.facts.loading.proven


def test_a_base_of_another_size(tmp_path, base):
    adapter = trained(base, tmp_path / "adapter", target_modules="all-linear")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    config["intermediate_size"] += 32
    AutoModelForCausalLM.from_config(type(opened(base).config)(**config)).save_pretrained(other)
    (finding,) = check(adapter, base=other, runtime=["transformers"]).findings
    assert (finding.rule, finding.level) == ("LOAD_OTHER_BASE", "fail")
    assert "wanted [" in finding.what
    assert in_peft(other, adapter) == "raises"
    assert shlex.split(finding.command)[-1] == str(base)  # which the adapter names
    assert followed(finding) == 0
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config_of(adapter) | {"base_model_name_or_path": str(other)})
    )
    (finding,) = check(adapter, base=other, runtime=["transformers"]).findings
    assert finding.command.endswith("--base BASE")


def config_of(adapter) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def followed(finding) -> int:
    """Run the command of a finding; return its status."""
    words = shlex.split(finding.command)
    assert words[0] == "loraformat"
    more = ["--runtime", "transformers"] if words[1] == "check" else []
    with pytest.raises(SystemExit) as left:
        main([*words[1:], *more, "--quiet"])
    return left.value.code


def of_experts(base, folder):
    """Its config names the fused experts in PEFT's two ways, by which PEFT doubles a rank."""
    base = make_base("mixtral", folder / "mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = trained(base, folder / "adapter", target_parameters=names)
    return base, adapter, {"target_modules": ["q_proj", "w1", "w3"]}


UNLOADABLE = {
    "another rank than its tensors": lambda base, folder: (
        base, trained(base, folder / "adapter"), {"r": 8}),
    "a module too many": lambda base, folder: (
        base, trained(base, folder / "adapter"), {"modules_to_save": ["nothing"], "r": 16}),
    "experts": of_experts,
}  # fmt: skip


@pytest.mark.parametrize("name", UNLOADABLE)
def test_what_fits_but_does_not_load_is_written_anew(base, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, adapter, change = UNLOADABLE[name](base, tmp_path)
    expected = merged(base, adapter, tmp_path / "before")
    (adapter / "adapter_config.json").write_text(json.dumps(config_of(adapter) | change))
    assert in_peft(base, adapter) == "raises"
    (finding,) = check(adapter, base=base, runtime=["transformers"]).findings
    assert finding.rule == "LOAD_FAILS"
    assert followed(finding) == 0
    assert check("adapter-rewritten", base=base).verdicts["transformers"] == "right"
    assert in_peft(base, "adapter-rewritten") == "works"
    if "r" not in change:  # of which the scaling is a part
        found = merged(base, "adapter-rewritten", tmp_path / "after")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def merged(base, adapter, target) -> dict[str, torch.Tensor]:
    merge(base, [adapter], target)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("rows", [2052, 2040])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_another_vocabulary_is_merged(base, tmp_path, monkeypatch, rows, tied):
    monkeypatch.chdir(tmp_path)
    if tied:
        base = make_base("llama-tied", tmp_path / "tied")
    whole = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapter = trained(base, tmp_path / "adapter", rows, modules_to_save=whole)
    (finding,) = (
        f for f in check(adapter, base=base, runtime=["transformers"]).findings
        if f.rule.startswith("LOAD")
    )  # fmt: skip
    assert finding.rule == "LOAD_RESIZED"
    here = opened(base).get_input_embeddings().weight.shape[0]
    assert f"for {rows} tokens, and this base has {here}" in finding.what
    assert followed(finding) == 0
    model = opened(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    apart = bases.apart(run(model, "llama"), run(opened("adapter-merged"), "llama"))
    assert apart < 1e-4


def test_of_fused_experts_peft_knows_the_ranks(tmp_path):
    """Rank and names of experts are PEFT's own matter: it doubles the one, and nests the other."""
    base = make_base("mixtral", tmp_path / "mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = trained(base, tmp_path / "adapter", target_parameters=names)
    assert not check(adapter, base=base, runtime=["transformers"]).findings
    wrong = tmp_path / "wrong"
    shutil.copytree(adapter, wrong)
    config = json.loads((wrong / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "w1", "w3"]
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    assert check(wrong, base=base, runtime=["transformers"]).failed
    assert in_peft(base, wrong) == "raises"


@pytest.mark.parametrize("missing", ["peft", "transformers"])
@pytest.mark.parametrize("name", ["plain", "a doubled prefix", "no prefix", "never gathered",
                                  "whole modules of more tokens"])  # fmt: skip
def test_without_peft_only_the_plain_is_called_right(base, missing, name, tmp_path, monkeypatch):
    settings, change = ADAPTERS[name]
    adapter = trained(base, tmp_path / "adapter", **settings)
    if change is not None:
        tensors = change(load_file(adapter / WEIGHTS))
        save_file({n: t.contiguous() for n, t in tensors.items()}, adapter / WEIGHTS)
    monkeypatch.setitem(sys.modules, missing, None)
    report = check(adapter, base=base, runtime=["transformers"])
    assert report.verdicts == {"transformers": "right" if name == "plain" else "wrong"}
    assert ("LOAD_UNPROVEN" in {found.rule for found in report.findings}) == (name != "plain")


def test_a_pattern_that_costs_years_is_not_waited_for(base, tmp_path, monkeypatch):
    from loraformat_converters.peft import loading

    adapter = trained(base, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    hostile = {"target_modules": r"(\w+\.?)*(\w+\.?)*(\w+\.?)*!"}
    config.write_text(json.dumps(json.loads(config.read_text()) | hostile))
    monkeypatch.setattr(loading, "_SECONDS", 1)
    (finding,) = check(adapter, base=base, runtime=["transformers"]).findings
    assert finding.rule == "LOAD_FAILS"
    assert "too costly" in finding.what


def test_a_config_that_asks_for_millions_of_layers(base, tmp_path):
    """Nothing is built of it: what PEFT would do is not known."""
    adapter = trained(base, tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**9}))
    report = check(adapter, base=Path(other), runtime=["transformers"])
    assert {finding.rule for finding in report.findings} == {"LOAD_UNPROVEN"}


@pytest.mark.parametrize("missing", [None, "peft"])
def test_of_a_config_alone(base, tmp_path, monkeypatch, missing):
    """Its shapes are enough for PEFT; without PEFT nothing is known."""
    adapter = trained(base, tmp_path / "adapter")
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    report = check(adapter, base=base / "config.json", runtime=["transformers"])
    assert report.verdicts == {"transformers": "care" if missing else "right"}


def test_of_weights_without_a_config(base, tmp_path):
    adapter = trained(base, tmp_path / "adapter")
    report = check(adapter, base=base / "model.safetensors", runtime=["transformers"])
    assert {finding.rule for finding in report.findings} == {"LOAD_UNPROVEN"}
