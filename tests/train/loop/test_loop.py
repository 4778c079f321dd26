"""Steps, evaluation, early stop, best parameters, what stops a run."""

import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from loraformat.errors import DivergedError, InputError
from loraformat.train.loop import saved_state
from loraformat.train.loop.accumulation import accumulate, joined
from loraformat.train.loop.distributed import World
from loraformat.train.loop.evaluation import HeldOutLoss, held_out_loss
from loraformat.train.loop.loop import Loop, LoopOptions
from loraformat.train.loop.metrics import Metrics, read_metrics
from loraformat.train.loop.optimizer import Optimizer
from loraformat.train.loop.optimizer_options import OptimizerOptions, Schedule
from loraformat.train.loop.saved_state import RunState
from tests.train.loop.fakes import FakeData, FakeModel, HalfOfTwo, batch


def make(directory, *, model=None, data=None, checkpoint=None, metrics=None, **options):
    """A loop, and with a checkpoint one that goes on from it."""
    loop_options = LoopOptions(**{"steps": 8, "grad_accum": 2, **options.pop("loop", {})})
    model = model or FakeModel()
    state = RunState.from_json(checkpoint.facts["run"]) if checkpoint else RunState()
    loop = Loop(
        model, (data or FakeData()).stream(state.cursor),
        Optimizer(model.trainable(), OptimizerOptions()),
        Schedule("cosine", 0.05, loop_options.steps, warmup=2),
        loop_options, directory / "checkpoints",
        metrics or Metrics(
            directory / "metrics.jsonl",
            position=checkpoint.facts["metrics"] if checkpoint else 0,
        ),
        state, **options,
    )  # fmt: skip
    if checkpoint:
        loop.restore(checkpoint)
    return loop


def everything(loop):
    model = loop.model
    named = {**model.trainable(), **model.extra_state(), **loop.optimizer.tensors()}
    return {name: value.detach().clone() for name, value in named.items()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def losses(directory):
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]


def test_the_loss_falls_and_is_told(tmp_path):
    told = []
    loop = make(tmp_path, loop={"steps": 30}, observe=told.append)
    state = loop.run()
    assert (state.step, state.cursor) == (30, {"epoch": 5, "batch": 10})
    assert state.last_loss < 0.8 * state.first_loss
    steps = [event for event in told if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 31))
    assert losses(tmp_path) == [event["loss"] for event in steps]
    assert steps[0]["learning_rate"] == pytest.approx(0.025)
    assert steps[0]["tokens_per_second"] > 0
    assert steps[0]["memory"] > 1e6


def test_accumulation_is_exact_for_ragged_micro_batches():
    """P4: four micro-batches of a row are one of four rows, whatever each of them learns."""
    rows = [batch(number, rows=1, trained=count) for number, count in enumerate((1, 11, 3, 7))]
    gradients = []
    for batches in (rows, [joined(rows)]):
        model = FakeModel(dropout=0.0).double()
        model.table = model.table.double()
        sums = accumulate(model, batches, seed=0, step=0, world=World())
        gradients.append([p.grad for p in model.trainable().values()])
        assert (sums.trained, sums.tokens) == (22, 48)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_mean_of_means_would_differ(tmp_path):
    """What the test above is there for: weights of micro-batches are their learned tokens."""
    rows = [batch(number, rows=1, trained=count) for number, count in enumerate((1, 11))]
    model = FakeModel(dropout=0.0)
    values = [float(model.loss(row).detach()) for row in rows]
    sums = accumulate(model, rows, seed=0, step=0, world=World())
    assert sums.loss / sums.trained == pytest.approx(sum(values) / 12)
    assert abs(sums.loss / sums.trained - (values[0] / 1 + values[1] / 11) / 2) > 1e-2


def test_layer_major_is_the_same_step():
    model = FakeModel(dropout=0.0)
    rows = [batch(number) for number in range(3)]
    accumulate(model, rows, seed=0, step=0, world=World(), layer_major=True)
    assert model.seen == 1
    other = FakeModel(dropout=0.0)
    accumulate(other, rows, seed=0, step=0, world=World())
    assert other.seen == 3
    torch.testing.assert_close(model.a.grad, other.a.grad)
    torch.testing.assert_close(model.b.grad, other.b.grad)


def test_dropout_is_drawn_from_seed_step_and_number():
    def gradient(seed, step):
        model = FakeModel(dropout=0.5)
        torch.rand(7)  # whatever was drawn before
        accumulate(model, [batch(0), batch(1)], seed=seed, step=step, world=World())
        return model.b.grad

    assert torch.equal(gradient(3, 5), gradient(3, 5))
    assert not torch.equal(gradient(3, 5), gradient(3, 6))
    assert not torch.equal(gradient(3, 5), gradient(4, 5))


