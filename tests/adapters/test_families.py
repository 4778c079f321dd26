"""The table of model families says what transformers and PEFT do."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils
from peft.utils import transformers_weight_conversion as peft_conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    model_type_to_module_name,
)

from loraformat.families.expert_names import (
    EXPERT_LEAVES,
    parameter_order,
    spelled_in_memory,
    spelled_on_disk,
)
from loraformat.families.table import Family, family_of
from tests.adapters import moe_models
from tests.train import causal_models


def families(found):
    """What `family_of` says of each model type, where that is anything."""
    types = set(CONFIG_MAPPING)
    return {one for one in types if found(family_of({"model_type": one}))}


@pytest.mark.parametrize("model_type", moe_models.model_types())
def test_experts_are_transposed_where_their_class_says_so(model_type):
    config = moe_models.config_of(model_type)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    said = {m.is_transposed for m in model.modules() if hasattr(m, "is_transposed")}
    assert said <= {family_of(config.to_dict()).transposed_experts}


def test_no_other_family_is_called_transposed():
    marked = families(lambda family: family.transposed_experts)
    assert marked == {"aria", "aria_text", "gpt_oss", "openai_privacy_filter"}
    models = Path(transformers.__file__).parent / "models"
    saying = {
        file.parent.name for file in models.glob("*/modeling_*.py")
        if "is_transposed=True" in file.read_text()
    }  # fmt: skip
    assert saying == {"aria", "gpt_oss", "openai_privacy_filter"}


def test_peft_moves_the_leaves_of_experts_in_just_these_families():
    patterns = peft_conversion._MODEL_TO_CONVERSION_PATTERN
    mapping = peft_conversion._MOE_TARGET_MODULE_MAPPING
    for model_type in CONFIG_MAPPING:
        moved = mapping.get(patterns.get(model_type), {})
        assert family_of({"model_type": model_type}).expert_leaves == set(moved), model_type


def test_peft_refuses_these_modules_in_just_these_families():
    config = peft.LoraConfig()
    for model_type in CONFIG_MAPPING:
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        refused = set()
        for leaf in ("conv1d", "out_proj", "in_proj", "x_proj", "dt_proj", "down_proj"):
            try:
                tuners_utils._check_lora_target_modules_mamba(config, model, leaf)
            except ValueError:
                refused.add(leaf)
        assert family_of({"model_type": model_type}).refused_leaves == refused, model_type


def test_conv1d_families_are_those_whose_classes_use_it():
    models = Path(transformers.__file__).parent / "models"
    using = {
        file.parent.name for file in models.glob("*/modeling_*.py")
        if re.search(r"= Conv1D\(", file.read_text())
    }  # fmt: skip
    known = families(lambda family: family.conv1d)
    assert using == {model_type_to_module_name(model_type) for model_type in known}


def test_no_other_family_is_said_to_share_weights_between_layers():
    """`make real` asks every class; that these two do is tried with their gradients, too."""
    assert families(lambda family: family.shared_block is not None) == {"zamba", "zamba2"}


def conversions(kind):
    """Yield transformers' entries of a kind for any model type."""
    for model_type in CONFIG_MAPPING:
        for entry in get_checkpoint_conversion_mapping(model_type) or []:
            if type(entry) is kind:
                yield model_type, entry


def test_experts_have_the_leaves_of_transformers_own_table():
    found = {}
    for _, entry in conversions(WeightConverter):
        operations = {type(operation).__name__ for operation in entry.operations}
        sources = [re.search(r"experts\.\*\.(\w+)\.weight", p) for p in entry.source_patterns]
        if all(sources) and operations <= {"MergeModulelist", "Concatenate"}:
            (target,) = entry.target_patterns
            leaves = tuple(source[1] for source in sources)
            found.setdefault(target.rpartition(".")[2], set()).add(leaves)
    assert found == {name: set(leaves) for name, leaves in EXPERT_LEAVES.items()}


def test_blocks_of_experts_are_renamed_as_by_transformers():
    """Of every family whose block moves, and of GraniteMoE's, which stays where it is."""
    asked = set()
    names = [
        f"model.layers.3.block_sparse_moe.{inner}"
        for inner in ("gate.weight", "experts.7.w1.weight", "shared_experts.up_proj.weight",
                      "input_linear.weight", "router.layer.weight")
    ]  # fmt: skip
    for model_type, entry in conversions(WeightRenaming):
        (source,), (target,) = entry.source_patterns[:1], entry.target_patterns[:1]
        if "block_sparse_moe" not in source or "correction" in source:
            continue
        asked.add(model_type)
        for name in names[:3] if target.startswith(".mlp.") else names[3:]:
            there = re.sub(source, target, name)
            if target.startswith(".mlp."):
                assert spelled_in_memory(name) == there
                assert spelled_on_disk(there) == name
            else:
                assert spelled_in_memory(name) == name
                assert ".mlp." not in there
    assert {"mixtral", "minimax_m2", "phimoe", "granitemoe"} <= asked


@pytest.mark.parametrize("model_type", causal_models.model_types())
def test_parameters_of_a_module_are_in_the_order_of_its_class(model_type):
    """Each class whose modules hold several matrices, which PEFT wraps one by one."""
    if model_type in causal_models.NOT_BUILT:
        return
    with torch.device("meta"):
        config = causal_models.config_of(model_type)
        model = transformers.AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        names = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if len(names) > 1:
            assert parameter_order(sorted(names)) == names, type(module).__name__


def test_the_language_model_inside_counts():
    inner = {"model_type": "llava", "text_config": {"model_type": "gpt_oss"}}
    assert family_of(inner).transposed_experts
    assert family_of({"model_type": ["gpt_oss"], "text_config": 3}) == Family()


def test_families_are_tied_where_their_class_is():
    named = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    known = {}
    for model_type in named:
        with contextlib.suppress(Exception):  # a config of other configs, or of a file
            known[model_type] = CONFIG_MAPPING[model_type]()
    assert len(known) > 250
    for model_type, config in known.items():
        ties = getattr(config, "tie_word_embeddings", None) is True
        assert family_of({"model_type": model_type}).tied is ties, model_type
