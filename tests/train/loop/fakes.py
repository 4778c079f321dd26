"""A model and data of the trainer's contract, small enough to be killed a hundred times."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraformat.train.batch import IGNORED, Batch
from loraformat.train.loop.distributed import World

VOCABULARY = 32


class FakeModel(torch.nn.Module):
    """A frozen embedding and head, an adapter between them, dropout, and moments on the way."""

    def __init__(self, dropout=0.1, width=16, rank=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, width, generator=generator)
        self.a = torch.nn.Parameter(torch.randn(rank, width, generator=generator) * 0.1)
        self.b = torch.nn.Parameter(torch.zeros(width, rank))
        self.dropout = torch.nn.Dropout(dropout)
        self.moment = torch.zeros(rank, rank, dtype=torch.float64)
        self.seen = 0

    def loss(self, batch, *, rows_at_once=None):
        self.seen += 1
        rows = rows_at_once or batch.input_ids.shape[0]
        return torch.stack([
            self._part(ids, labels)
            for ids, labels in zip(
                batch.input_ids.split(rows), batch.labels.split(rows), strict=True
            )
        ]).sum()  # fmt: skip

    def _part(self, ids, labels):
        hidden = self.table[ids]
        z = self.dropout(hidden) @ self.a.T
        if self.training:
            flat = z.detach().double().flatten(0, 1)
            self.moment += flat.T @ flat
        logits = (hidden + z @ self.b.T) @ self.table.T
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
            ignore_index=IGNORED, reduction="sum",
        )  # fmt: skip

    def trainable(self):
        return {"layer.lora_A": self.a, "layer.lora_B": self.b}

    def extra_state(self):
        return {"layer.moment": self.moment}

    def load_extra_state(self, state):
        self.moment.copy_(state["layer.moment"])

    def save_adapter(self, path, *, force=False, facts=None, files=()):
        path = Path(path)
        path.mkdir(exist_ok=force)
        tensors = {**self.trainable(), **self.extra_state()}
        save_file({k: v.detach().clone() for k, v in tensors.items()}, path / "a.safetensors")
        return path


def batch(number, rows=2, length=12, trained=None):
    """The same rows whenever this number is asked for: every token is the one before plus 1."""
    generator = torch.Generator().manual_seed(number)
    start = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    ids = (start + torch.arange(length)) % VOCABULARY
    labels = ids.clone()
    labels[:, 0] = IGNORED
    keep = trained if trained is not None else 3 + number % 8
    labels[:, keep + 1 :] = IGNORED
    ones = torch.ones_like(ids)
    return Batch(
        ids, labels, torch.arange(length).expand(rows, length).clone(), ones,
        tuple((rows * number + row,) for row in range(rows)),
    )  # fmt: skip


@dataclass
class FakeData:
    """``count`` micro-batches per epoch; rank r of w takes every w-th."""

    count: int = 10
    rows: int = 2
    rank: int = 0
    size: int = 1

    def stream(self, place):
        epoch, index = place.get("epoch", 0), place.get("batch", 0)
        while True:
            while index < self.count // self.size:
                number = epoch * self.count + index * self.size + self.rank
                index += 1
                yield batch(number, self.rows), {"epoch": epoch, "batch": index}
            epoch, index = epoch + 1, 0


class HalfOfTwo(World):
    """One of two ranks; the other has collected ones, and learned nothing."""

    def sum(self, vector):
        pass

    def gather(self, tensors):
        other = {name: torch.ones_like(value) for name, value in tensors.items()}
        return [{name: value.clone() for name, value in tensors.items()}, other]
