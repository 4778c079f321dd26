"""What may be asked of an adapter, and what is refused."""

import pytest

from loraformat.errors import UsageError
from loraformat.train import LoraOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": 1 << 20}, {"ranks": {"q_proj": 0}}, {"alpha": 0.0},
        {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": -0.1}, {"init": "zeros"},
        {"targets": ()}, {"targets": "all-linear"},
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).rstrip("s")):
        LoraOptions(**wrong)


def test_embeddings_or_the_head_may_be_trained_alone():
    assert LoraOptions(targets=(), head=True).head


def test_scaling_is_that_of_the_module_s_own_rank():
    assert LoraOptions(rank=16).scaling(4) == 1.0
    assert LoraOptions(rank=16, alpha=8).scaling(4) == 2.0
    assert LoraOptions(rank=16, alpha=8, rslora=True).scaling(4) == 4.0
