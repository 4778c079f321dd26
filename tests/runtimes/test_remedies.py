"""Every command that a finding shows is run, and the finding is gone."""

from __future__ import annotations

import shlex
from pathlib import Path

import bases
import peft
import pytest
import torch
from bases import make_base
from features import FEATURES

from loraformat.cli import main
from loraformat.model.adapter_facts import AdapterFacts, BaseFacts, ModuleFacts
from loraformat.ops.check.check import check, fix
from loraformat.ops.info.model import info
from loraformat.runtimes.judge import findings
from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.remedies import Names
from loraformat.runtimes.rules import RULES
from tests.adapters.expert_adapters import named_stacks, with_shared_factors

#: Features that need no base of their own, and every command of theirs that is another.
SHOWN = [
    name
    for name in FEATURES
    if name not in ("unknown module", "other shape", "head", "no tensors", "never gathered")
]


def run(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "loraformat"
    with pytest.raises(SystemExit) as left:
        main([*words[1:], "--quiet"])
    # 4 only where check --fix looks at the result for all runtimes, and one is still not right.
    assert left.value.code in ((0, 4) if words[1] == "check" else (0,)), command


def output_of(command: str) -> Path:
    words = shlex.split(command)
    return Path(words[words.index("-o") + 1] if "-o" in words else words[3])


def gone(command: str, rule: str, runtime: str, base: Path) -> bool:
    output = output_of(command)
    if info(output).kind == "base":
        return shlex.split(command)[1] == "merge"  # no adapter is left that could be wrong
    return rule not in {f.rule for f in check(output, base=base, runtime=[runtime]).findings}


@pytest.mark.parametrize("feature", SHOWN)
def test_every_command_mends_its_finding(adapter, base, biased, feature, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = biased if "bias" in feature else base
    done = set()
    for finding in check(adapter(feature), base=base).findings:
        if finding.command is None:
            assert finding.remedy or finding.rule in ("ALORA", "METHOD", "INIT_MUTATES_BASE")
            continue
        if finding.command not in done:
            run(finding.command)
            done.add(finding.command)
        assert gone(finding.command, finding.rule, finding.runtime, base), finding


def test_an_adapter_in_a_bundle_needs_no_base(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(f"loraformat convert {base} bundle")
    run(f"loraformat convert {adapter('rslora')} bundle/adapters/polite")
    report = check("bundle/adapters/polite", runtime=["sglang", "llama.cpp"])
    assert report.base == str(tmp_path / "bundle")
    for command in {finding.command for finding in report.findings}:
        run(command)
    assert Path("polite.gguf").is_file()
    assert not check("polite-fixed", runtime=["sglang"]).findings
    assert check("bundle/adapters/polite", runtime=["transformers"]).verdicts == {
        "transformers": "right"
    }


def test_a_gguf_adapter_goes_back_to_peft(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(f"loraformat convert {adapter('rslora')} lora.gguf --base {base}")
    report = check("lora.gguf", base=base, runtime=["vllm"])
    (finding,) = report.findings
    assert finding.rule == "FORMAT"
    run(finding.command)
    assert not check(output_of(finding.command), base=base, runtime=["vllm"]).findings


# Rules that need a base of their own


def trained(base, target, **options):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    model.save_pretrained(target, save_embedding_layers=False)


def all_commands(report, base, rule):
    """Run the commands of a rule's findings, and return where it was found."""
    found = [finding for finding in report.findings if finding.rule == rule]
    for command in {finding.command for finding in found if finding.command}:
        if not output_of(command).exists():
            run(command)
    for finding in found:
        if finding.command:
            assert gone(finding.command, rule, finding.runtime, base), finding
    return {(finding.runtime, finding.level) for finding in found}


def test_fused_experts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_base("mixtral", tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(base, "A", target_modules=["q_proj", "v_proj"], target_parameters=names)
    report = check("A", base=base)
    assert {m.experts for m in report.facts.modules} == {0, 4}
    assert all_commands(report, base, "MOE") == {
        ("vllm", "fail"), ("sglang", "fail"), ("lorax", "fail"), ("llama.cpp", "fail"),
        ("ollama", "fail"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A tiny Mixtral, an adapter of its fused experts, and the same as stacks."""
    folder = tmp_path_factory.mktemp("moe")
    base = make_base("mixtral", folder / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(base, folder / "A", target_modules=["q_proj", "v_proj"], target_parameters=names, r=4)
    with_shared_factors(folder / "A", 4)
    named_stacks(folder / "A", folder / "S", 4, shared=True)
    return folder, base


def test_vllm_gets_a_lora_for_each_expert(moe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, base = moe
    (finding,) = check(folder / "A", base=base, runtime=["vllm"]).findings
    assert (finding.rule, finding.kind) == ("MOE", "experts")
    run(finding.command)
    assert not check("A-each", base=base, runtime=["vllm", "transformers"]).findings
    assert bases.apart(logits_of(base, "A-each"), logits_of(base, folder / "A")) < 1e-5


def test_stacks_of_experts(moe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, base = moe
    report = check(folder / "S", base=base)
    assert {m.experts for m in report.facts.modules} == {0, 4}
    assert report.ranks == [4]
    assert all_commands(report, base, "EXPERTS_STACKED") == {
        ("transformers", "fail"), ("vllm", "fail"), ("sglang", "warn"), ("lorax", "fail"),
        ("llama.cpp", "fail"), ("ollama", "fail"),
    }  # fmt: skip
    wanted = logits_of(base, folder / "A")
    for name in ("S-fused", "S-each"):
        assert bases.apart(logits_of(base, name), wanted) < 1e-5


def test_experts_of_a_model_that_a_runtime_keeps_fused():
    """Without its weights, which would be a whole gpt-oss."""
    fused = ModuleFacts("model.layers.0.mlp.experts", 8, 64, 64, 8.0, 1.0, experts=4)
    each = ModuleFacts("model.layers.0.mlp.experts.0.up_proj", 8, 64, 64, 8.0, 1.0)

    def rules(module, runtime, model_type):
        facts = AdapterFacts("peft", (module,), base=BaseFacts(model_type))
        found = findings(facts, [RUNTIMES[runtime]], Names("A", "B"))
        return {(finding.rule, finding.kind) for finding in found}

    assert not rules(fused, "vllm", "gpt_oss")
    assert rules(each, "vllm", "gpt_oss") == {("EXPERTS_EACH", "advice")}
    assert rules(fused, "sglang", "gpt_oss") == {("MOE_ONLY_FUSED", "merge")}
    assert rules(fused, "vllm", "granitemoe") == {("MOE_ONLY_FUSED", "merge")}
    assert rules(each, "lorax", "mixtral") == {("EXPERTS_EACH", "merge")}
    assert not rules(each, "sglang", "mixtral") | rules(each, "vllm", "mixtral")


def logits_of(base, adapter):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return bases.run(peft.PeftModel.from_pretrained(model, adapter).eval(), "llama")


def test_fixed_experts_and_embeddings_are_the_same(base, tmp_path):
    """Three-dimensional and transposed factors are padded, too."""
    mixtral = make_base("mixtral", tmp_path / "mixtral")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    more = {"r": 4, "lora_alpha": 7, "use_rslora": True}
    trained(mixtral, tmp_path / "A", target_modules=["q_proj"], target_parameters=names, **more)
    trained(base, tmp_path / "B", target_modules=["embed_tokens", "q_proj", "v_proj"], **more)
    for model, name in ((mixtral, "A"), (base, "B")):
        fix(tmp_path / name, tmp_path / f"{name}-fixed", base=model)
        assert check(tmp_path / f"{name}-fixed").ranks == [8]
        wanted = logits_of(model, tmp_path / name)
        assert bases.apart(logits_of(model, tmp_path / f"{name}-fixed"), wanted) < 1e-5


def test_conv1d(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_base("gpt2", tmp_path / "base")
    trained(base, "A", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    report = check("A", base=base)
    assert all_commands(report, base, "CONV1D") == {("llama.cpp", "fail"), ("ollama", "fail")}
    assert all_commands(report, base, "ARCHITECTURE") == {("ollama", "warn")}


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_head(tied, tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    trained(tied, "A", target_modules=[module, "q_proj", "v_proj"])
    report = check("A", base=tied)
    assert all_commands(report, tied, "TIED_HEAD") == {
        ("transformers", "warn"), ("vllm", "warn"), ("sglang", "warn"), ("lorax", "fail"),
        ("llama.cpp", "fail"), ("ollama", "fail"),
    }  # fmt: skip


def test_another_base(adapter, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_base("llama", tmp_path / "other")
    weights = other / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    run(f"loraformat convert {base} bundle")
    run(f"loraformat convert {other} another")
    run(f"loraformat convert {adapter('plain')} bundle/adapters/A --canonical")
    report = check("bundle/adapters/A", base="another", runtime=["vllm", "sglang"])
    assert {(f.rule, f.level) for f in report.findings} == {("BASE_HASH_MISMATCH", "fail")}
    assert not check("bundle/adapters/A", base="bundle", runtime=["vllm"]).findings


def test_every_rule_has_been_seen_here_or_in_the_matrix():
    from test_matrix import EXPECTED

    seen = {rule for rules in EXPECTED.values() for rule in rules}
    seen |= {
        "MOE",
        "MOE_ONLY_FUSED",
        "EXPERTS_EACH",
        "EXPERTS_STACKED",
        "CONV1D",
        "ARCHITECTURE",
        "TIED_HEAD",
        "BASE_HASH_MISMATCH",
        "ROW_ORDER",
        "BASE_REVISION",
        "LOAD_FAILS",
        "LOAD_UNPROVEN",
        "SHARED_BLOCK",
    }  # the last three in tests/hub, beside this file and in tests/train
    assert seen == {rule.id for rule in RULES}
