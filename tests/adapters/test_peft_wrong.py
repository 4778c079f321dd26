"""Where PEFT 0.21.2 computes something else than the adapter that it trained: the proofs.

Each test shows PEFT's result to be wrong, and ours to be right. docs/peft.md lists them; a
test that fails because PEFT has been mended is good news, and its row goes.
"""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from loraformat_converters.peft import refusals
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraformat.errors import UnsupportedError
from loraformat.model.checkpoint import NF4Tensor
from loraformat.ops.combine.combine import combine
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.tensors.torch_arrays import tensor_of
from tests.adapters.peft_models import (
    IDS,
    llama,
    llama_tied,
    logits,
    merged_by_peft,
    qwen2,
    qwen3_moe_square,
    shake,
    trained,
)
from tests.adapters.test_peft_expert_files import EXPERTS, turned
from tests.adapters.test_peft_files import rewrite
from tests.torch_tensors import numbers


def error(found: torch.Tensor, wanted: torch.Tensor, without: torch.Tensor) -> float:
    """Return the distance from what is wanted, over the adapter's whole effect."""
    return float((found - wanted).norm() / (wanted - without).norm())


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both kept tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings(tmp_path: Path, case: str) -> None:
    base, adapter = trained(llama_tied, TIED[case], tmp_path)
    wanted, without = logits(base, adapter), logits(base)
    theirs = run(merged_by_peft(base, adapter))
    assert error(theirs, wanted, without) > 0.5
    merge(base, [adapter], tmp_path / "merged")
    assert error(logits(tmp_path / "merged"), wanted, without) < 1e-3


def test_layer_replication(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}
    base, adapter = trained(llama, options, tmp_path)
    wanted = logits(base, adapter)
    # The replicated layers share their weights, which get the deltas of all of them.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with model.disable_adapter():
        without = run(model)
    assert error(run(merged_by_peft(base, adapter)), wanted, without) > 0.3
    with pytest.raises(UnsupportedError, match=r"layer_replication.*write the replicated model"):
        open_adapter(adapter)


def two(tmp_path: Path, options: dict) -> tuple[Path, Path, Path]:
    base, first = trained(llama, options, tmp_path)
    config = LoraConfig(r=4, lora_alpha=10, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model, 0.1)
    model.save_pretrained(tmp_path / "second")
    return base, first, tmp_path / "second"


def sum_of(paths: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        with open_adapter(path) as adapter:
            for name, delta in adapter.deltas.items():
                found = delta.scaling * numbers(delta.b).double() @ numbers(delta.a).double()
                total[name] = total.get(name, 0) + found
    return total


def combined_by_peft(base: Path, first: Path, second: Path, kind: str) -> PeftModel:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, "a")
    model.load_adapter(second, "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type=kind, svd_rank=8)
    model.set_adapter("c")
    return model


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_combining_rslora(tmp_path: Path, kind: str) -> None:
    base, *both = two(tmp_path, {"target_modules": ["q_proj"], "use_rslora": True})
    wanted = sum_of(tuple(both))
    layers = combined_by_peft(base, *both, kind).get_base_model()
    combine(both, tmp_path / "ours", **({"method": "cat"} if kind == "cat" else {"rank": 8}))
    found = sum_of((tmp_path / "ours",))
    for name, delta in wanted.items():
        theirs = layers.get_submodule(name.removesuffix(".weight")).get_delta_weight("c").double()
        assert (theirs - delta).norm() > 0.5 * delta.norm()
        assert (found[name] - delta).norm() < 1e-5 * delta.norm()


def test_combining_linearly_with_a_rank_pattern(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    base, *both = two(tmp_path, options)
    model = combined_by_peft(base, *both, "linear")
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["c"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        logits(base, tmp_path / "theirs" / "c")
    combine(both, tmp_path / "ours", method="cat")
    merge(base, both, tmp_path / "merged")
    torch.testing.assert_close(
        logits(base, tmp_path / "ours"), logits(tmp_path / "merged"), atol=1e-5, rtol=1e-4
    )


def test_the_order_of_patterns(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    patterns = {"q_proj": 40, r"layers\.1\.self_attn\.q_proj": 10}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], alpha_pattern=patterns)
    model = get_peft_model(model, config)
    shake(model)
    wanted, without = run(model), logits(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    # PEFT saves the patterns sorted, and the first that matches wins: layer 1 is now 4 times less.
    assert error(logits(tmp_path / "base", tmp_path / "adapter"), wanted, without) > 0.05
    with open_adapter(tmp_path / "adapter") as adapter:
        assert any("PEFT sorts them on saving" in note for note in adapter.notes)
    file = tmp_path / "adapter" / "adapter_config.json"
    text = json.loads(file.read_text()) | {"alpha_pattern": patterns}
    file.write_text(json.dumps(text))  # in the order of training, which we keep
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert error(logits(tmp_path / "merged"), wanted, without) < 1e-3


def four_bit(path: Path) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def test_a_lora_bias_on_a_4_bit_base(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "lora_bias": True, "lora_alpha": 16}
    base, adapter = trained(qwen2, options, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    model = four_bit(base)
    before = model.get_submodule(name).bias.detach().clone()
    wrapped = PeftModel.from_pretrained(model, adapter)
    added = wrapped.base_model.model.get_submodule(name).lora_B["default"].bias.detach().clone()
    after = wrapped.merge_and_unload().get_submodule(name).bias
    torch.testing.assert_close(after, before + added)  # the scaling, 16 / 4, is lost
    convert(base, tmp_path / "bundle", to_format="loraformat")
    merge(tmp_path / "bundle", [adapter], tmp_path / "merged", dtype="f32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_submodule(name).bias
    torch.testing.assert_close(ours, before + 4 * added)


def test_reading_4_bit_weights_that_a_cpu_has_packed(tmp_path: Path) -> None:
    functional = import_module("bitsandbytes.functional")
    llama(hidden_size=128).save_pretrained(tmp_path / "base")
    model = four_bit(tmp_path / "base").eval()
    model.save_pretrained(tmp_path / "nf4")
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(name).weight
    before = functional.dequantize_4bit(weight.data, weight.quant_state)
    # What the first forward does where the CPU has AVX-512 BF16; merging dequantizes after it.
    packed, state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    after = functional.dequantize_4bit(packed, state)
    assert (after.float() - before.float()).norm() > 0.5 * before.float().norm()
    with open_model(tmp_path / "nf4") as checkpoint:
        ours = checkpoint.tensors[f"{name}.weight"]
        assert isinstance(ours, NF4Tensor)
        torch.testing.assert_close(tensor_of(ours.dequantize()), before)


def test_experts_of_peft_0_18_whose_shapes_happen_to_fit(tmp_path: Path) -> None:
    options = EXPERTS | {"target_parameters": ["experts.gate_up_proj"]}
    base, adapter = trained(qwen3_moe_square, options, tmp_path)
    wanted, without = logits(base, adapter), logits(base)
    other = rewrite(adapter, lambda tensors: turned(tensors, 4, 4), peft_version="0.18.1")
    assert error(logits(base, other), wanted, without) > 0.5
    merge(base, [other], tmp_path / "merged")
    assert error(logits(tmp_path / "merged"), wanted, without) < 1e-3


PAGE = Path(__file__).parents[2] / "docs" / "peft.md"


def test_the_page_names_these_tests_and_every_refused_field() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    here = {name for name in globals() if name.startswith("test_") and "the_page" not in name}
    assert named == here
    assert all(f"`{field}`" in text for field in refusals._REFUSED)
