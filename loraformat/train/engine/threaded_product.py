"""One product in pieces, each computed by one thread from the first code to the last sum.

What a thread decodes it multiplies itself, while it is in the cache of its core, and nobody waits
for others but at the end: a wait for each block would cost as much as decoding it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraformat.nf4.kernels.threads import run

__all__ = ["spread"]


def spread(
    work: Callable[[int, int], None],
    begin: int,
    end: int,
    largest: int,
    multiple: int,
    *,
    few: bool = False,
) -> None:
    """Call ``work(start, stop)`` on pieces that cover ``range(begin, end)``, without gradients.

    Parameters
    ----------
    work : callable
        Computes one piece, with torch, in one thread. The pieces are of about one size, and each
        of torch's threads gets as many as the others.
    begin, end : int
    largest : int
        Length of a piece, at most; a multiple of the next.
    multiple : int
        What the length of every piece but the last is a multiple of.
    few : bool
        So little is to be done that one piece is better than one for each thread.

    Examples
    --------
    >>> found = []
    >>> spread(lambda start, stop: found.append((start, stop)), 0, 100, largest=64, multiple=16)
    >>> sorted(found)[0][0], sorted(found)[-1][1]
    (0, 100)
    """
    total, threads = end - begin, torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def piece(start: int, stop: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(begin + start, begin + stop)

    count = -(-total // largest)
    if count > 1 or not few:
        count = -(-count // threads) * threads
    grain = -(-total // max(count, 1) // multiple) * multiple
    if grain >= total:
        piece(0, total)
        return
    run(piece, total, grain, threads, in_torch=True)