# Going on


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_going_on_is_bit_for_bit(tmp_path, stop):
    """P7, with dropout, moments, two epochs and a warmup."""
    (tmp_path / "whole").mkdir()
    whole = make(tmp_path / "whole")
    whole.run()
    first = make(tmp_path, loop={"save_every": stop})
    for event in iter_steps(first, stop):
        assert event["step"] <= stop
    found, problems = saved_state.newest(tmp_path / "checkpoints")
    assert (found.step, problems) == (stop, [])
    second = make(tmp_path, checkpoint=found)
    second.run()
    assert same(everything(whole), everything(second))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def iter_steps(loop, count):
    """Run until so many steps are made and saved, as if the process were killed then."""
    seen = []

    class Killed(BaseException):
        pass

    def observe(event):
        seen.append(event)
        if event["event"] == "checkpoint" and event["step"] == count:
            raise Killed

    loop.observe = observe
    with pytest.raises(Killed):
        loop.run()
    return [event for event in seen if event["event"] == "step"]


def test_ctrl_c_saves_the_last_whole_step(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = make(tmp_path / "whole")
    whole.run()

    class Interrupted(FakeModel):
        def loss(self, *arguments, **options):
            if self.seen == 7:  # in the middle of the fourth step
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(*arguments, **options)

    before = signal.getsignal(signal.SIGINT)
    first = make(tmp_path, model=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert signal.getsignal(signal.SIGINT) is before
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    assert found.step == 3
    second = make(tmp_path, checkpoint=found)
    second.run()
    assert same(everything(whole), everything(second))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_signal_while_parameters_change_waits(tmp_path):
    loop = make(tmp_path, loop={"steps": 4})
    update = loop.optimizer.step

    def interrupted(rate):
        os.kill(os.getpid(), signal.SIGTERM)
        update(rate)

    loop.optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    assert found.step == 1
    assert float(found.tensors["optimizer:step:layer.lora_A"]) == 1.0


def test_other_parameters_are_refused(tmp_path):
    make(tmp_path, loop={"save_every": 4}).run()
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="shape"):
        make(tmp_path, model=FakeModel(rank=2), checkpoint=found)


def test_checkpoints_that_are_kept(tmp_path):
    make(tmp_path, loop={"save_every": 3, "keep": 2}).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]
    adapter = tmp_path / "checkpoints" / names[0] / "adapter"
    assert (adapter / "a.safetensors").is_file()


def test_an_adapter_in_a_checkpoint_holds_what_all_ranks_have_collected(tmp_path):
    loop = make(tmp_path, world=HalfOfTwo(0, 2), loop={"steps": 1})
    loop.run()
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    own = found.tensors["extra:0:layer.moment"]
    assert torch.equal(own, loop.model.moment)  # it goes on with its own
    assert torch.equal(found.tensors["extra:1:layer.moment"], torch.ones_like(own))
    saved = load_file(found.path / "adapter" / "a.safetensors")
    assert torch.equal(saved["layer.moment"], own + 1)


def test_a_checkpoint_every_ten_minutes(tmp_path, monkeypatch):
    from loraformat.train.loop import loop as module

    told = []
    monkeypatch.setattr(module, "_SAVE_SECONDS", -1.0)
    make(tmp_path, observe=told.append, loop={"steps": 3}).run()
    assert [event["step"] for event in told if event["event"] == "checkpoint"] == [1, 2, 3]


# Held-out data


def test_held_out_loss_is_a_mean_over_tokens():
    model = FakeModel(dropout=0.5).train()
    parts = [batch(number, trained=count) for number, count in ((0, 2), (1, 10))]
    found = held_out_loss(model, parts)
    model.eval()
    whole = sum(float(model.loss(part).detach()) for part in parts)
    assert found.loss == pytest.approx(whole / 24)
    assert found.perplexity == pytest.approx(math.exp(whole / 24))
    assert found.tokens == 24
    model.train()
    assert held_out_loss(model, parts).loss == found.loss  # no dropout
    assert model.training
    assert not model.moment.any()
    with pytest.raises(InputError, match="no token"):
        held_out_loss(model, [batch(0, trained=0)])


def test_evaluations_come_first_in_between_and_last(tmp_path):
    model = FakeModel()
    evaluate = lambda: held_out_loss(model, [batch(99)])  # noqa: E731
    sample = lambda: [("Once", " upon")]  # noqa: E731
    told = []
    state = make(
        tmp_path, model=model, evaluate=evaluate, sample=sample, observe=told.append,
        loop={"eval_every": 3},
    ).run()  # fmt: skip
    steps = [event["step"] for event in told if event["event"] == "evaluation"]
    assert steps == [0, 3, 6, 8]
    assert state.last_eval < state.first_eval
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in kept if "eval_loss" in line] == steps
    assert {"step": 3, "prompt": "Once", "text": " upon"} in kept


def scripted(values):
    remaining = iter(values)
    return lambda: HeldOutLoss(next(remaining), 1)


