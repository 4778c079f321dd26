"""Token embeddings that stay in a mapped shard: only the rows of a batch's tokens are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from loraformat.train.engine.matrix import DenseMatrix, Tile
from loraformat.train.engine.meta_model import PlaceholderWeight
from loraformat.train.engine.stored_weights import ComputedTable

__all__ = ["MappedEmbedding"]

_Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Rows(PlaceholderWeight):
    """Where a class looks a token up in its table itself, as Gemma 4 does for padding."""

    def __init__(self, *arguments: Any, table: torch.Tensor | ComputedTable) -> None:
        super().__init__(*arguments)
        self._table = table

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, (int, torch.Tensor)):
            return super().__getitem__(index)
        rows = torch.as_tensor(first, device=self.device)
        if rows.dtype != torch.int64:
            return super().__getitem__(index)
        found = self._table[rows].to(self.dtype)
        return found[(slice(None),) * rows.dim() + tuple(rest)] if rest else found


class MappedEmbedding(torch.nn.Module):
    """An embedding on a mapped table, in place of a module of any embedding class.

    The rows that are needed are gathered, widened, and given to the original module as if they
    were its whole table, so that what the class adds (Gemma's scale) is its own.

    Parameters
    ----------
    table : torch.Tensor or ComputedTable
        (vocabulary, width), any floating dtype, maybe mapped: read, never written.
    name : str
        Hugging Face name of the module.
    original : torch.nn.Embedding
        What it replaces; its own weight is not used.
    dtype : torch.dtype
        Of the output.

    Examples
    --------
    >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    >>> embedding = MappedEmbedding(table, "wte", torch.nn.Embedding(2, 2))
    >>> embedding(torch.tensor([[1, 1, 0]])).tolist()
    [[[3.0, 4.0], [3.0, 4.0], [1.0, 2.0]]]
    """

    def __init__(
        self,
        table: torch.Tensor | ComputedTable,
        name: str,
        original: torch.nn.Embedding,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.table, self.name, self.dtype = table, name, dtype
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = original.padding_idx
        original.padding_idx = None  # it would be looked for among the gathered rows
        del original.weight
        self.original = original
        self.branch: _Branch | None = None

    @property
    def weight(self) -> PlaceholderWeight:
        """What says the table's shape and dtype; of its numbers it has rows that are asked for."""
        shape = tuple(self.table.shape)
        return _Rows(self.name, shape, self.table.device, self.dtype, table=self.table)

    def dense_tiles(self) -> Iterator[Tile]:
        """Yield the table as (first token, end token, float32 [tokens, width]), unscaled."""
        table = self.table
        matrix = DenseMatrix(table) if isinstance(table, torch.Tensor) else table.matrix()
        return matrix.tiles(torch.float32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids, int64 of any shape: the result has one more dimension."""
        used, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.table[used.to(self.table.device)].to(input_ids.device, self.dtype)
        self.original.weight = torch.nn.Parameter(rows, requires_grad=False)
        try:
            embedded: torch.Tensor = self.original(inverse)
        finally:
            del self.original.weight
        return embedded if self.branch is None else self.branch(input_ids, embedded)
