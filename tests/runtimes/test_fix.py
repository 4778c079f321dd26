"""--fix: one form, the same deltas, right in PEFT, llama.cpp, and by every server's formula."""

from __future__ import annotations

import json
import re

import features
import numpy as np
import pytest
import torch
from bases import PROMPTS, apart, by_transformers, run
from llama_runtime import log_probabilities
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraformat.errors import UnsupportedError, UsageError
from loraformat.ops.check.check import check, fix
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.adapter import open_adapter
from loraformat.runtimes.known import RUNTIMES
from tests.torch_tensors import numbers

FIXABLE = [
    "plain", "rslora", "alpha_pattern", "rank_pattern", "all scalings", "float alpha", "alpha 0",
    "rank 4", "rank 24", "q without v", "one layer", "no prefix", "left-over default", "shards",
    "float64",
]  # fmt: skip
#: What PEFT itself does not read; what it would be is read by loraformat.
NOT_FOR_PEFT = {"no prefix", "left-over default", "compiled", "shards"}


def deltas(path) -> dict[str, torch.Tensor]:
    """Return s·B A in float64, as loraformat reads it."""
    with open_adapter(path) as adapter:
        return {
            name: delta.scaling * numbers(delta.b).double() @ numbers(delta.a).double()
            for name, delta in adapter.deltas.items()
        }


