"""Adapters of which it is known that PEFT loads them, against PEFT."""

import pytest
from loraformat_converters.peft.load_on_meta import Loaded, Stored, load_on_meta
from loraformat_converters.peft.plain import is_plain

from loraformat.model.base_names import BaseNames
from loraformat.model.base_names.meta_model import build_on_meta
from loraformat.model.base_names.resolver import _AS_STORED
from tests.train import causal_models

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "lora_dropout": 0.1,
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "peft_version": "0.19.1",
}  # fmt: skip
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj.lora_%s.weight"


def plain_adapter(kind):
    """A base of a type and an adapter of all linears in its layers: configs, shapes and names."""
    base = causal_models.config_of(kind).to_dict()
    shapes = {n: tuple(t.shape) for n, t in build_on_meta(base).state_dict().items()}
    tensors, targets = {}, set()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and any(part.isdigit() for part in name.split(".")):
            targets.add(module.rpartition(".")[2])
            stem = f"base_model.model.{module}.lora_"
            tensors[f"{stem}A.weight"] = Stored("F32", (3, shape[1]))
            tensors[f"{stem}B.weight"] = Stored("F32", (shape[0], 3))
    return {**CONFIG, "target_modules": sorted(targets)}, tensors, base, shapes


@pytest.mark.parametrize("kind", sorted(_AS_STORED.keys() - {"gpt2"}))
def test_peft_loads_plain_adapters_of_every_type(kind):
    config, tensors, base, shapes = plain_adapter(kind)
    assert is_plain(config, tensors, base, BaseNames(shapes, base))
    assert load_on_meta(config, tensors, base) == Loaded()


@pytest.fixture(scope="module")
def llama():
    return plain_adapter("llama")


def test_whatever_a_target_may_be_besides_peft_is_asked(llama):
    config, tensors, base, shapes = llama
    for more in ("layers.0.mlp", "mlp", "embed_tokens", "layers", "weight", 3):
        changed = {**config, "target_modules": [*config["target_modules"], more]}
        assert not is_plain(changed, tensors, base, BaseNames(shapes, base))


@pytest.mark.parametrize(
    "change",
    [{"target_modules": "all-linear"}, {"target_modules": ["mlp"]}, {"r": 4}, {"r": True},
     {"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}}, {"bias": "all"},
     {"use_dora": True}, {"lora_dropout": 2}, {"task_type": "SEQ_CLS"}, {"peft_version": "new"},
     {"layers_to_transform": [0]}, {"exclude_modules": ["q_proj"]}, {"something_new": 1},
     {"modules_to_save": ["lm_head"]}, {"target_parameters": ["q_proj.weight"]}],
    ids=str,
)  # fmt: skip
def test_of_another_config_peft_is_asked(llama, change):
    config, tensors, base, shapes = llama
    assert not is_plain({**config, **change}, tensors, base, BaseNames(shapes, base))


@pytest.mark.parametrize(
    "change",
    [{Q_PROJ % "A": None}, {Q_PROJ % "A": (3, 1)}, {Q_PROJ % "B": (4, 3, 1)},
     {(Q_PROJ % "A").replace("A.", "A.default."): (3, 32)}, {"base_model.model.lm_head.weight": ()},
     {(Q_PROJ % "A").replace("model.layers.1", "model.layers.7"): (3, 32)}],
    ids=str,
)  # fmt: skip
def test_of_other_tensors_peft_is_asked(llama, change):
    config, tensors, base, shapes = llama
    changed = {name: Stored("F32", shape) for name, shape in change.items() if shape is not None}
    left = {name: tensor for name, tensor in tensors.items() if name not in change}
    assert not is_plain(config, left | changed, base, BaseNames(shapes, base))
    assert not is_plain(config, {}, base, BaseNames(shapes, base))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"model_type": "mixtral"}])
def test_of_another_base_peft_is_asked(llama, change):
    config, tensors, base, shapes = llama
    other = {**base, **change}
    assert not is_plain(config, tensors, other, BaseNames(shapes, other))


def test_of_transposed_weights_peft_is_asked():
    config, tensors, base, shapes = plain_adapter("gpt2")
    assert not is_plain(config, tensors, base, BaseNames(shapes, base))
