import torch

from loraformat.train import Batch
from loraformat.train.batch import IGNORED


def _batch() -> Batch:
    return Batch(
        input_ids=torch.tensor([[5, 6, 7, 8], [9, 9, 0, 0]]),
        labels=torch.tensor([[IGNORED, 6, IGNORED, 8], [IGNORED, 9, IGNORED, IGNORED]]),
        position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]),
        segments=torch.tensor([[1, 1, 2, 2], [1, 1, 0, 0]]),
        samples=((4, 0), (2,)),
    )


def test_counts_tokens_and_trained_labels() -> None:
    assert _batch().tokens == 6
    assert _batch().trained == 3


def test_moves_every_tensor() -> None:
    moved = _batch().to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.labels)} == {"meta"}
    assert {t.device.type for t in (moved.position_ids, moved.segments)} == {"meta"}
    assert moved.samples == ((4, 0), (2,))
