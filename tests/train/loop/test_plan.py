"""The memory plan: its sums, its advice, and that what it bounds stays below."""

import json
from dataclasses import replace

import pytest

from loraformat.errors import ResourceError
from loraformat.train.run.memory_plan import ModelDims, advise, plan_memory
from loraformat.train.run.report import duration

SEVENTY = ModelDims(80, 8192, 28672, 128256, 39_500_000_000, 441_000_000, 828_000_000)


def plan(shape=SEVENTY, **changes):
    members = {"rows": 2, "length": 512, "process": 240_000_000, **changes}
    return plan_memory(shape, **members)


def test_adam_states_are_two_numbers_each():
    assert plan().optimizer == 8 * SEVENTY.trained
    assert plan(states="disk").optimizer == 0
    assert plan(optimizer="sgd").optimizer == 0
    assert 2 * SEVENTY.trained < plan(optimizer="adamw-8bit").optimizer < 2.1 * SEVENTY.trained


def test_small_tensors_have_states_of_32_bits_whatever_the_optimizer():
    small = replace(SEVENTY, small=SEVENTY.trained)
    assert plan(small, optimizer="adamw-8bit").optimizer == plan().optimizer
    assert plan(small).optimizer == plan().optimizer


def test_one_activation_per_layer_and_what_a_layer_holds():
    small, large = plan(), plan(length=1024)
    assert large.activations == 2 * small.activations
    assert small.activations > 1024 * 8192 * 4 * 81
    assert large.mapped == small.mapped == 2 * SEVENTY.layer_bytes


def test_a_base_that_stays_on_a_gpu():
    assert plan(resident=4 * 10**9).mapped == plan().mapped + 4 * 10**9


def test_advice_has_numbers_the_largest_first():
    said = plan(limit=8 * 10**9)
    advice = advise(said, length=512, rows=2, optimizer="adamw", states="memory", rank=64)
    assert advice == [
        "--rank 32 saves about 6.6 GB",
        "--optimizer-states disk saves about 6.6 GB",
        "--optimizer adamw-8bit saves about 5.0 GB",
        "--seq-len 256 saves about 1.9 GB",
        "one row at a time (--batch-size 1, no --layer-major) saves about 1.9 GB",
    ]
    with pytest.raises(ResourceError) as caught:
        said.refuse_if_too_much(advice)
    assert caught.value.exit_code == 6
    assert "8.0 GB are allowed" in str(caught.value)
    assert "optimizer 6.6 GB" in str(caught.value)
    plan(limit=10**12).refuse_if_too_much(advice)


def test_the_plan_for_people():
    lines = plan(limit=10**12).lines()
    assert lines[0] == "base on disk 39.5 GB, mapped, never loaded whole"
    assert "of 1000.0 GB allowed" in lines[1]
    assert duration(59.96) == "60.0 s"


def test_what_it_takes_to_begin_counts_where_it_is_more():
    small = replace(SEVENTY, trained=1_000_000, initial_bytes=10**8)
    said = plan(small)
    assert said.total == said.running == sum(said.parts.values())
    assert "before the first step 344.0 MB, of which it takes 100.0 MB" in said.lines()[2]
    assert len(plan().lines()) == 2
    limit = plan(small).running
    said = plan(replace(small, initial_bytes=10**10), limit=limit)
    assert said.total == said.before == 240_000_000 + 4_000_000 + 10**10
    assert said.to_come == said.running - 240_000_000
    advice = advise(said, length=512, rows=2, optimizer="adamw", states="memory", rank=64)
    assert advice == ["choose another --init, whose factors are drawn at random"]
    with pytest.raises(ResourceError, match=r"initialisation 10\.0 GB, process 240\.0 MB, adapter"):
        said.refuse_if_too_much(advice)


BEGINNING = """
import json, sys
from pathlib import Path
import torch
from loraformat.train import LoraOptions, load
from loraformat.train.lora.initialise import svd_bytes
from tests.peak_memory import PeakGrowth
where, init, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
original = where / "dense" if init == "loftq" else None
def begun(target):
    options = LoraOptions(rank=rank, targets=(target,), init=init)
    grown = PeakGrowth()
    with load(where / "bundle", lora=options, original=original) as model:
        reckoned = max(svd_bytes(b.target, rank, init) for b in model.branches.values())
        adapter = sum(2 * b.a.nbytes + 2 * b.b.nbytes for b in model.branches.values())
        return {"grown": grown.nbytes, "reckoned": reckoned + adapter}
begun("k_proj")
print(json.dumps(begun("down_proj")))
"""


@pytest.mark.parametrize(("init", "rank"), [("pissa", 16), ("pissa", 64), ("loftq", 16)])
def test_what_it_takes_to_begin_is_bounded(start, wide, init, rank):
    process = start("-c", BEGINNING, wide, init, str(rank), env=ALONE, cwd=".")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["grown"] < told["reckoned"] < 2 * told["grown"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of one layer, whose matrices are larger than what else a process takes by the way."""
    from tests.train.loop import tiny_runs

    directory = tmp_path_factory.mktemp("wide")
    tiny_runs.make_bundle(
        directory, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1
    )  # fmt: skip
    return directory


ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}

MEASURED = """
import json, resource, sys
from pathlib import Path
from loraformat.train.run.train import train
from loraformat.train.loop import memory
from tests.train.loop.tiny_runs import options
where = Path(sys.argv[1])
planned = {}
def announce(report):
    planned.update(report.plan.to_json())
train(options(where / "bundle", where / "data.jsonl", where / "out", rank=32, batch_size=4,
              seq_len=128, grad_accum=1, steps=2, dropout=0.0, packing=True), announce=announce)
print(json.dumps({"plan": planned, "peak": memory.peak()}))
"""


def test_the_plan_bounds_what_is_measured(start, tmp_path):
    """Of a model that is large enough to matter beside the process: 6 layers of 512."""
    from tests.train.loop import tiny_runs
    from tests.train.loop.tiny_runs import write_rows

    tiny_runs.make_bundle(
        tmp_path, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
    )  # fmt: skip
    write_rows(tmp_path / "data.jsonl", 400)
    process = start("-c", MEASURED, tmp_path, env=ALONE, cwd=".")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    grown = told["peak"] - told["plan"]["process"]
    planned = told["plan"]["total"] - told["plan"]["process"]
    assert grown < planned < 3 * grown


def test_layers_keep_what_the_limit_leaves_them():
    alone = plan()
    one_layer = 1024 * (12 * 8192 + 5 * 28672) * 4
    assert alone.kept == 0 and plan(spare=10**9).kept == 10**9
    assert plan(spare=10**15).kept == 80 * one_layer * 5 // 4
    tight = plan(spare=10**15, limit=alone.total + 12345)
    assert tight.kept == 12345 and tight.total == tight.limit
    assert plan(spare=10**15, limit=alone.total - 1).kept == 0
    assert "kept 12" in plan(spare=12_000_000).lines()[1]


def test_activations_of_two_bytes_are_half_as_large():
    assert plan(number_bytes=2).activations == plan().activations // 2
