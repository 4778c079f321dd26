"""Run in a process of its own: the growth of anonymous memory during a step, in bytes.

Arguments: tokens, bundles. Memory is read whenever a layer is entered: at 2 L fixed moments.
"""

import sys
from pathlib import Path

import torch

from loraformat.train import Batch, LoraOptions, load


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def one_sample(tokens: int) -> Batch:
    ids = torch.arange(tokens)[None] % 100
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = 5
    return Batch(ids, labels, torch.arange(tokens)[None], torch.ones_like(ids), ((0,),))


def growth(bundle: str, tokens: int) -> int:
    options = LoraOptions(rank=1, targets=("q_proj",), statistics=False)
    model = load(bundle, lora=options, activation_memory=0)
    batch = one_sample(tokens)
    peak, enter = 0, model.prefetcher.enter

    def watched(layer: int, direction: int) -> None:
        nonlocal peak
        enter(layer, direction)
        peak = max(peak, anonymous())

    for _ in range(2):  # then buffers that are reused exist, and the heap is as large as it gets
        model.loss(batch).backward()
    model.prefetcher.enter = watched
    grown = []
    for _ in range(3):  # the least: what the heap grows by in one of them is not the layers'
        peak, before = 0, anonymous()
        model.loss(batch).backward()
        grown.append(peak - before)
    model.close()
    return min(grown)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*(growth(bundle, int(sys.argv[1])) for bundle in sys.argv[2:]))
