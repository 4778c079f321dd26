"""Statistics from training make a reduced adapter better on the data it was trained on."""

import peft
import pytest
import torch
from dense_sites import sites_of
from tiny_bases import load_dense, tokens

from loraformat.bundle.reader import open_bundle
from loraformat.ops.reduce import reduce
from loraformat.train import LoraOptions
from loraformat.train.loop.optimizer import parameter_groups
from loraformat.train.lora.branches import attach, trainable
from loraformat.train.lora.trained_adapter import save_adapter

STEPS = 40


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter of rank 12, trained on rows of few tokens, whose inputs differ in size."""
    options = LoraOptions(rank=12, alpha=24)
    model = load_dense(base("llama").dense).requires_grad_(False).train()
    branches = attach(sites_of(model), options)
    groups = parameter_groups(trainable(branches), 1e-2)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = tokens(3, rows=6, vocabulary=9)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "a"
    with open_bundle(base("llama").bundle) as bundle:
        save_adapter(branches, bundle, path, options=options, facts={"losses": losses})
    return path, rows, losses


def apart(base, path, other, rows):
    """How far two adapters' logits are apart on some rows."""
    with torch.no_grad():
        logits = [
            peft.PeftModel.from_pretrained(load_dense(base), adapter)(input_ids=rows).logits
            for adapter in (path, other)
        ]
    return float((logits[0] - logits[1]).norm())


def test_reduce_uses_the_statistics_and_loses_less_on_the_data(base, trained, tmp_path):
    path, rows, losses = trained
    assert losses[-1] < 0.5 * losses[0]
    dense = base("llama").dense
    # What is optimal is each layer's output alone; at half the rank it shows in the logits, too.
    for rank in (6, 8):
        aware, plain = tmp_path / f"aware-{rank}", tmp_path / f"plain-{rank}"
        report = reduce(path, aware, rank=rank)
        assert all(module.activation_aware for module in report.modules)
        report = reduce(path, plain, rank=rank, statistics=False)
        assert not any(module.activation_aware for module in report.modules)
        assert apart(dense, path, aware, rows) < 0.9 * apart(dense, path, plain, rows)
