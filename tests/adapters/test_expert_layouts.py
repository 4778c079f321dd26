"""Adapters of experts, from each layout to each: PEFT computes the same with all of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraformat.cli import main
from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.model.base_names import resolver
from loraformat.ops.check.check import fix
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.merge.merge import merge
from tests.adapters import moe_models
from tests.adapters.expert_adapters import (
    BOTH,
    CONFIG,
    MIXTRAL,
    QWEN,
    WEIGHTS,
    named_stacks,
    one_by_one,
    with_shared_factors,
)
from tests.adapters.peft_models import (
    gpt_oss,
    logits,
    mixtral,
    qwen3_moe,
    qwen3_moe_square,
    shake,
    trained,
)
from tests.adapters.test_peft_expert_files import turned

KINDS = {
    "qwen3_moe": (qwen3_moe, QWEN, 4),
    "qwen3_moe_square": (qwen3_moe_square, QWEN, 4),
    "mixtral": (mixtral, MIXTRAL, 3),
}
SOURCES = ["fused", "before 0.19", "each", "stacks", "shared"]
OUTPUTS: dict[str, dict[str, Any]] = {
    "each": {"experts": "each"},
    "fused": {"experts": "fused"},
    "canonical": {"canonical": True},
}


class Made:
    """A base, also as bundle, one adapter in every layout, and what PEFT computes with it."""

    def __init__(self, folder: Path, kind: str) -> None:
        build, self.names, self.experts = KINDS[kind]
        self.base, fused = trained(build, BOTH, folder)
        with_shared_factors(fused, self.experts)  # so that every layout can hold it
        convert(self.base, folder / "bundle")
        self.bundle = folder / "bundle"
        self.sources = {
            "fused": fused,
            "before 0.19": self._before(fused, folder / "before"),
            "each": one_by_one(fused, folder / "each", self.experts, self.names),
            "stacks": named_stacks(fused, folder / "stacks", self.experts),
            "shared": named_stacks(fused, folder / "shared", self.experts, shared=True),
        }
        self.wanted = logits(self.base, fused)
        assert (self.wanted - logits(self.base)).abs().max() > 0.03

    def _before(self, fused: Path, out: Path) -> Path:
        shutil.copytree(fused, out)
        tensors = load_file(fused / WEIGHTS)
        experts = {name: value for name, value in tensors.items() if ".experts" in name}
        save_file(tensors | turned(experts, self.experts, 4), out / WEIGHTS, {"format": "pt"})
        config = json.loads((out / CONFIG).read_text()) | {"peft_version": "0.18.1"}
        (out / CONFIG).write_text(json.dumps(config))
        return out

    def check(self, adapter: Path) -> None:
        torch.testing.assert_close(logits(self.base, adapter), self.wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("experts"), request.param)


def expert_names(adapter: Path) -> set[str]:
    return {name for name in load_file(adapter / WEIGHTS) if ".experts" in name}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_each_to_each(made: Made, source: str, output: str, tmp_path: Path) -> None:
    convert(made.sources[source], tmp_path / "out", base=made.base, **OUTPUTS[output])
    made.check(tmp_path / "out")
    each = output == "each" or (output == "canonical" and source == "each")
    names = expert_names(tmp_path / "out")
    assert len(names) == 2 * 2 * (3 * made.experts if each else 2)
    if output == "each" and source != "each":  # as the checkpoint calls them, which vLLM expects
        home = "block_sparse_moe" if made.names is MIXTRAL else "mlp"
        first = f"model.layers.0.{home}.experts.0.{made.names[0]}.lora_A.weight"
        assert f"base_model.model.{first}" in names


@pytest.mark.parametrize("source", ["each", "shared", "fused"])
def test_a_bundle_whose_experts_are_stacks_takes_them(
    made: Made, source: str, tmp_path: Path
) -> None:
    shutil.copytree(made.bundle, tmp_path / "bundle")
    slot = tmp_path / "bundle" / "adapters" / "one"
    convert(made.sources[source], slot)
    made.check(slot)
    convert(slot, tmp_path / "out", experts="each")
    made.check(tmp_path / "out")


@pytest.mark.parametrize("experts", ["each", "fused", None])
@pytest.mark.parametrize("source", SOURCES)
def test_fixing(made: Made, source: str, experts: Any, tmp_path: Path) -> None:
    report = fix(made.sources[source], tmp_path / "out", base=made.base, experts=experts)
    assert len(report.ranks) == 1
    made.check(tmp_path / "out")


@pytest.mark.parametrize("source", SOURCES)
def test_merging(made: Made, source: str, tmp_path: Path) -> None:
    merge(made.base, made.sources[source], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), made.wanted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


def test_ranks_and_experts_that_differ(qwen: Made, tmp_path: Path) -> None:
    """A LoRA of one expert only, another of a lower rank: PEFT alone would not load that."""
    source = shutil.copytree(qwen.sources["each"], tmp_path / "some")
    tensors = load_file(source / WEIGHTS)
    kept = {name: value for name, value in tensors.items()
            if "experts.2." not in name and "experts.1.up_proj" not in name}  # fmt: skip
    for name, value in kept.items():
        if "experts.0.down_proj" in name:
            kept[name] = value[:2] if "lora_A" in name else value[:, :2].contiguous()
    save_file(kept, source / WEIGHTS, {"format": "pt"})
    merge(qwen.base, source, tmp_path / "merged")
    wanted = logits(tmp_path / "merged")
    assert (wanted - qwen.wanted).abs().max() > 1e-3
    for options in OUTPUTS["canonical"], OUTPUTS["fused"]:
        convert(source, tmp_path / "out", base=qwen.base, force=True, **options)
        torch.testing.assert_close(
            logits(qwen.base, tmp_path / "out"), wanted, atol=1e-5, rtol=1e-4
        )


def test_what_nothing_says_is_refused(qwen: Made, tmp_path: Path) -> None:
    for options in {"canonical": True}, {"dtype": "bf16"}:
        with pytest.raises(UnsupportedError, match=r"only the base says.*--base"):
            convert(qwen.sources["shared"], tmp_path / "out", **options)
    with pytest.raises(UsageError, match=r"--experts needs the base.*--base BASE"):
        convert(qwen.sources["fused"], tmp_path / "out", experts="each")
    with pytest.raises(UsageError, match=r"--experts is for PEFT adapters"):
        convert(qwen.sources["fused"], tmp_path / "o.gguf", base=qwen.base, experts="each")
    with pytest.raises(UsageError, match=r"--experts each is for bitsandbytes"):
        convert(qwen.base, tmp_path / "out", experts="each")
    assert not list(tmp_path.iterdir())


def test_fused_checkpoints_have_no_single_experts(tmp_path: Path) -> None:
    base, adapter = trained(gpt_oss, BOTH, tmp_path)
    with pytest.raises(UnsupportedError, match=r"experts fused.*--experts fused"):
        convert(adapter, tmp_path / "out", base=base, experts="each")
    convert(adapter, tmp_path / "out", base=base, experts="fused")
    torch.testing.assert_close(
        logits(base, tmp_path / "out"), logits(base, adapter), atol=1e-5, rtol=1e-4
    )


def test_a_wrong_number_of_experts_and_dora_are_named(qwen: Made, tmp_path: Path) -> None:
    wrong = shutil.copytree(qwen.sources["stacks"], tmp_path / "wrong")
    tensors = load_file(wrong / WEIGHTS)
    name = next(name for name in tensors if ".w2.lora_B" in name)
    save_file(tensors | {name: tensors[name][:3].clone()}, wrong / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"experts\.w2.* not for 4 experts, nor one for all"):
        convert(wrong, tmp_path / "out", base=qwen.base, experts="fused")
    dora = shutil.copytree(qwen.sources["each"], tmp_path / "dora")
    tensors = load_file(dora / WEIGHTS)
    name = next(name for name in tensors if "experts.1.gate_proj.lora_B" in name)
    module = name.removesuffix(".lora_B.weight")
    tensors[f"{module}.lora_magnitude_vector"] = torch.ones(len(tensors[name]))
    save_file(tensors, dora / WEIGHTS, {"format": "pt"})
    config = json.loads((dora / CONFIG).read_text()) | {"use_dora": True}
    (dora / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"experts\.1\.gate_proj.*magnitude.*merge"):
        convert(dora, tmp_path / "out", base=qwen.base, experts="fused")


def test_check_fixes_into_a_layout(qwen: Made, tmp_path: Path) -> None:
    out = tmp_path / "fixed"
    arguments = ["check", qwen.sources["fused"], "--fix", "-o", out, "--experts", "each",
                 "--base", qwen.base, "--runtime", "transformers", "--quiet"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    assert left.value.code == 0
    qwen.check(out)
    assert any(".experts.0.gate_proj." in name for name in expert_names(out))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("output", ["each", "fused"])
def test_without_transformers_names_tell_the_same(
    kind: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, kind)
    convert(made.sources["shared"], tmp_path / "wanted", base=made.base, **OUTPUTS[output])
    resolver._names.cache_clear()
    monkeypatch.setattr(resolver, "in_memory", lambda *_: None)
    for source in SOURCES:
        out = tmp_path / f"{source} {output}"
        convert(made.sources[source], out, base=made.base, **OUTPUTS[output])
        made.check(out)
        assert expert_names(out) == expert_names(tmp_path / "wanted")
    resolver._names.cache_clear()


def test_info_needs_no_base(qwen: Made) -> None:
    for source in SOURCES:
        if source != "before 0.19":
            assert info(qwen.sources[source]).kind == "adapter"


FAMILIES = [
    "deepseek_v3", "ernie4_5_moe", "glm4_moe", "jamba", "minimax_m2", "nemotron_h", "phimoe",
    "qwen2_moe", "qwen3_5_moe",
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_go_there_and_back(kind: str, tmp_path: Path) -> None:
    """By transformers' own conversion, with the checkpoint as base and with a bundle of stacks."""
    moe_models.make(kind).save_pretrained(tmp_path / "base")

    def opened() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    model = opened()
    leaves = {name.rpartition(".")[2] for name, parameter in model.named_parameters()
              if parameter.ndim == 3 and ".experts." in name}  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=[f"experts.{leaf}" for leaf in sorted(leaves)],
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted, plain = moe_models.logits(adapted.eval()), moe_models.logits(opened().eval())
    size = (wanted - plain).abs().max()
    assert size > 0.01
    convert(tmp_path / "base", tmp_path / "bundle")
    for base in ("base", "bundle"):
        each = tmp_path / f"each-{base}"
        convert(tmp_path / "adapter", each, base=tmp_path / base, experts="each")
        assert not any(re.search(r"experts\.(base_layer\.)?lora", n) for n in expert_names(each))
        convert(each, tmp_path / f"back-{base}", base=tmp_path / base, experts="fused")
        back = PeftModel.from_pretrained(opened(), tmp_path / f"back-{base}").eval()
        assert (moe_models.logits(back) - wanted).abs().max() < 1e-5 * size
