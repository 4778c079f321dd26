"""The same adapter in other files, spellings and types: it computes what it computed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraformat.errors import InputError, UnsupportedError
from loraformat.model.adapter import LoraDelta
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.check.check import fix
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.ops.reduce import reduce
from tests.adapters.peft_models import (
    IDS,
    llama,
    logits,
    qwen3_moe,
    shake,
    trained,
)
from tests.torch_tensors import numbers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def dense(delta: LoraDelta) -> torch.Tensor:
    return delta.scaling * numbers(delta.b).double() @ numbers(delta.a).double()


def rewrite(adapter: Path, change, **fields) -> Path:
    """Copy an adapter with other tensors and other members of its config."""
    other = shutil.copytree(adapter, adapter.with_name("other"), dirs_exist_ok=True)
    save_file(change(load_file(adapter / WEIGHTS)), other / WEIGHTS, {"format": "pt"})
    config = json.loads((adapter / CONFIG).read_text()) | fields
    (other / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return other


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    return trained(llama, {"target_modules": ["q_proj", "down_proj"]}, tmp_path)


FSDP = "_fsdp_wrapped_module"
SPELLINGS = {
    "default": lambda key: key.replace(".weight", ".default.weight"),
    "bare": lambda key: key.removeprefix("base_model.model."),
    "half bare": lambda key: key.removeprefix("base_model.model.model."),
    "compiled": lambda key: key.replace("model.model.", "model._orig_mod.model."),
    "compiled layers": lambda key: key.replace(".mlp.", "._orig_mod.mlp."),
    "fsdp": lambda key: f"{FSDP}.{key}".replace(".mlp.", f".{FSDP}.mlp."),
    "checkpointed": lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "fsdp, checkpointed": lambda key: f"{FSDP}.{key}".replace(
        ".mlp.", f".{FSDP}._checkpoint_wrapped_module.mlp."
    ),
    "data parallel": lambda key: f"module.{key}",
    "data parallel, compiled": lambda key: f"_orig_mod.module.{key}",
    "data parallel, bare": lambda key: f"module.{key.removeprefix('base_model.model.')}",
    "lightning": lambda key: f"model.{key}",
    "fabric": lambda key: f"_forward_module.{key}",
    "its own name": lambda key: key.replace(".weight", ".polite.weight"),
    "doubled": lambda key: key.replace("model.layers", "model.model.layers"),
    "language model": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "older language model": lambda key: key.replace("model.layers", "language_model.model.layers"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_keys(plain: tuple[Path, Path], spelling: str) -> None:
    base_path, adapter = plain
    spell = SPELLINGS[spelling]
    other = rewrite(adapter, lambda tensors: {spell(k): v for k, v in tensors.items()})
    with (
        open_model(base_path) as base,
        open_adapter(adapter, base=base) as first,
        open_adapter(other, base=base) as second,
    ):
        assert first.deltas.keys() == second.deltas.keys() <= base.tensors.keys()
        for name, delta in first.deltas.items():
            assert torch.equal(dense(delta), dense(second.deltas[name]))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_written_is_spelled_as_peft_spells_it(
    plain: tuple[Path, Path], spelling: str, tmp_path: Path
) -> None:
    """With the base in any case; without it unless only the base tells where the layers are."""
    base, adapter = plain
    usual = load_file(adapter / WEIGHTS)
    spell = SPELLINGS[spelling]
    other = rewrite(adapter, lambda tensors: {spell(k): v for k, v in tensors.items()})
    convert(other, tmp_path / "with", base=base)
    assert load_file(tmp_path / "with" / WEIGHTS).keys() == usual.keys()
    if not re.search("language|half|doubled", spelling):
        convert(other, tmp_path / "without")
        assert load_file(tmp_path / "without" / WEIGHTS).keys() == usual.keys()


def test_what_is_trained_whole_under_the_name_default_is_written_as_peft_reads_it(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """PEFT takes factors of that name, and stops with a KeyError at such a head."""
    base, adapter = plain
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    key = "base_model.model.lm_head.modules_to_save.default.weight"
    other = rewrite(adapter, lambda tensors: tensors | {key: head + 1}, modules_to_save=["lm_head"])
    convert(other, tmp_path / "written")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "written"
    ).merge_and_unload()
    assert torch.equal(model.lm_head.weight, head + 1)


def test_what_is_trained_whole_under_the_adapters_own_name(plain: tuple[Path, Path]) -> None:
    base, adapter = plain
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    key = "base_model.model.lm_head.modules_to_save.polite.weight"
    other = rewrite(
        adapter,
        lambda tensors: (
            {k.replace(".weight", ".polite.weight"): v for k, v in tensors.items()}
            | {key: head + 1}
        ),
    )
    with open_adapter(other) as opened:
        assert list(opened.replacements) == ["lm_head.weight"]


def test_two_adapters_in_one_file_are_refused(plain: tuple[Path, Path]) -> None:
    _, adapter = plain
    other = rewrite(
        adapter,
        lambda tensors: {
            k.replace(".weight", f".{name}.weight"): v.clone()
            for k, v in tensors.items()
            for name in ("one", "two")
        },
    )
    with pytest.raises(UnsupportedError, match=r"one, two.*selected_adapters"):
        open_adapter(other)


@pytest.mark.parametrize("which", ["lora_", "lora_B", "modules_to_save"])
def test_shards_that_were_never_gathered(plain: tuple[Path, Path], tmp_path: Path, which) -> None:
    """DeepSpeed's ZeRO-3 leaves tensors of shape [0] in each process's own states."""
    base, adapter = plain
    whole = {"base_model.model.lm_head.modules_to_save.weight": torch.ones(2)}
    other = rewrite(
        adapter,
        lambda tensors: {
            key: torch.zeros(0) if which in key else value
            for key, value in (tensors | whole).items()
        },
    )
    verbs = {
        "open": lambda: open_adapter(other),
        "merge": lambda: merge(base, [other], tmp_path / "out"),
        "reduce": lambda: reduce(other, tmp_path / "out", rank=2),
        "convert": lambda: convert(other, tmp_path / "out"),
        "gguf": lambda: convert(other, tmp_path / "out.gguf", base=base),
        "fix": lambda: fix(other, tmp_path / "out", base=base),
    }
    for verb, call in verbs.items():
        with pytest.raises(InputError, match=r"without being gathered.*zero_to_fp32\.py"):
            call()
        assert not (tmp_path / "out").exists(), verb


@pytest.mark.parametrize("names", ["model.language_model.", "language_model.model."])
def test_a_vision_model_that_moved_its_layers(plain: tuple[Path, Path], names: str) -> None:
    base_path, adapter = plain
    tensors = load_file(base_path / "model.safetensors")
    other = {k.replace("model.layers.", f"{names}layers."): v for k, v in tensors.items()}
    save_file(other, base_path / "model.safetensors", {"format": "pt"})
    with open_model(base_path) as base, open_adapter(adapter, base=base) as opened:
        assert len(opened.deltas) == 4
        assert opened.deltas.keys() <= base.tensors.keys()
        write_adapter(opened, base_path.parent / "written")  # under the names that it came with
    assert (
        load_file(base_path.parent / "written" / WEIGHTS).keys()
        == load_file(adapter / WEIGHTS).keys()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_factors(plain: tuple[Path, Path], tmp_path: Path, dtype) -> None:
    base, adapter = plain
    other = rewrite(adapter, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    wanted = logits(base, other)
    with open_adapter(other) as opened:
        write_adapter(opened, tmp_path / "written")
    torch.testing.assert_close(logits(base, tmp_path / "written"), wanted, atol=1e-5, rtol=1e-4)
    written = {v.dtype for k, v in load_file(tmp_path / "written" / WEIGHTS).items() if "_A" in k}
    assert written == {dtype}


def test_mixed_types_and_8_bits(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    types = [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.float16, torch.float8_e5m2]

    def mixed(tensors):
        return {k: v.to(types[n % 5]) for n, (k, v) in enumerate(sorted(tensors.items()))}

    other = rewrite(adapter, mixed)
    same = rewrite(adapter, lambda tensors: {k: v.float() for k, v in mixed(tensors).items()})
    same = same.rename(tmp_path / "same")
    other = rewrite(adapter, mixed)
    with open_adapter(other) as opened, open_adapter(same) as wanted:
        for name, delta in opened.deltas.items():
            assert torch.equal(dense(delta), dense(wanted.deltas[name]))
        write_adapter(opened, tmp_path / "written")
    merge(base, [other], tmp_path / "merged")
    torch.testing.assert_close(
        logits(tmp_path / "merged"), logits(base, same), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        logits(base, tmp_path / "written"), logits(base, same), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("dtype", "alpha", "wanted"),
    [
        (torch.bfloat16, 4, torch.bfloat16),
        (torch.bfloat16, 8, torch.bfloat16),
        (torch.bfloat16, 12, torch.float32),
        (torch.float16, 4, torch.float16),
        (torch.float16, 8, torch.float32),
        (torch.float32, 12, torch.float32),
    ],
    ids=str,
)
def test_folding_loses_no_bit_of_b(
    plain: tuple[Path, Path], tmp_path: Path, dtype, alpha: int, wanted
) -> None:
    other = rewrite(
        plain[1], lambda tensors: {k: v.to(dtype) for k, v in tensors.items()}, lora_alpha=alpha
    )
    with open_adapter(other) as opened:
        write_adapter(opened, tmp_path / "written")
    before, after = load_file(other / WEIGHTS), load_file(tmp_path / "written" / WEIGHTS)
    for name, value in before.items():
        factor = alpha / 4 if "lora_B" in name else 1
        assert after[name].dtype == (wanted if "lora_B" in name else dtype)
        assert torch.equal(after[name].double(), (value.double() * factor).to(wanted).double())


def test_half_precision_that_overflows_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    other = rewrite(plain[1], dict, lora_alpha=1e9)
    with open_adapter(other) as opened, pytest.raises(UnsupportedError, match=r"lora_B.*F16"):
        write_adapter(opened, tmp_path / "written", dtype="f16")
    assert not (tmp_path / "written").exists()


def test_fields_that_are_missing_or_from_the_future(plain: tuple[Path, Path]) -> None:
    _, adapter = plain
    missing = ["bias", "use_rslora", "alpha_pattern", "rank_pattern", "use_dora", "task_type"]
    other = rewrite(
        adapter, dict, **dict.fromkeys(missing, "absent"), peft_version="9.0.0.dev0", a_knob=3,
        another=None, use_a_third=False,
    )  # fmt: skip
    with open_adapter(adapter) as first, open_adapter(other) as second:
        assert [note for note in second.notes if "unknown" in note] == [
            "adapter_config.json: field a_knob is unknown and was ignored"
        ]
        assert not first.notes
        for name, delta in first.deltas.items():
            assert torch.equal(dense(delta), dense(second.deltas[name]))


def test_an_adapter_that_does_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    other = rewrite(adapter, lambda tensors: {k: v * ("lora_A" in k) for k, v in tensors.items()})
    merge(base, [other], tmp_path / "merged")
    assert torch.equal(logits(tmp_path / "merged"), logits(base))


def test_shards_with_an_index(plain: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = plain
    other = shutil.copytree(adapter, tmp_path / "shards")
    (other / WEIGHTS).unlink()
    index = {}
    for number, (name, value) in enumerate(load_file(adapter / WEIGHTS).items()):
        shard = f"adapter_model-{number % 3 + 1:05d}-of-00003.safetensors"
        index.setdefault(shard, {})[name] = value
    for shard, tensors in index.items():
        save_file(tensors, other / shard)
    names = {name: shard for shard, tensors in index.items() for name in tensors}
    (other / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with open_adapter(adapter) as first, open_adapter(other) as second:
        assert first.verbatim and not second.verbatim  # PEFT reads one file
        for name, delta in first.deltas.items():
            assert torch.equal(dense(delta), dense(second.deltas[name]))
        write_adapter(second, tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir() if "adapter" in p.name) == [
        CONFIG, WEIGHTS,
    ]  # fmt: skip
    odd = next(iter(names))
    (other / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {k: v for k, v in names.items() if k != odd}})
    )
    with pytest.raises(InputError, match="not in both"):
        open_adapter(other)


def test_a_pickle_is_read_on_request_only(tmp_path: Path) -> None:
    base, adapter = trained(
        llama, {"target_modules": ["q_proj"]}, tmp_path, saving={"safe_serialization": False}
    )
    assert (adapter / "adapter_model.bin").exists() and not (adapter / WEIGHTS).exists()
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        open_adapter(adapter)
    with open_adapter(adapter, allow_pickle=True) as opened:
        assert not opened.verbatim
        write_adapter(opened, tmp_path / "written")
    assert not (tmp_path / "written" / "adapter_model.bin").exists()
    torch.testing.assert_close(
        logits(base, tmp_path / "written"), logits(base, adapter), atol=1e-5, rtol=1e-4
    )


def test_patterns_that_disagree_are_noted_and_read_as_peft_reads_them(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 1, r"layers\.1.*": 8}}
    base, adapter = trained(llama, options, tmp_path)
    with open_adapter(adapter) as opened:
        assert [d.scaling for d in opened.deltas.values()] == [1 / 4, 8 / 4]
        assert any("alpha_pattern" in note and "first is taken" in note for note in opened.notes)
        write_adapter(opened, tmp_path / "written")
    torch.testing.assert_close(
        logits(base, tmp_path / "written"), logits(base, adapter), atol=1e-5, rtol=1e-4
    )


def moment(*shape: int) -> torch.Tensor:
    z = torch.randn(*shape[:-1], 50, generator=torch.Generator().manual_seed(2))
    return (z @ z.mT / 50).contiguous()


def test_activation_statistics_travel_with_the_adapter(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    base, adapter = trained(qwen3_moe, options, tmp_path)
    stored = {
        "model.layers.0.self_attn.q_proj.second_moment": moment(4, 4),
        "model.layers.1.mlp.experts.down_proj.second_moment": moment(4, 4, 4),
    }
    save_file(stored, adapter / "activation_statistics.safetensors")
    with open_adapter(adapter) as opened:
        assert sum(delta.second_moment is not None for delta in opened.deltas.values()) == 2
        write_adapter(opened, tmp_path / "written")
    again = load_file(tmp_path / "written" / "activation_statistics.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    torch.testing.assert_close(
        logits(base, tmp_path / "written"), logits(base, adapter), atol=1e-5, rtol=1e-4
    )


def test_reducing_reads_the_statistics_from_disk(plain: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = plain
    reduce(adapter, tmp_path / "blind", rank=2)
    with open_adapter(adapter) as opened:
        names = [f"{delta.target.removesuffix('.weight')}.second_moment"
                 for delta in opened.deltas.values()]  # fmt: skip
    save_file(
        {name: moment(4, 4) for name in names},
        adapter / "activation_statistics.safetensors",
    )
    reduce(adapter, tmp_path / "aware", rank=2)
    with open_adapter(tmp_path / "blind") as blind, open_adapter(tmp_path / "aware") as aware:
        for name, delta in aware.deltas.items():
            assert delta.second_moment is not None and delta.second_moment.shape == (2, 2)
            delta.second_moment.load()
            assert not torch.allclose(dense(delta), dense(blind.deltas[name]))


def test_very_many_modules_keep_the_config_small(
    plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = plain
    some = rewrite(
        adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.0.mlp" not in k}
    )
    monkeypatch.setattr("loraformat_converters.peft.wrapping._MOST_NAMES", 2)
    with open_adapter(some) as opened:
        write_adapter(opened, tmp_path / "short")
        config = json.loads((tmp_path / "short" / CONFIG).read_text())
        assert config["target_modules"] == ["down_proj", "q_proj"]
        monkeypatch.setattr("loraformat_converters.peft.write.MAX_CONFIG_BYTES", 100)
        with pytest.raises(UnsupportedError, match="reduce --rank"):
            write_adapter(opened, tmp_path / "long")
    assert not (tmp_path / "long").exists()
    merge(base, [some], tmp_path / "merged")
    torch.testing.assert_close(
        logits(base, tmp_path / "short"), logits(tmp_path / "merged"), atol=1e-5, rtol=1e-4
    )


def test_an_adapter_of_a_bfloat16_base(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "down_proj"]}
    base, adapter = trained(llama, options, tmp_path, dtype=torch.bfloat16)
    wanted = logits(base, adapter)
    merge(base, [adapter], tmp_path / "merged", dtype="f32")
    torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=1e-5, rtol=1e-4)
    with open_adapter(adapter) as opened:
        write_adapter(opened, tmp_path / "written")
    torch.testing.assert_close(logits(base, tmp_path / "written"), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_converted_pissa_adapter_is_one_of_its_base(tmp_path: Path, rslora: bool) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj"], use_rslora=rslora
    )
    model = get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    shake(model)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match=r"pissa.*path_initial_model_for_weight_conversion"):
        open_adapter(tmp_path / "plain")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    reduce(tmp_path / "converted", tmp_path / "reduced", rank=8)
    for path in (tmp_path / "converted", tmp_path / "reduced"):
        merge(tmp_path / "base", [path], tmp_path / "merged", force=True)
        torch.testing.assert_close(logits(tmp_path / "merged"), wanted, atol=3e-5, rtol=1e-4)
