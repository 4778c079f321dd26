"""P6: two processes are one, by torchrun as a user starts it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from loraformat.train.loop.metrics import read_metrics

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "OFF"}


@pytest.fixture
def launch(start, place, tmp_path):
    """Starts a run of so many processes."""

    def go(name, ranks, *more):
        words = ["train", place / "bundle", place / "data.jsonl", "-o", tmp_path / name,
                 "--rank", 4, "--seq-len", 48, "--dropout", 0.1, "--no-plot", "--lr", 1.0,
                 "--optimizer", "sgd", "--eval", place / "held.jsonl", "--grad-accum",
                 4 // ranks, *more]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", "0"]
        launcher = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        prefix = [] if ranks == 1 else launcher
        return start(*map(str, [*prefix, "-m", "loraformat", *words]), env=ENVIRONMENT)

    return go


def ended(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return out, err


def record(directory):
    return read_metrics(directory / "metrics.jsonl")


def test_two_ranks_are_one(launch, tmp_path):
    """Losses, factors and second moments; the last rows do not go round."""
    out, _ = ended(launch("two", 2))
    assert out.count("wrote ") == 1
    ended(launch("one", 1))
    one, two = record(tmp_path / "one.run"), record(tmp_path / "two.run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for here, there in zip(one, two, strict=True):
        assert here.get("trained") == there.get("trained")
        for name in ("loss", "eval_loss", "gradient_norm"):
            if name in here:
                assert here[name] == pytest.approx(there[name], rel=1e-6)
    # Second moments fade with the tokens seen: each rank counts its own, and fades twice as fast.
    for name, bound in (("adapter_model", 1e-6), ("activation_statistics", 1e-4)):
        name = f"{name}.safetensors"
        first, second = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, tensor in first.items():
            scale = float(tensor.abs().max()) or 1.0
            assert float((tensor - second[key]).abs().max()) <= bound * scale, key
    facts = json.loads((tmp_path / "two" / "training_record.json").read_text())["training"]
    assert facts["ranks"] == 2
    # The adapter in the last checkpoint is the one that was written, with what both have seen.
    last = max((tmp_path / "two.run" / "checkpoints").iterdir()) / "adapter"
    for name in ("adapter_model.safetensors", "activation_statistics.safetensors"):
        assert (last / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_flat_vector_is_exact():
    """Gradients, loss and counts of two ranks that are only imagined."""
    from loraformat.train.loop.accumulation import StepSums, add_up
    from loraformat.train.loop.distributed import World

    class Imagined(World):
        def sum(self, vector):
            vector += other

    weights = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2))}
    weights["a"].grad = torch.tensor([1.0, 2.0, 3.0])
    other = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 2.5, 3.0, 7.0, 1.0])
    sums = add_up(StepSums(1.5, 4, 9), weights, Imagined(0, 2), [0.0])
    assert (sums.loss, sums.trained, sums.tokens, sums.flags) == (4.0, 7, 16, (1.0,))
    assert weights["a"].grad.tolist() == [11.0, 22.0, 33.0]
    assert weights["b"].grad.tolist() == [40.0, 50.0]


def test_each_process_has_its_own_gpu(monkeypatch):
    from loraformat.train.loop.distributed import own_device

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
