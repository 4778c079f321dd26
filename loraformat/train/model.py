"""A model that can be trained while the weights of its base stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loraformat.bundle.reader import Bundle
from loraformat.errors import UnsupportedError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import CarriedFile
from loraformat.train.batch import Batch
from loraformat.train.engine.buffers import keep_freed_memory
from loraformat.train.engine.checkpointing import Checkpointing
from loraformat.train.engine.cross_entropy import (
    find_head_rule,
    frozen_head_loss,
    own_head_loss,
    own_logits,
)
from loraformat.train.engine.layer_prefetch import IoStats, LayerPrefetcher, StreamedMatrix
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import DenseMatrix, decoding
from loraformat.train.engine.meta_model import decoder_of, head_name, text_config
from loraformat.train.engine.stored_weights import ReadableBase, Span
from loraformat.train.engine.trial import Trial
from loraformat.train.lora import branches as branches_of_model
from loraformat.train.lora.branch import LoraBranch
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.replaced_weights import ReplacedWeights
from loraformat.train.lora.trained_adapter import save_adapter, trained_adapter

__all__ = ["TrainableModel"]


class TrainableModel(torch.nn.Module):
    """A base in mapped shards, and what is trained on it; made by `loraformat.train.load`.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        Its linears, embeddings and experts read a bundle; its layers are computed anew in the
        backward pass.
    bundle : Bundle or ReadableBase
    shared : Checkpointing
    head_spans : sequence of Span
        The bytes of the output head.
    branches : dict of str to LoraBranch
        What is trained, by the name of its place.
    options : LoraOptions or None
        How it began.
    compute_dtype : torch.dtype
        See `loraformat.train.engine.compute_dtype`.
    opened : ExitStack
        What is closed with the model.
    replaced : ReplacedWeights, optional
        What the adapter that is trained on replaces besides its deltas.
    notes : sequence of str
        What a user should know of that adapter.

    Attributes
    ----------
    base, bundle, branches, options, compute_dtype, notes
    config : transformers.PretrainedConfig
    """

    def __init__(
        self,
        base: Any,
        bundle: Bundle | ReadableBase,
        shared: Checkpointing,
        head_spans: Sequence[Span],
        branches: dict[str, LoraBranch],
        options: LoraOptions | None,
        compute_dtype: torch.dtype,
        opened: ExitStack,
        replaced: ReplacedWeights | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.replaced, self.notes = replaced, list(notes)
        self.base, self.bundle, self.compute_dtype = base, bundle, compute_dtype
        self.branches, self.options, self.config = branches, options, base.config
        self._shared, self._opened = shared, opened
        self._began_decoding = decoding.seconds
        self._trial = Trial(base, shared, bundle.checkpoint.path)
        self._head_name = head_name(base, bundle.checkpoint.path)
        self._streamed_head = StreamedMatrix(self.head.matrix, head_spans, shared.prefetcher)
        self.head.matrix = self._streamed_head
        self._trial.forward()
        cap = getattr(text_config(self.config), "final_logit_softcapping", None)
        self._head_rule = find_head_rule(base, self.head, cap)

    @property
    def directory(self) -> Path:
        """Directory of the base's files that are not weights."""
        here = self.bundle
        return here.folder.path if isinstance(here, Bundle) else here.directory

    @property
    def head(self) -> FrozenLinear:
        """The output head."""
        head: FrozenLinear = self.base.get_submodule(self._head_name)
        return head

    @property
    def tokenizer_directory(self) -> Path:
        """Directory of the tokenizer: the bundle, or an adapter with a vocabulary of its own."""
        own = None if self.replaced is None else self.replaced.tokenizer
        return own or self.directory

    @property
    def prefetcher(self) -> LayerPrefetcher:
        """The prefetcher that reads and evicts layers."""
        return self._shared.prefetcher

    @property
    def traffic(self) -> IoStats:
        """What streaming did since the model was loaded."""
        return self.prefetcher.traffic

    @property
    def activation_memory(self) -> int:
        """Bytes for layers that keep their activations instead of computing them again."""
        return self._shared.activation_budget.budget

    @activation_memory.setter
    def activation_memory(self, nbytes: int) -> None:
        self._shared.activation_budget.budget = nbytes
        keep_freed_memory(plentiful=nbytes > 0)

    @property
    def layers_kept(self) -> int:
        """How many layers kept their activations, in the batch in which the most did."""
        return self._shared.activation_budget.most

    @property
    def decode_seconds(self) -> float:
        """Time that went into dequantization since the model was loaded, of each of its threads."""
        return (decoding.seconds - self._began_decoding) / torch.get_num_threads()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Compute as transformers' own class does: logits, and with `labels` the mean loss.

        The logits of all tokens are held at once; `loss` does not do that.
        """
        if torch.is_grad_enabled():
            options.setdefault("use_cache", False)
            if input_ids is not None:
                self._trial.gradients(input_ids)
        return self.base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            labels=labels, **options,
        )  # fmt: skip

    def loss(self, batch: Batch, rows_at_once: int | None = None) -> torch.Tensor:
        """Return the sum of negative log-likelihoods of all target tokens.

        Parameters
        ----------
        batch : Batch
        rows_at_once : int, optional
            Let the rows go through each layer in groups of so many before the next layer is
            read; by default all at once.

        Returns
        -------
        torch.Tensor
            float32 scalar; its gradient is that of the sum.

        Raises
        ------
        UnsupportedError
            If rows hold several samples and the model cannot keep them apart, or if gradients
            of its class are not those of plain autograd, see `loraformat.train.engine.trial`.
        """
        if torch.is_grad_enabled():
            self._trial.gradients(batch.input_ids, rows_at_once)
        learned = batch.labels[:, 1:] >= 0
        targets = batch.labels[:, 1:][learned]
        with self._rows_at_once(rows_at_once), self._trial.packing(batch):
            output = decoder_of(self.base)(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )
        hidden = output.last_hidden_state[:, :-1][learned]
        if not len(targets):
            zero: torch.Tensor = hidden.float().sum()
            return zero
        return self._head_loss(hidden, targets)

    def _head_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = self.head
        with self._streamed_head.streaming():
            if self._head_rule is not None and head.branch is None:
                return frozen_head_loss(hidden, targets, head, self._head_rule)
            trained = [p for p in head.parameters() if p.requires_grad]
            logits = partial(own_logits, self.base)
            return own_head_loss(hidden, targets, logits, head.out_features, trained)

    @contextmanager
    def _rows_at_once(self, rows: int | None) -> Iterator[None]:
        self._shared.rows_at_once = rows
        try:
            yield
        finally:
            self._shared.rows_at_once = None

    @torch.no_grad()
    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Generate as transformers does, without dropout; see its ``GenerationMixin.generate``."""
        was = self.training
        self.eval()
        try:
            return self.base.generate(*arguments, **options)
        finally:
            self.train(was)

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """Let generation take no more of the base into memory than training does, while it lasts.

        Else its pages stay where they are from token to token, which is faster.
        """
        self._shared.sparing = True
        try:
            with self._streamed_head.streaming():
                yield
        finally:
            self._shared.sparing = False

    def for_trl(self) -> Any:
        """Return `base` for TRL's trainers, which multiply by the head's weight themselves.

        From then on ``head.weight`` is a tensor: mapped, in its own dtype, to be read only.

        Returns
        -------
        transformers.PreTrainedModel

        Raises
        ------
        UnsupportedError
            If the head is trained or in NF4, so that its weight alone would not be the head.
        """
        matrix = self._streamed_head.matrix
        if self.head.branch is not None or not isinstance(matrix, DenseMatrix):
            raise UnsupportedError(
                "TRL computes with the head's stored weight, and this head is trained or in NF4",
                path=self.bundle.checkpoint.path,
                hint="leave the head alone, or train with loraformat train",
            )
        self._trial.gradients(torch.zeros(1, 1, dtype=torch.int64, device=self.head.device))
        self.head.shown = matrix.values
        return self.base

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that are trained: float32, by place and PEFT's own key."""
        return branches_of_model.trainable(self.branches)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Return the training state besides parameters: the second moments collected so far."""
        return branches_of_model.extra_state(self.branches)

    def load_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `extra_state` returned.

        Raises
        ------
        InputError
            If it is another model's.
        """
        branches_of_model.load_extra_state(self.branches, state)

    def adapter(self) -> Adapter:
        """Return what was trained as the neutral adapter, its scaling resolved."""
        return trained_adapter(self.branches, self._trained_on(), self.replaced)

    def _trained_on(self) -> Bundle:
        """Return the bundle; a base that was opened for evaluation only is none."""
        if isinstance(self.bundle, Bundle):
            return self.bundle
        raise UnsupportedError("is not a bundle, and only bundles are trained on",
                               path=self.bundle.path)  # fmt: skip

    def save_adapter(
        self,
        path: str | Path,
        *,
        force: bool = False,
        facts: Mapping[str, Any] | None = None,
        files: tuple[CarriedFile, ...] = (),
    ) -> Path:
        """Write what was trained as a PEFT adapter, whole or not at all.

        Parameters
        ----------
        path : str or Path
            A directory, or ``BUNDLE/adapters/NAME``.
        force : bool
            Replace an adapter that stands there.
        facts : mapping, optional
            What the training says of itself, for its record.
        files : tuple of CarriedFile
            What else shall lie beside the weights.

        Returns
        -------
        Path
        """
        return save_adapter(
            self.branches, self._trained_on(), path, options=self.options, force=force, facts=facts,
            files=files, replaced=self.replaced,
        )  # fmt: skip

    def close(self) -> None:
        """Stop reading, and unmap the shards if `load` opened them."""
        self.prefetcher.close()
        self._opened.close()

    def __enter__(self) -> TrainableModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