def by_hand(path) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the config, and A and B by module, as a server reads them."""
    tensors = load_file(path / "adapter_model.safetensors")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        found.setdefault(match[1], {})[match[2]] = tensor.double().numpy()
    config = json.loads((path / "adapter_config.json").read_text())
    return config, {module: (parts["A"], parts["B"]) for module, parts in found.items()}


@pytest.fixture(scope="module")
def fixed(adapter, base, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("fixed"), {}

    def get(feature):
        if feature not in made:
            made[feature] = root / feature.replace(" ", "-")
            fix(adapter(feature), made[feature], base=base)
        return made[feature]

    return get


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def by_peft(model, path) -> list[np.ndarray]:
    wrapped = PeftModel.from_pretrained(model, path).eval()
    try:
        return run(wrapped, "llama")
    finally:
        wrapped.unload()


@pytest.mark.parametrize("feature", FIXABLE)
def test_the_form(fixed, base, feature):
    config, factors = by_hand(fixed(feature))
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert {a.shape[0] for a, _ in factors.values()} == {config["r"]}
    assert set(factors) == set(features.modules())
    report = check(fixed(feature), base=base)
    assert not report.failed
    assert set(report.verdicts) == set(RUNTIMES)


@pytest.mark.parametrize("feature", FIXABLE)
def test_the_deltas_are_the_same_up_to_one_rounding_of_b(fixed, adapter, feature):
    """B is rounded once to float32, so that each delta is right to 2⁻²⁴ of |B| |A|."""
    before, after = deltas(adapter(feature)), deltas(fixed(feature))
    assert before.keys() <= after.keys()
    assert not any(bool(after[name].any()) for name in after.keys() - before.keys())
    _, factors = by_hand(fixed(feature))
    for name, delta in before.items():
        a, b = factors[name.removesuffix(".weight")]
        bound = torch.from_numpy(np.abs(b) @ np.abs(a)) * 2.0**-23  # float64 rounds A, too
        assert bool(((after[name] - delta).abs() <= bound).all()), name


@pytest.mark.parametrize("feature", [name for name in FIXABLE if name not in NOT_FOR_PEFT])
def test_peft_computes_the_same(fixed, adapter, model, feature):
    wanted = by_peft(model, adapter(feature))
    assert apart(by_peft(model, fixed(feature)), wanted) < 1e-5
    if feature != "alpha 0":
        assert apart(run(model, "llama"), wanted) > 1e-3, "the adapter must matter"


@pytest.mark.parametrize("feature", ["no prefix", "shards"])
def test_peft_computes_with_what_it_could_not_read(fixed, adapter, model, feature):
    assert apart(by_peft(model, fixed(feature)), by_peft(model, adapter("plain"))) < 1e-5


def test_llama_cpp_computes_the_same(fixed, adapter, base, model, tmp_path):
    convert(base, tmp_path / "model.gguf", dtype="f32")
    wanted = by_peft(model, adapter("all scalings"))
    # As the stock converter would write the fixed adapter: alpha as it is, no factor folded.
    convert(fixed("all scalings"), tmp_path / "lora.gguf", base=base)
    found = log_probabilities(tmp_path / "model.gguf", PROMPTS, [(tmp_path / "lora.gguf", 1.0)])
    assert apart(list(found), wanted) < 1e-5
    assert not check(tmp_path / "lora.gguf", runtime=["llama.cpp", "ollama"]).findings
    assert apart(by_transformers(base, "llama"), wanted) > 1e-3


# Servers, by the formulas in their sources


def as_sglang(config, factors):
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (a, b) in factors.items()}


def as_lorax(config, factors):
    """Layer types one after the other; the padded rank stays behind in the config."""
    rank, found = config["r"], {}
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in factors):
        stack = {n: pair for n, pair in factors.items() if n.rpartition(".")[2] == leaf}
        scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        for name, (a, b) in stack.items():
            found[name] = (b.T * scale).T @ a
        own = next(iter(stack.values()))[0].shape[0]
        rank = 8 if own <= 8 else -(-own // 16) * 16
    return found


def as_mlx(config, factors):
    """``lora_a`` is Aᵀ and ``lora_b`` Bᵀ, the scale is 1: fuse() adds (scale · bᵀ) aᵀ."""
    return {name: (1.0 * b.T.T) @ a.T.T for name, (a, b) in factors.items()}


def as_stock_gguf(config, factors):
    return {
        name: (config["lora_alpha"] / a.shape[0] if config["lora_alpha"] else 1.0) * b @ a
        for name, (a, b) in factors.items()
    }


FORMULAS = {"sglang": as_sglang, "lorax": as_lorax, "mlx": as_mlx, "llama.cpp": as_stock_gguf}


def error(formula, path, truth) -> float:
    found = formula(*by_hand(path))
    return max(
        float(np.abs(found[name.removesuffix(".weight")] - delta.numpy()).max())
        for name, delta in truth.items()
    )


@pytest.mark.parametrize("runtime", FORMULAS)
@pytest.mark.parametrize("feature", FIXABLE)
def test_a_servers_formula_gives_the_same(fixed, adapter, runtime, feature):
    assert error(FORMULAS[runtime], fixed(feature), deltas(adapter(feature))) < 1e-6


@pytest.mark.parametrize("runtime", ["sglang", "lorax", "llama.cpp"])
@pytest.mark.parametrize(
    "feature",
    ["plain", "rslora", "alpha_pattern", "rank_pattern", "all scalings", "alpha 0", "rank 4",
     "rank 24", "float alpha"],
)  # fmt: skip
def test_what_is_found_is_what_the_formula_gives(adapter, runtime, feature):
    """A failing rule about scaling or rank, and only that, means a wrong delta."""
    path = adapter(feature)
    found = check(path, runtime=[runtime]).findings
    fails = {finding.rule for finding in found if finding.level == "fail"} - {"FORMAT"}
    wrong = error(FORMULAS[runtime], path, deltas(path)) > 1e-6
    stacks = runtime == "sglang" and feature == "rank_pattern"  # the formula has no shapes
    unscaled = feature == "alpha 0"  # 0, however it is padded
    assert bool(fails) == (wrong or stacks) or unscaled


@pytest.mark.parametrize(
    "feature", ["dora", "bias", "lora_bias", "trained norm", "trained tokens", "alora"]
)
def test_what_is_more_than_deltas_is_refused(adapter, tmp_path, feature):
    with pytest.raises(UnsupportedError) as refused:
        fix(adapter(feature), tmp_path / "out")
    assert "merge" in str(refused.value) or feature == "alora"
    assert list(tmp_path.iterdir()) == []


def test_gaps_are_left_where_no_base_says_what_is_there(adapter, tmp_path):
    fix(adapter("one layer"), tmp_path / "out")
    assert deltas(tmp_path / "out").keys() == deltas(adapter("one layer")).keys()


def test_statistics_are_padded_too(adapter, tmp_path):
    from safetensors.torch import save_file

    source = features.write("rank 4", tmp_path / "source")
    moments = {f"{name}.second_moment": torch.eye(4) * 2 for name in features.modules()}
    save_file(moments, source / "activation_statistics.safetensors", {"format": "pt"})
    fix(source, tmp_path / "out")
    for moment in load_file(tmp_path / "out" / "activation_statistics.safetensors").values():
        assert torch.equal(moment, torch.block_diag(torch.eye(4) * 2, torch.zeros(4, 4)))


def test_a_dtype_can_be_asked_for(adapter, tmp_path):
    fix(adapter("rslora"), tmp_path / "out", dtype="bf16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_file_is_no_output(adapter, tmp_path):
    with pytest.raises(UsageError, match="directory"):
        fix(adapter("plain"), tmp_path / "lora.gguf")
