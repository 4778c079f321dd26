"""Laws across verbs, for a model of every family of the table: PEFT and transformers are judges.

Each model is tiny and made by transformers' own class; every matrix of its layers is tuned, experts
and routers included. What no adapter of PEFT's can hold, `extract` writes as a whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from loraformat_converters.gguf.architectures import of_config

from loraformat.errors import LoraFormatError, UnsupportedError
from loraformat.families.table import family_of
from loraformat.model.config_json import parse
from loraformat.ops.check.check import fix
from loraformat.ops.combine.combine import combine
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.ops.reduce import reduce
from tests.adapters.moe_models import TOKENS
from tests.laws.pairs import FULL_RANK, Pair, assert_close, logits, make_pair, opened, stored
from tests.torch_tensors import numbers
from tests.train import causal_models

#: One of each family of the table, and those whose classes lay out their weights otherwise.
MODELS = [
    "aria_text", "bert", "bloom", "cohere", "cohere2_moe", "deepseek_v3", "deepseek_v4",
    "falcon_mamba", "gemma3_text", "gpt2", "gpt_oss", "granitemoe", "jamba", "laguna", "llama",
    "llama4_text", "longcat_flash", "mamba2", "minimax_m2", "mixtral", "olmo2", "openai-gpt",
    "opt", "phi3", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "smollm3", "zamba",
    "zamba2",
]  # fmt: skip
#: Those that a GGUF file can be of.
IN_GGUF = {"bert", "gemma3_text", "gpt2", "llama", "mixtral", "phi3", "qwen3_moe"}


@pytest.fixture(scope="module", params=MODELS)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def pair(model_type, tmp_path_factory) -> Pair:
    return make_pair(model_type, tmp_path_factory.mktemp(model_type))


def merged(pair: Pair, adapter: Path, folder: Path) -> torch.Tensor:
    merge(pair.base, [adapter], folder, to="safetensors")
    return logits(opened(folder))


def effects(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to each weight, in float64, and what it replaces."""
    with open_model(base) as model, open_adapter(adapter, base=model) as found:
        deltas = {
            name: delta.scaling * numbers(delta.b).double() @ numbers(delta.a).double()
            for name, delta in found.deltas.items()
        }
        return deltas | {n: numbers(t).double() for n, t in found.replacements.items()}


def assert_equal_effects(found, wanted):
    assert found.keys() == wanted.keys()
    for name, effect in wanted.items():
        # Two factors of float32, each rounded once, and a sum of as many terms as the rank.
        bound = 4 * FULL_RANK * torch.finfo(torch.float32).eps * effect.abs().max()
        assert (found[name] - effect).abs().max() <= bound, name


def test_the_models_are_of_every_family():
    known = {}
    for one in causal_models.model_types():
        if one not in causal_models.NOT_BUILT:
            known.setdefault(family_of(causal_models.config_of(one).to_dict()), one)
    here = {family_of(causal_models.config_of(one).to_dict()) for one in MODELS}
    assert not {one for family, one in known.items() if family not in here}


def test_extract_then_merge_gives_the_fine_tune_back(pair, tmp_path):
    assert_close(merged(pair, pair.adapter, tmp_path / "merged"), pair)


def test_an_extracted_adapter_is_the_fine_tune_in_peft(pair):
    assert_close(pair.in_peft(pair.adapter), pair)


def test_reducing_at_full_rank_changes_nothing(pair, tmp_path):
    reduce(pair.adapter, tmp_path / "reduced", rank=FULL_RANK, base=pair.base)
    wanted = effects(pair.adapter, pair.base)
    assert_equal_effects(effects(tmp_path / "reduced", pair.base), wanted)
    assert_close(pair.in_peft(tmp_path / "reduced"), pair)


def test_an_adapter_combined_with_nothing_is_itself(pair, tmp_path):
    combine([pair.adapter], tmp_path / "combined", weight=[1.0], base=pair.base)
    wanted = effects(pair.adapter, pair.base)
    assert_equal_effects(effects(tmp_path / "combined", pair.base), wanted)
    assert_close(pair.in_peft(tmp_path / "combined"), pair)


def test_what_check_fixes_is_the_same_in_peft_and_merged(pair, tmp_path):
    with open_adapter(pair.adapter) as adapter:
        whole = bool(adapter.replacements)
    if whole:  # out_proj of a state space: no delta
        with pytest.raises(UnsupportedError, match="no adapter format"):
            fix(pair.adapter, tmp_path / "fixed", base=pair.base)
        return
    fix(pair.adapter, tmp_path / "fixed", base=pair.base)
    assert_close(pair.in_peft(tmp_path / "fixed"), pair)
    assert_close(merged(pair, tmp_path / "fixed", tmp_path / "merged"), pair)


def test_to_gguf_and_back_it_is_itself(model_type, pair, tmp_path):
    try:
        of_config(parse((pair.base / "config.json").read_bytes()))
    except LoraFormatError:
        assert model_type not in IN_GGUF
        return
    assert model_type in IN_GGUF
    convert(pair.adapter, tmp_path / "adapter.gguf", base=pair.base)
    convert(tmp_path / "adapter.gguf", tmp_path / "again", base=pair.base)
    wanted = effects(pair.adapter, pair.base)
    assert_equal_effects(effects(tmp_path / "again", pair.base), wanted)
    if model_type == "bert":  # llama.cpp has no head for it: what comes back is for its encoder
        model = peft.PeftModel.from_pretrained(encoder(pair.base), tmp_path / "again")
        torch.testing.assert_close(hidden(model), hidden(encoder(pair.folder / "tuned")))
    else:
        assert_close(pair.in_peft(tmp_path / "again"), pair)


def encoder(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).last_hidden_state


def test_modules_within_wrapped_ones_are_named_as_by_peft(tmp_path):
    """Zamba's mixer holds parameters and linears: wrappers of those come between these names."""
    causal_models.make("zamba").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["in_proj"], target_parameters=["x_proj_weight", "A_log"],
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    peft.get_peft_model(opened(tmp_path / "base"), config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", base=tmp_path / "base", canonical=True)
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert sum(".base_layer.base_layer.in_proj." in name for name in theirs) == 6
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
