"""What the records say of PEFT and llama.cpp, seen in PEFT and llama.cpp themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from bases import PROMPTS, apart, run
from gguf import MODEL_ARCH_NAMES
from llama_runtime import RuntimeFailure, log_probabilities
from loraformat_converters.gguf.architectures import ARCHITECTURES
from peer_files import gguf_name, permuted, write_peer_lora
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraformat.ops.check.check import check, examine
from loraformat.ops.convert.convert import convert
from loraformat.runtimes.architectures import GGUF_NAMES, gguf_architecture
from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.scaling import by_file_alpha

HEADS = {"q_proj": 4, "k_proj": 2}


def fresh(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(base, path, dtype="f32")
    return path


# PEFT


def test_key_prefix(adapter, base):
    plain = run(fresh(base), "llama")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(fresh(base), adapter("no prefix")).eval()
    assert apart(run(loaded, "llama"), plain) == 0.0


def test_pair_missing(adapter, base):
    """The other half is there, and the module does nothing."""
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(fresh(base), adapter("half a pair")).eval()
    whole = PeftModel.from_pretrained(fresh(base), adapter("plain")).eval()
    assert apart(run(loaded, "llama"), run(whole, "llama")) > 1e-3
    layer = loaded.base_model.model.model.layers[1].mlp.up_proj
    assert not layer.lora_B["default"].weight.any()


def test_nonfinite(adapter, base):
    loaded = PeftModel.from_pretrained(fresh(base), adapter("nan")).eval()
    assert all(np.isnan(values).all() for values in run(loaded, "llama"))


def test_sharded(adapter, base):
    with pytest.raises((ValueError, OSError)):  # it looks for the one file on the Hub
        PeftModel.from_pretrained(fresh(base), str(adapter("shards")))


# llama.cpp


def as_stock_converter(path, target, *, reorder=True) -> None:
    """Write lora_alpha and the factors as llama.cpp's converter does: nothing is folded."""
    facts, _ = examine(path)
    tensors = load_file(path / "adapter_model.safetensors")
    pairs: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(tensors.items()):
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        values = tensor.float().numpy()
        heads = HEADS.get(module.rpartition(".")[2])
        if heads and part == "B" and reorder:
            values = permuted(values, heads)
        pairs.setdefault(gguf_name(f"{module}.weight"), []).append(values)
    write_peer_lora(target, {n: (a, b) for n, (a, b) in pairs.items()}, float(facts.config_alpha))


def by_peft(base, path, scaling=None):
    """Run PEFT, with the factor of each module that a formula gives."""
    facts, _ = examine(path)
    loaded = PeftModel.from_pretrained(fresh(base), path).eval()
    factors = {module.name: scaling(facts, module) for module in facts.modules} if scaling else {}
    for name, layer in loaded.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and name in factors:
            layer.scaling["default"] = factors[name]
    return run(loaded, "llama")


@pytest.mark.parametrize("feature", ["all scalings", "alpha 0"])
def test_one_alpha_by_the_rank_of_each_tensor(adapter, base, gguf, feature, tmp_path):
    path = adapter(feature)
    as_stock_converter(path, tmp_path / "lora.gguf")
    found = list(log_probabilities(gguf, PROMPTS, [(tmp_path / "lora.gguf", 1.0)]))
    assert apart(found, by_peft(base, path, by_file_alpha)) < 1e-5
    assert apart(found, by_peft(base, path)) > 1e-3
    report = check(path, base=base, runtime=["llama.cpp"])
    assert report.verdicts == {"llama.cpp": "wrong"}


def test_the_order_of_rows(adapter, base, gguf, tmp_path):
    """Q and K of llama must have the rows of B reordered, which Ollama's import does not do."""
    path = adapter("plain")
    wanted = by_peft(base, path)
    for reorder in (True, False):
        as_stock_converter(path, tmp_path / f"{reorder}.gguf", reorder=reorder)
        found = log_probabilities(gguf, PROMPTS, [(tmp_path / f"{reorder}.gguf", 1.0)])
        assert (apart(list(found), wanted) < 1e-5) is reorder
    rules = {finding.rule for finding in check(path, base=base, runtime=["ollama"]).findings}
    assert "ROW_ORDER" in rules


def test_another_architecture(base, gguf, tmp_path):
    pairs = {"blk.0.ffn_up.weight": (np.ones((4, 64)), np.ones((96, 4)))}
    write_peer_lora(tmp_path / "lora.gguf", pairs, alpha=4.0, architecture="qwen2")
    with pytest.raises(RuntimeFailure, match="arch"):
        log_probabilities(gguf, PROMPTS[:1], [(tmp_path / "lora.gguf", 1.0)])
    report = check(tmp_path / "lora.gguf", base=base)
    found = {(f.runtime, f.level) for f in report.findings if f.rule == "ARCHITECTURE"}
    assert ("llama.cpp", "fail") in found
    assert report.verdicts["llama.cpp"] == "wrong"


def test_a_tied_embedding_aborts(tied, tmp_path):
    convert(tied, tmp_path / "model.gguf", dtype="f32")
    random = np.random.default_rng(0)
    factors = random.normal(0, 0.1, (2048, 4)), random.normal(0, 0.1, (64, 4))
    write_peer_lora(tmp_path / "lora.gguf", {"token_embd.weight": factors}, alpha=4.0)
    with pytest.raises(RuntimeFailure) as failure:
        log_probabilities(tmp_path / "model.gguf", PROMPTS[:1], [(tmp_path / "lora.gguf", 1.0)])
    assert failure.value.returncode == -6
    report = check(tmp_path / "lora.gguf", base=tied, runtime=["llama.cpp"])
    assert "TIED_HEAD" in {finding.rule for finding in report.findings}


def test_names_of_architectures_are_those_of_the_converter_and_of_llama_cpp():
    known = set(MODEL_ARCH_NAMES.values())
    of_converter = {
        model_type: record.name for record in ARCHITECTURES.values() for model_type in record.models
    }
    assert len(of_converter) > len(ARCHITECTURES)
    for model_type, name in (of_converter | GGUF_NAMES).items():
        assert gguf_architecture(model_type) == of_converter.get(model_type, name)
        assert name in known


def test_versions_are_stated():
    for runtime in RUNTIMES.values():
        assert re.search(r"\d", runtime.version), runtime.name
        assert re.search("tested|read|source", runtime.version), runtime.name


def test_the_features_have_the_shapes_of_the_base(base):
    """The shapes in features.py are those of the base."""
    import features

    tensors = load_file(base / "model.safetensors")
    for name, shape in features.modules().items():
        assert tuple(tensors[f"{name}.weight"].shape) == shape
