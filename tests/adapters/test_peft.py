"""PEFT adapters: the fields and tensors that are refused, spellings of keys, copies, the verbs."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.deltas.factors import with_deltas
from loraformat.ops.opening.adapter import copy_adapter, open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.storage.atomic_output import AtomicOutput
from tests.adapters.peft_models import llama, logits, shake

ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def change_config(path: Path, **fields: object) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


def test_a_copy_is_the_adapter_byte_for_byte(plain: Path, tmp_path: Path) -> None:
    with (
        open_adapter(plain) as adapter,
        AtomicOutput(tmp_path / "out", plan="copy", inputs=adapter.sources) as output,
    ):
        copy_adapter(adapter, output)
        output.commit()
    copy = tmp_path / "out"
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in plain.iterdir())
    assert all((copy / p.name).read_bytes() == p.read_bytes() for p in plain.iterdir())


def test_a_changed_adapter_is_not_copied(plain: Path, tmp_path: Path) -> None:
    with (
        open_adapter(plain) as adapter,
        AtomicOutput(tmp_path / "out", plan="copy") as output,
        pytest.raises(UnsupportedError, match="byte for byte"),
    ):
        copy_adapter(with_deltas(adapter, adapter.deltas), output)


@pytest.mark.parametrize(
    "fields",
    [
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 1]]},
        {"kasa_config": {"beta": 1}},
        {"use_qalora": True},
        {"use_a_later_invention": True},
        {"use_bdlora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"peft_type": "LOHA"},
    ],
    ids=str,
)
def test_more_than_a_low_rank_delta_is_refused_by_name(
    plain: Path, fields: dict[str, object]
) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(fields))):
        open_adapter(change_config(plain, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 30_000_000},
        {"r": -8},
        {"r": 8.0},
        {"lora_alpha": "8"},
        {"alpha_pattern": {r"(q)\1": 4}},
        {"trainable_token_indices": [1]},
        {"alpha_pattern": {"(": 4}},
        {"alpha_pattern": [1]},
    ],
    ids=str,
)
def test_hostile_configs_are_refused(plain: Path, fields: dict[str, object]) -> None:
    with pytest.raises(InputError):
        open_adapter(change_config(plain, **fields))


def test_nan_in_the_config_is_refused(plain: Path) -> None:
    file = plain / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": NaN'))
    with pytest.raises(InputError, match="lora_alpha is nan"):
        open_adapter(plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_A" in k)), "has no lora_A"),
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "has no lora_B"),
        (lambda t: t.update(x_lora_unknown=torch.zeros(1)), "x_lora_unknown"),
        (lambda t: t.clear(), "no LoRA factors"),
        (
            lambda t: t.update({next(k for k in t if "lora_A" in k): torch.zeros(3, 64)}),
            "do not fit",
        ),
    ],
    ids=["no-A", "no-B", "unknown", "empty", "shapes"],
)
def test_broken_tensors_are_refused(plain: Path, change, words: str) -> None:
    file = plain / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=words):
        open_adapter(plain)


def test_nan_in_a_factor_is_named_when_it_is_loaded(plain: Path) -> None:
    file = plain / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with open_adapter(plain) as adapter:
        delta = next(d for d in adapter.deltas.values() if d.target.startswith("model.layers.0"))
        with pytest.raises(InputError, match="lora_B"):
            delta.b.load()


def test_a_base_of_other_shapes_is_refused(plain: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    with open_model(tmp_path / "wider") as base, pytest.raises(InputError, match="another base"):
        open_adapter(plain, base=base)


def test_the_verbs_on_adapters_of_peft(tmp_path: Path) -> None:
    from loraformat.ops.combine.combine import combine
    from loraformat.ops.merge.merge import merge
    from loraformat.ops.reduce import reduce
    from loraformat.ops.unmerge.unmerge import unmerge

    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for name, rslora in (("A", False), ("B", True)):
        model = get_peft_model(
            llama(), LoraConfig(r=4, target_modules=ALL, use_rslora=rslora, task_type="CAUSAL_LM")
        )
        shake(model)
        model.save_pretrained(tmp_path / name)
    both = [tmp_path / "A", tmp_path / "B"]
    combine(both, tmp_path / "C", method="cat", weight=[0.7, -0.3])
    reduce(tmp_path / "C", tmp_path / "same", rank=8)
    torch.testing.assert_close(
        logits(tmp_path / "base", tmp_path / "same"),
        logits(tmp_path / "base", tmp_path / "C"),
        atol=0.05,
        rtol=0.05,
    )
    merge(tmp_path / "base", both, tmp_path / "merged", weight=[0.7, -0.3], undo=tmp_path / "u.lfu")
    unmerge(tmp_path / "merged", tmp_path / "back", undo=tmp_path / "u.lfu")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
