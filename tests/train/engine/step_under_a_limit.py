"""Run in a process of its own: two steps under hard limits (RLIMIT_DATA), one too low.

Arguments: a bundle, tokens, and two limits: bytes beyond what the process has mapped after a
first step. Printed is what became of a step under each.
"""

import resource
import sys
from pathlib import Path

import torch

from loraformat.train import LoraOptions, load
from tests.train.engine.memory_of_a_step import one_sample


def mapped_for_data() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def outcome(model, batch, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        model.loss(batch).backward()
    except (MemoryError, RuntimeError) as error:
        return "refused" if "allocate memory" in str(error) else repr(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    return "done"


if __name__ == "__main__":
    torch.set_num_threads(1)
    bundle, tokens, *beyond = sys.argv[1:]
    options = LoraOptions(rank=1, targets=("q_proj",), statistics=False)
    with load(bundle, lora=options, activation_memory=0) as model:
        batch = one_sample(int(tokens))
        for _ in range(2):  # then buffers that are reused exist, and the heap is as it stays
            model.loss(batch).backward()
        before = mapped_for_data()
        print(*(outcome(model, batch, before + int(more)) for more in beyond))
