"""A few training steps in one process, and what they took; `train.py` beside this starts it.

The figures are printed as one line of JSON. A limit on anonymous memory (RLIMIT_DATA) is a hard
one: what would need more fails.

Example: python tools/bench/train_step.py ours BUNDLE --tokens 128 --steps 2 --limit 1600
"""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in loraformat's commands

import torch

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SAMPLE_SECONDS = 0.02


@click.command()
@click.argument("kind", type=click.Choice(["ours", "peft-nf4", "peft-dense"]))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", default=512)
@click.option("--rank", default=8)
@click.option("--steps", default=3)
@click.option("--threads", default=2)
@click.option("--compute", default="float32", help="Dtype of the products with the base.")
@click.option("--limit", type=int, help="MiB of anonymous memory, as a hard limit.")
@click.option("--cold", is_flag=True, help="Drop each layer from the page cache once it is used.")
@click.option("--recompute", is_flag=True, help="Let no layer of ours keep its activations.")
@click.option("--device", default="cpu")
@click.option("--routing", is_flag=True, help="Count first which experts the tokens go to.")
@click.option("--target", "targets", multiple=True, help="What of ours is adapted. Repeatable.")
def main(
    kind: str, model: Path, tokens: int, rank: int, steps: int, threads: int, compute: str,
    limit: int | None, cold: bool, recompute: bool, device: str, routing: bool,
    targets: tuple[str, ...],
) -> None:  # fmt: skip
    """Run steps and print figures."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peak = _Peak()
    makers: dict[str, Callable[..., tuple[Any, list[torch.nn.Parameter]]]] = {
        "ours": partial(_ours, targets=targets), "peft-nf4": _peft_nf4, "peft-dense": _peft_dense,
    }  # fmt: skip
    began = time.perf_counter()
    loss_of, parameters = makers[kind](model, rank, getattr(torch, compute), cold, device)
    loaded = time.perf_counter() - began
    if recompute and kind == "ours":
        loss_of.model.activation_memory = 0
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    counted = loss_of.count_routing(ids) if routing and kind == "ours" else {}
    seconds, processor, losses = [], [], []
    for _ in range(steps):
        clocks = time.perf_counter(), time.process_time()
        loss = loss_of(ids.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - clocks[0])
        processor.append(time.process_time() - clocks[1])
    facts = {
        "load_seconds": loaded,
        "step_seconds": seconds,
        "step_cpu_seconds": processor,
        "losses": losses,
        "trainable": sum(parameter.numel() for parameter in parameters),
        **peak.figures(),
        **getattr(loss_of, "figures", dict)(),
        **counted,
    }
    click.echo(json.dumps(facts))


class _Peak:
    """The highest resident memory of this process, in bytes, sampled."""

    def __init__(self) -> None:
        self._highest: dict[str, int] = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = Path(f"/proc/{os.getpid()}/status")
        while True:
            for line in status.read_text().splitlines():
                field, _, rest = line.partition(":")
                if field in self._highest:
                    self._highest[field] = max(self._highest[field], int(rest.split()[0]) << 10)
            time.sleep(_SAMPLE_SECONDS)

    def figures(self) -> dict[str, int]:
        """Return the peaks, and the bytes that came from a disk."""
        read = 0
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                read = int(line.split()[1])
        return {
            "anonymous": self._highest["RssAnon"],
            "mapped": self._highest["RssFile"],
            "resident": self._highest["VmRSS"],
            "read_from_disk": read,
        }


class _OurLoss:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        from loraformat.train import Batch

        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        labels = ids.clone()
        labels[:, 0] = -100
        batch = Batch(ids, labels, positions, torch.ones_like(ids), ((0,),))
        loss: torch.Tensor = self.model.loss(batch) / batch.trained
        return loss

    def count_routing(self, ids: torch.Tensor) -> dict[str, Any]:
        """Return the tokens of each expert, by its layer, and the bytes that a step needs.

        They are those of two passes over the layers and the head; its first rows are read as they
        are multiplied, and are counted, too.
        """
        from loraformat.train.engine.experts import ExpertStack

        routed: dict[ExpertStack, dict[int, int]] = {}
        hooks = []
        for module in self.model.modules():
            if isinstance(module, ExpertStack):
                tokens = routed[module] = {}
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, given, tokens=tokens: tokens.update({given[1]: len(given[0])})
                    )
                )
        with torch.no_grad():
            self(ids)
        for hook in hooks:
            hook.remove()
        prefetcher = self.model.prefetcher
        spans = [span for layer in prefetcher._layers for _, span in layer]
        spans += [span for stack, some in routed.items() for e in some for span in stack.spans[e]]
        head = self.model.head.matrix
        wanted = 2 * sum(end - begin for _, begin, end in spans)
        self.model.traffic.bytes_read, self.model.traffic.stall_seconds = 0, 0.0
        return {
            "routed": {
                stack.name: list(some.values())
                for stack, some in routed.items()
                if stack.name.endswith("down_proj")
            },
            "layer_bytes_wanted": wanted + 2 * (2 * head.rows * head.columns),
        }

    def figures(self) -> dict[str, float]:
        traffic = self.model.traffic
        return {
            "stall_seconds": traffic.stall_seconds,
            "decode_seconds": self.model.decode_seconds,
            "layers_kept": self.model.layers_kept,
            "layer_bytes": traffic.bytes_read,
        }


def _ours(
    model: Path, rank: int, compute: torch.dtype, cold: bool, device: str,
    targets: tuple[str, ...],
) -> Any:  # fmt: skip
    from loraformat.train import LoraOptions, load

    options = LoraOptions(rank=rank, statistics=False, targets=targets or ("all-linear",))
    loaded = load(model, lora=options, compute_dtype=compute, device=device)
    loaded.prefetcher.drop_cache = cold
    loaded.train()
    return _OurLoss(loaded), list(loaded.trainable().values())


def _with_peft(base: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    base.config.use_cache = False
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_TARGETS)))
    model.train()

    def loss_of(ids: torch.Tensor) -> Any:
        return model(input_ids=ids, labels=ids).loss

    return loss_of, [p for p in model.parameters() if p.requires_grad]


def _peft_nf4(model: Path, rank: int, compute: torch.dtype, cold: bool, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=compute, device_map=device)
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = compute
    return _with_peft(base, rank)


def _peft_dense(model: Path, rank: int, compute: torch.dtype, cold: bool, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    return _with_peft(base, rank)


if __name__ == "__main__":
    main()