def test_early_stop(tmp_path):
    loop = make(
        tmp_path, evaluate=scripted([5.0, 4.0, 3.0, 3.5, 3.0, 2.0]),
        loop={"eval_every": 1, "early_stop": 2},
    )  # fmt: skip
    state = loop.run()
    assert (state.step, state.best_step, state.best_eval) == (4, 2, 3.0)


def test_the_best_parameters_end_the_run(tmp_path):
    kept = {}
    model = FakeModel()

    def observe(event):
        if event["event"] == "step":
            now = model.trainable() | model.extra_state()
            kept[event["step"]] = {k: v.detach().clone() for k, v in now.items()}

    evaluate = scripted([5.0, 4.0, 3.0, math.nan, 3.5, 6.0, 7.0, 8.0, 9.0])
    make(
        tmp_path, model=model, evaluate=evaluate, observe=observe,
        loop={"eval_every": 1, "best": True},
    ).run()  # fmt: skip
    # With what was collected up to there: later sums are of a later A.
    assert same(model.trainable() | model.extra_state(), kept[2])
    assert not same(model.trainable(), {k: kept[8][k] for k in model.trainable()})
    assert not torch.equal(model.moment, kept[8]["layer.moment"])


def test_the_best_statistics_of_all_ranks_are_counted_once(tmp_path):
    seen, models = {}, [FakeModel(), FakeModel()]

    def observe(event):
        seen[event["event"], event["step"]] = models[0].moment.clone()

    for rank, model in enumerate(models):
        make(
            tmp_path, model=model, world=HalfOfTwo(rank, 2),
            evaluate=scripted([3.0, 2.0, 5.0, 5.0]),
            observe=observe if rank == 0 else lambda event: None,
            loop={"eval_every": 1, "best": True, "steps": 3},
        ).run()  # fmt: skip
    assert torch.equal(models[0].moment, seen["step", 1] + 1)
    assert not models[1].moment.any()  # so that the sum of both is that


def test_an_interrupted_evaluation_is_made_again(tmp_path):
    calls = []

    def evaluate():
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return HeldOutLoss(1.0 / len(calls), 1)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, evaluate=evaluate, loop={"eval_every": 4}).run()
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    assert (found.step, found.facts["run"]["evaluated"]) == (4, 0)
    make(tmp_path, evaluate=evaluate, checkpoint=found, loop={"eval_every": 4}).run()
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in kept if "eval_loss" in line] == [0, 4, 8]


# What stops a run


def test_nan_stops_with_the_samples_named(tmp_path):
    class Poisoned(FakeModel):
        def loss(self, batch, **options):
            value = super().loss(batch, **options)
            return value * math.nan if (8,) in batch.samples else value

    loop = make(tmp_path, model=Poisoned(), loop={"save_every": 1})
    with pytest.raises(DivergedError, match=r"step 3 is nan, with the samples 8, 9; nothing"):
        loop.run()
    found, _ = saved_state.newest(tmp_path / "checkpoints")
    assert found.step == 2
    assert same(found.part("parameter:"), loop.model.trainable())
    assert same(found.part("extra:0:"), loop.model.extra_state())


class Talk(World):
    """One of two ranks; what the other says is made up."""

    def __init__(self, diverged):
        super().__init__(0, 2)
        self.diverged, self.sums = diverged, 0

    def sum(self, vector):
        self.sums += 1
        vector[-1] += self.diverged  # the last flag


def test_ranks_stop_together_when_one_finds_nan(tmp_path):
    (tmp_path / "own").mkdir()
    poisoned = FakeModel()
    poisoned.b.data.fill_(math.nan)
    world = Talk(diverged=0)
    with pytest.raises(DivergedError, match="step 1 is nan, with the samples 0, 1"):
        make(tmp_path / "own", model=poisoned, world=world).run()
    assert world.sums == 1  # and the other heard of it
    model = FakeModel()
    with pytest.raises(DivergedError, match="step 1 is not finite on another process"):
        make(tmp_path, model=model, world=Talk(diverged=1)).run()
    assert same(model.trainable(), FakeModel().trainable())
    assert same(model.extra_state(), FakeModel().extra_state())


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    class Poisoned(FakeModel):
        def loss(self, batch, **options):
            if (8,) in batch.samples:
                self.b.register_hook(lambda gradient: gradient * math.inf)
            return super().loss(batch, **options)

    loop = make(tmp_path, model=Poisoned())
    with pytest.raises(DivergedError, match=r"gradient of layer\.lora_B in step 3 is not finite"):
        loop.run()
    assert torch.isfinite(loop.model.b).all()


def test_a_step_without_learned_tokens_changes_nothing(tmp_path):
    class Nothing(FakeData):
        def stream(self, place):
            while True:
                yield batch(1, trained=0), {"epoch": 0, "batch": 1}

    model = FakeModel()
    make(tmp_path, model=model, data=Nothing(), loop={"steps": 2}).run()
    assert same(model.trainable(), FakeModel().trainable())
