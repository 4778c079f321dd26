"""PEFT adapters, made by PEFT itself: what it computes, we read; what we write, it computes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from loraformat import plugins
from loraformat.errors import InputError, LoraFormatError, UnsupportedError
from loraformat.ops.adapters import copy_adapter, open_adapter, write_adapter
from loraformat.ops.factors import rebuilt
from loraformat.publish import Publication

IDS = torch.arange(12)[None]


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
        eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=32,
        eos_token_id=1,
        bos_token_id=0,
    )
    return GPT2LMHeadModel(config)


ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "plain": (llama, {"target_modules": ALL}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "rslora": (llama, {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 40},
        },
    ),
    "rslora-patterns": (
        llama, {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "float-alpha": (llama, {"target_modules": ALL, "lora_alpha": 0.5}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "modules-to-save": (llama, {"target_modules": ALL, "modules_to_save": ["lm_head"]}),
    "dora": (llama, {"target_modules": ALL, "use_dora": True}),
    "some-layers": (llama, {"target_modules": ALL, "layers_to_transform": [1]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "lora-bias": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
}  # fmt: skip


def train_a_little(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    build, options = CASES[request.param]
    build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    )
    train_a_little(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).eval()(IDS).logits.detach()


def test_deltas_are_those_that_peft_merges(case: tuple[Path, Path]) -> None:
    base_path, adapter_path = case
    model = AutoModelForCausalLM.from_pretrained(base_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, adapter_path).merge_and_unload().state_dict()
    reader = plugins.sniff(base_path).read
    assert reader is not None
    with reader(base_path) as base, open_adapter(adapter_path, base=base) as adapter:
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        biases = {
            delta.target.replace(".weight", ".bias")
            for delta in adapter.deltas.values()
            if delta.bias is not None
        }
        assert changed == set(adapter.deltas) | set(adapter.replacements) | biases
        for name, delta in adapter.deltas.items():
            if delta.magnitude is not None:
                continue
            found = delta.scaling * delta.b.torch().double() @ delta.a.torch().double()
            found = found.T if delta.orientation == "transposed" else found
            wanted = (after[name] - before[name]).double()
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)
        for name, tensor in adapter.replacements.items():
            # PEFT saves an embedding that has a delta beside it, as it was before.
            assert torch.equal(
                tensor.torch(), before[name] if name in adapter.deltas else after[name]
            )


def test_what_we_write_computes_the_same_in_peft(case: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter_path = case
    with open_adapter(adapter_path) as adapter:
        write_adapter(adapter, tmp_path / "written")
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["lora_alpha"] == config["r"]
    torch.testing.assert_close(
        logits(base, tmp_path / "written"), logits(base, adapter_path), atol=2e-5, rtol=1e-4
    )


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
        Publication(tmp_path / "out", plan="copy", inputs=adapter.sources) as output,
    ):
        copy_adapter(adapter, output, "adapters/plain")
        output.commit()
    copy = tmp_path / "out/adapters/plain"
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in plain.iterdir())
    assert all((copy / p.name).read_bytes() == p.read_bytes() for p in plain.iterdir())


def test_a_changed_adapter_is_not_copied(plain: Path, tmp_path: Path) -> None:
    with (
        open_adapter(plain) as adapter,
        Publication(tmp_path / "out", plan="copy") as output,
        pytest.raises(UnsupportedError, match="byte for byte"),
    ):
        copy_adapter(rebuilt(adapter, adapter.deltas), output)


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
    with pytest.raises(InputError, match="NaN"):
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


@pytest.mark.parametrize("rename", ["default", "bare", "compiled"])
def test_other_spellings_of_the_keys(plain: Path, tmp_path: Path, rename: str) -> None:
    with open_adapter(plain) as adapter:
        wanted = set(adapter.deltas)
    spell = {
        "default": lambda key: key.replace(".weight", ".default.weight"),
        "bare": lambda key: key.removeprefix("base_model.model."),
        "compiled": lambda key: key.replace("model.model.", "model._orig_mod.model."),
    }[rename]
    shutil.copytree(plain, tmp_path / "other")
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file(
        {spell(k): v for k, v in tensors.items()}, tmp_path / "other/adapter_model.safetensors"
    )
    with open_adapter(tmp_path / "other") as adapter:
        assert set(adapter.deltas) == wanted


def test_a_pickle_is_refused_with_the_remedy(plain: Path) -> None:
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    with pytest.raises(LoraFormatError, match="safe_serialization"):
        open_adapter(plain)


def test_a_base_of_other_shapes_is_refused(plain: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    reader = plugins.sniff(tmp_path / "wider").read
    assert reader is not None
    with reader(tmp_path / "wider") as base, pytest.raises(InputError, match="another base"):
        open_adapter(plain, base=base)


def test_the_verbs_on_adapters_of_peft(tmp_path: Path) -> None:
    from loraformat.ops.combine import CombineOptions, combine
    from loraformat.ops.merge import merge
    from loraformat.ops.reduce import Reduction, reduce
    from loraformat.ops.unmerge import unmerge

    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for name, rslora in (("A", False), ("B", True)):
        model = get_peft_model(
            llama(), LoraConfig(r=4, target_modules=ALL, use_rslora=rslora, task_type="CAUSAL_LM")
        )
        train_a_little(model)
        model.save_pretrained(tmp_path / name)
    both = [tmp_path / "A", tmp_path / "B"]
    combine(both, tmp_path / "C", CombineOptions(method="cat"), weights=[0.7, -0.3])
    reduce(tmp_path / "C", tmp_path / "same", Reduction(rank=8))
    torch.testing.assert_close(
        logits(tmp_path / "base", tmp_path / "same"),
        logits(tmp_path / "base", tmp_path / "C"),
        atol=0.05,
        rtol=0.05,
    )
    merge(
        tmp_path / "base", both, tmp_path / "merged", weights=[0.7, -0.3], undo=tmp_path / "u.lfu"
    )
    unmerge(tmp_path / "merged", tmp_path / "back", undo=tmp_path / "u.lfu")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
