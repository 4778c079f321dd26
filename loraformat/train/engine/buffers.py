"""Buffers that are used again and again: fresh memory costs more than what is computed in it."""

from __future__ import annotations

import threading

import torch

__all__ = ["Workspace", "workspace"]


class Workspace(threading.local):
    """One buffer for each purpose and dtype, of the thread that asks.

    Whoever takes a buffer has it until somebody takes it again for the same purpose: what is
    computed in it must be read before that.

    Examples
    --------
    >>> one = Workspace()
    >>> first = one.take("tile", (2, 3), torch.float32)
    >>> first.shape, one.take("tile", (3,), torch.float32).data_ptr() == first.data_ptr()
    (torch.Size([2, 3]), True)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(
        self,
        purpose: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return a contiguous tensor of undefined content.

        Parameters
        ----------
        purpose : str
        shape : tuple of int
        dtype : torch.dtype
        device : torch.device, optional
            The CPU by default.
        """
        count = torch.Size(shape).numel()
        device = torch.device("cpu") if device is None else device
        key = purpose, dtype, device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self._buffers.pop(key, None)  # the old one may go before the new one comes
            with torch.inference_mode(False):  # a tensor of inference could not be written later
                buffer = torch.empty(count, dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer[:count].view(shape)

    def forget(self, purpose: str | None = None) -> None:
        """Give this thread's buffers back: all, or those of a purpose."""
        for key in list(self._buffers):
            if purpose in (None, key[0]):
                del self._buffers[key]


workspace = Workspace()
