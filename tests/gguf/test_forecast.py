"""A dry run says exactly how many bytes a GGUF output has, and refuses what the run would."""

from __future__ import annotations

import peft
import pytest
from bases import make_base
from transformers import AutoModelForCausalLM

from loraformat.errors import UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function: the directory of a tiny model."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda name: (
        folder / name if (folder / name).exists() else make_base(name, folder / name)
    )


def adapter_of(base, folder, **options):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", None),
        ("llama", "f32"),
        ("llama-odd", "q4_0"),
        ("llama-3.1", "q8_0"),
        ("mixtral", "q5_1"),
    ],
)
def test_a_base(bases, name, dtype, tmp_path):
    target = tmp_path / "model.gguf"
    planned = convert(bases(name), target, dtype=dtype, dry_run=True)
    assert planned.dry_run
    assert not target.exists()
    done = convert(bases(name), target, dtype=dtype)
    assert planned.output_bytes == done.output_bytes == target.stat().st_size
    assert planned.bits_per_weight == done.bits_per_weight
    assert set(planned.notes) <= set(done.notes)


def test_a_bundle(bases, tmp_path):
    convert(bases("llama"), tmp_path / "bundle")
    target = tmp_path / "model.gguf"
    planned = convert(tmp_path / "bundle", target, dtype="q8_0", dry_run=True)
    convert(tmp_path / "bundle", target, dtype="q8_0")
    assert planned.output_bytes == target.stat().st_size


@pytest.mark.parametrize("dtype", [None, "f16", "q8_0"])
def test_an_adapter(bases, dtype, tmp_path):
    base = bases("llama")
    adapter = adapter_of(base, tmp_path / "adapter", r=4, rank_pattern={"q_proj": 32})
    target = tmp_path / "lora.gguf"
    planned = convert(adapter, target, base=base, dtype=dtype, dry_run=True)
    assert not target.exists()
    done = convert(adapter, target, base=base, dtype=dtype)
    assert planned.output_bytes == done.output_bytes == target.stat().st_size
    assert planned.notes == done.notes


def test_what_the_run_would_refuse(bases, tmp_path):
    base = bases("llama")
    dora = adapter_of(base, tmp_path / "dora", r=4, use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        convert(dora, tmp_path / "lora.gguf", base=base, dry_run=True)
    with pytest.raises(UsageError, match="--base"):
        convert(dora, tmp_path / "lora.gguf", dry_run=True)
    (base / "tokenizer.json").rename(base / "hidden")
    try:
        with pytest.raises(UnsupportedError, match="tokenizer"):
            convert(base, tmp_path / "model.gguf", dry_run=True)
    finally:
        (base / "hidden").rename(base / "tokenizer.json")
