"""Extraction of every other mixture of experts that transformers has, and of square experts."""

import pytest

from loraformat.ops.merge.merge import merge
from loraformat.ops.reduce import reduce
from tests.adapters import moe_models
from tests.laws.pairs import FULL_RANK, assert_close, logits, make_pair, opened
from tests.laws.test_families import MODELS

#: Ways of storing experts that no adapter's names lead to.
NOT_NAMED = {"inkling2_text"}
#: As many rows as columns: no shape gives a transposition away.
SQUARE = [
    pytest.param(one, {"intermediate_size": 32}, id=f"{one}-square")
    for one in ("aria_text", "gpt_oss", "llama4_text", "mixtral")
]


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        *(pytest.param(o, {}, id=o) for o in moe_models.model_types() if o not in MODELS),
        *SQUARE,
    ],
)
def test_an_extracted_adapter_gives_the_fine_tune_back(model_type, sizes, tmp_path):
    """And so does the same adapter reduced at full rank."""
    pair = make_pair(model_type, tmp_path, **sizes)
    merge(pair.base, [pair.adapter], tmp_path / "merged", to="safetensors")
    assert_close(logits(opened(tmp_path / "merged")), pair)
    reduce(pair.adapter, tmp_path / "reduced", rank=FULL_RANK, base=pair.base)
    if model_type not in NOT_NAMED:
        for one in (pair.adapter, tmp_path / "reduced"):
            assert_close(pair.in_peft(one), pair)
