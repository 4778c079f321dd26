"""Demo, part 4: training an adapter on the bundle.

The text is Python's language reference, which every Python carries; what is measured on was
kept out of it. The base stays mapped, as it would if it did not fit in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.demo.step import Step, Workspace
from loraformat.demo.texts import heldout_path, manual_text
from loraformat.errors import OutputError
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.verbs import evaluate, generate

if TYPE_CHECKING:
    from loraformat.train.run.report import TrainReport

__all__ = ["PROMPT", "Training", "train_adapter"]

#: What is written on from: the heading of a topic that is held out.
PROMPT = 'The "import" statement'

_SAMPLE_TOKENS = 64

_STEPS, _RANK, _RATE, _MICRO_BATCHES = 40, 8, 3e-3, 2

#: Steps between the numbers that are told of the curve.
_TOLD = 10


@dataclass(frozen=True, slots=True)
class Training:
    """Results of the training run.

    `losses` are pairs of a step and the mean training loss (nats per token) since the one before;
    `held_out` those of the held-out text, from before the first step on. `before` and `after` are
    perplexities of that text without and with the adapter. `sample` is what the adapted bundle
    writes after `prompt`, drawn from seed 0; `curve` is None without matplotlib.
    """

    adapter: Path
    text_bytes: int
    tokens: int
    steps: int
    parameters: int
    seconds: float
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    before: float
    after: float
    prompt: str
    sample: str
    curve: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {
            "adapter": str(self.adapter),
            "text_bytes": self.text_bytes,
            "tokens": self.tokens,
            "steps": self.steps,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "losses": [{"step": step, "loss": loss} for step, loss in self.losses],
            "heldout_losses": [{"step": step, "loss": loss} for step, loss in self.held_out],
            "heldout_perplexity": {"before": self.before, "after": self.after},
            "prompt": self.prompt,
            "sample": self.sample,
            "curve": None if self.curve is None else str(self.curve),
        }


def train_adapter(work: Workspace) -> tuple[Training | None, list[Step]]:
    """Train an adapter, measure it on held-out text and generate a sample.

    The text is ``manual.txt``, the adapter ``learned``. None, and no steps, without transformers.

    Raises
    ------
    LoraFormatError
        If training, measuring or writing fails.
    """
    if not find_spec("transformers"):
        work.notes.append(
            "training was skipped; run: pip install 'loraformat[demo]' for transformers"
        )
        return None, []
    text, held_out = work.directory / "manual.txt", work.directory / "held-out.txt"
    _write(text, manual_text().encode(), work.force)
    _write(held_out, heldout_path("manual").read_bytes(), work.force)
    report, losses, measured = _trained(work, text, held_out)
    evaluated, before, after = _evaluated(work, held_out)
    written, sample = _written(work)
    curve = Path(report.directory, "loss.png")
    training = Training(
        work.learned, text.stat().st_size, report.facts["trained_tokens"],
        report.facts["steps"], report.trained_parameters, report.seconds, _summed_up(losses),
        measured, before, after, PROMPT, sample, curve if curve.exists() else None,
    )  # fmt: skip
    work.notes.extend(report.notes)
    return training, [_as_step(training), evaluated, written]


def _write(path: Path, content: bytes, force: bool) -> None:
    if path.exists() and not force:
        raise OutputError("already exists", path=path, hint="use --force to replace it")
    path.write_bytes(content)


def _trained(
    work: Workspace, text: Path, held_out: Path
) -> tuple[TrainReport, list[float], list[tuple[int, float]]]:
    from loraformat.train.run.train import train

    losses: list[float] = []
    measured: list[tuple[int, float]] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])
        elif event["event"] == "evaluation":
            measured.append((event["step"], event["eval_loss"]))
            work.say(f"step {event['step']} of {_STEPS}, held-out loss {event['eval_loss']:.3f}")

    work.say("training an adapter on the bundle")
    options = TrainOptions(
        base=str(work.bundle), data=(str(text),), output=str(work.learned), rank=_RANK,
        steps=_STEPS, lr=_RATE, grad_accum=_MICRO_BATCHES, eval=(str(held_out),), eval_every=_TOLD,
    )  # fmt: skip
    return train(options, force=work.force, observe=observe), losses, measured


def _summed_up(losses: list[float]) -> list[tuple[int, float]]:
    ends = range(_TOLD, len(losses) + 1, _TOLD)
    return [(end, sum(losses[end - _TOLD : end]) / _TOLD) for end in ends]


def _as_step(training: Training) -> Step:
    first, last = training.losses[0][1], training.losses[-1][1]
    return Step(
        "learned, trained here",
        f"train bundle manual.txt -o learned --rank {_RANK} --steps {training.steps} "
        f"--lr {_RATE} --grad-accum {_MICRO_BATCHES} --eval held-out.txt --eval-every {_TOLD}",
        f"{training.parameters:,} parameters, {training.tokens:,} tokens: loss {first:.3f} to "
        f"{last:.3f} in {training.seconds:.0f} seconds",
        training.adapter,
        training.seconds,
        {"parameters": training.parameters, "first_loss": first, "last_loss": last},
        "adapter",
        ("manual", "library"),
    )


def _evaluated(work: Workspace, held_out: Path) -> tuple[Step, float, float]:
    work.say("evaluating on held-out text")
    base, adapter = str(work.bundle), str(work.learned)
    found = evaluate(base, held_out, adapter=adapter).losses
    before, after = found[base].perplexity, found[adapter].perplexity
    step = Step(
        "held-out perplexity",
        "eval bundle held-out.txt --adapter learned",
        f"perplexity {before:.2f} to {after:.2f}, loss {found[base].loss:.4f} to "
        f"{found[adapter].loss:.4f}, over {found[base].tokens:,} tokens",
        held_out,
        0.0,
        {"before": before, "after": after},
    )
    return step, before, after


def _written(work: Workspace) -> tuple[Step, str]:
    work.say("generating text")
    found = generate(work.bundle, PROMPT, adapter=work.learned, max_tokens=_SAMPLE_TOKENS)
    step = Step(
        "generated sample",
        f"generate bundle --adapter learned --prompt '{PROMPT}' --max-tokens {_SAMPLE_TOKENS}",
        " ".join(found.text.split()),
        work.learned,
        found.seconds,
        {"tokens": found.tokens},
    )
    return step, found.text
