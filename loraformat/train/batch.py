"""A batch of training: token ids, labels, positions, segments.

A row holds one sample, or several packed behind each other. ``segments`` keeps
them apart: a token attends only to earlier tokens of its own segment, and its
position counts from the segment's start, so that a packed sample gets the very
logits that it would get alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["IGNORED", "Batch"]

IGNORED = -100
"""The label of a position that is no target token."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of token ids and their labels.

    Attributes
    ----------
    input_ids : torch.Tensor
        int64 ``[rows, length]``; padding holds any valid id.
    labels : torch.Tensor
        int64 ``[rows, length]``: the token at position t itself where it is
        learned, else ``IGNORED``. The model shifts: position t - 1 predicts it.
        The first token of a segment has nothing before it and is never learned.
    position_ids : torch.Tensor
        int64 ``[rows, length]``, from 0 in each segment; 0 at padding.
    segments : torch.Tensor
        int64 ``[rows, length]``: 1, 2, … per packed sample in a row; 0 = padding.
    samples : tuple of tuple of int
        For each row the numbers of the samples in it, in order, for messages.

    Examples
    --------
    Two samples of three and two tokens, packed into a row of six:

    >>> import torch
    >>> batch = Batch(
    ...     input_ids=torch.tensor([[5, 6, 7, 8, 9, 0]]),
    ...     labels=torch.tensor([[-100, -100, 7, -100, 9, -100]]),
    ...     position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]]),
    ...     segments=torch.tensor([[1, 1, 1, 2, 2, 0]]),
    ...     samples=((0, 1),),
    ... )
    >>> batch.tokens, batch.trained
    (5, 2)
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    samples: tuple[tuple[int, ...], ...]

    @property
    def trained(self) -> int:
        """Number of target tokens: the weight of the batch in gradient accumulation."""
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.segments != 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device.

        Parameters
        ----------
        device : torch.device or str
            Where the tensors are to be.
        """
        tensors = (self.input_ids, self.labels, self.position_ids, self.segments)
        input_ids, labels, position_ids, segments = (tensor.to(device) for tensor in tensors)
        return Batch(input_ids, labels, position_ids, segments, self.samples)
