"""P3: twenty steps against PEFT on bitsandbytes, from the same bytes, data and first factors.

bitsandbytes on processors with AVX512-BF16 repacks weights in place on the first evaluation, and
then trains with wrong gradients; ``support_avx512bf16_for_cpu = False`` keeps it from that.
"""

import pytest
import torch

from loraformat.train import load
from loraformat.train.data.dataset import open_data
from loraformat.train.loop.metrics import read_metrics
from loraformat.train.run.train import train
from tests.train.loop import tiny_runs

STEPS = 20


@pytest.fixture
def bundle(tmp_path):
    """Rows of 64 and 128: bitsandbytes on CPU multiplies wrongly where a block crosses rows."""
    return tiny_runs.make_bundle(tmp_path, intermediate_size=128)


@pytest.fixture
def peft_model(bundle):
    """The bundle's own bytes, opened by transformers and bitsandbytes, with PEFT's LoRA."""
    import bitsandbytes
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        bundle, dtype=torch.float32, attn_implementation="eager"
    )
    found = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(found) == 14
    for module in found:
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = torch.float32
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, config)


def first_factors(bundle, options):
    with load(bundle, lora=options.lora()) as model:
        return {name: value.detach().clone() for name, value in model.trainable().items()}


def copy_factors(model, factors):
    """Give PEFT's parameters the same numbers; its names have more around them."""
    left = dict(factors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
            parameter.data.copy_(left.pop(key))
    assert not left


def their_losses(model, batches, options, accumulate):
    """A plain loop of torch: AdamW, clipping, sums divided once by the learned tokens."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        window = batches[step * accumulate : (step + 1) * accumulate]
        tokens = sum(batch.trained for batch in window)
        total = 0.0
        for batch in window:
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / tokens)
    return losses


def test_twenty_steps_are_those_of_peft_and_bitsandbytes(bundle, place, peft_model, tmp_path):
    options = tiny_runs.options(
        bundle, place / "data.jsonl", tmp_path / "a", dropout=0.0, packing=False,
        schedule="constant", warmup=0.0, steps=STEPS, batch_size=2, lr=2e-3, seq_len=64,
    )  # fmt: skip
    data = open_data(options.data, bundle, options.data_options())
    stream = data.batches()
    batches = [next(stream)[0] for _ in range(STEPS * options.grad_accum)]
    copy_factors(peft_model, first_factors(bundle, options))
    theirs = their_losses(peft_model, batches, options, options.grad_accum)
    train(options)
    record = read_metrics(tmp_path / "a.run" / "metrics.jsonl")
    ours = [line["loss"] for line in record if "loss" in line]
    assert len(ours) == STEPS
    assert ours[-1] < ours[0] - 0.5
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) <= 1e-5
