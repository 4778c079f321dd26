"""Adapters of experts in the files of earlier versions: they compute what they computed."""

from pathlib import Path

import pytest
import torch

from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from tests.adapters.peft_models import (
    gpt_oss,
    logits,
    mixtral,
    qwen3_moe,
    qwen3_moe_square,
    trained,
)
from tests.adapters.test_peft_files import rewrite

EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def per_expert(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Spell an adapter of w2 of fused experts as one was before experts were fused."""
    found = {}
    for name, value in tensors.items():
        home, _, factor = name.partition(".lora_")
        for expert in range(3):
            key = f"{home.replace('mlp', 'block_sparse_moe')}.{expert}.w2.lora_{factor}"
            part = value.view(3, rank, -1)[expert] if factor[0] == "A" else None
            found[key] = value.view(len(value), rank, 3)[:, :, expert] if part is None else part
    return {name: value.contiguous() for name, value in found.items()}


def test_experts_one_by_one_as_before_they_were_fused(tmp_path: Path) -> None:
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    base, adapter = trained(mixtral, options, tmp_path)
    wanted = logits(base, adapter)
    other = rewrite(
        adapter, lambda tensors: per_expert(tensors, 4), target_parameters=None,
        target_modules=["w2"],
    )  # fmt: skip
    merge(base, [other], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(base, other), wanted, atol=1e-5, rtol=1e-4)


def turned(tensors: dict[str, torch.Tensor], experts: int, rank: int) -> dict[str, torch.Tensor]:
    """Write experts as PEFT 0.18 did: every parameter taken for (experts, in, out)."""
    found = {}
    for name in tensors:
        if "lora_A" in name:
            twin = name.replace("lora_A", "lora_B")
            a = tensors[name].view(experts, rank, -1)
            b = tensors[twin].view(len(tensors[twin]), rank, experts).permute(2, 0, 1)
            found[name] = b.mT.reshape(experts * rank, -1).contiguous()
            found[twin] = a.permute(2, 1, 0).reshape(a.shape[2], rank * experts).contiguous()
    return found


@pytest.mark.parametrize("build", [qwen3_moe, qwen3_moe_square])
def test_the_orientation_of_peft_0_18(tmp_path: Path, build) -> None:
    base_path, adapter = trained(build, EXPERTS, tmp_path)
    wanted = logits(base_path, adapter)
    other = rewrite(adapter, lambda tensors: turned(tensors, 4, 4), peft_version="0.18.1")
    merge(base_path, [other], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5, rtol=1e-4)
    with open_model(base_path) as base, open_adapter(other, base=base) as opened:
        write_adapter(opened, tmp_path / "written")
    torch.testing.assert_close(
        logits(base_path, tmp_path / "written"), wanted, atol=1e-5, rtol=1e-4
    )


def test_one_parameter_of_0_18_needs_its_base(tmp_path: Path) -> None:
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    _, adapter = trained(qwen3_moe, options, tmp_path)
    other = rewrite(adapter, lambda tensors: turned(tensors, 4, 4), peft_version="0.18.1")
    with pytest.raises(UnsupportedError, match=r"0\.19.*--base"):
        open_adapter(other)


def test_wrappers_and_parameters_must_agree(tmp_path: Path) -> None:
    _, adapter = trained(gpt_oss, EXPERTS, tmp_path)
    other = rewrite(adapter, dict, target_parameters=["experts.down_proj"])
    with pytest.raises(InputError, match=r"2 parameters.*names 1"):
        open_adapter(other)


def test_experts_of_another_base_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, adapter = trained(qwen3_moe, EXPERTS, tmp_path / "a")
    base_path, _ = trained(qwen3_moe_square, EXPERTS, tmp_path / "b")
    with open_model(base_path) as base, pytest.raises(InputError, match="do not fit"):
        open_adapter(adapter, base=base)


def test_square_experts_need_the_version_of_peft(tmp_path: Path) -> None:
    options = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    base_path, adapter = trained(qwen3_moe_square, options, tmp_path)
    wanted = logits(base_path, adapter)
    other = rewrite(adapter, dict, peft_version=None)
    wanted_words = r'add .*"peft_version": "0\.19\.0"'
    with open_model(base_path) as base, pytest.raises(UnsupportedError, match=wanted_words):
        open_adapter(other, base=base)
    other = rewrite(adapter, dict, peft_version="0.19.0")
    merge(base_path, [other], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5, rtol=1e-4)
