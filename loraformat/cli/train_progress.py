"""Progress display of ``train`` on stderr: plan, sample, and a bar with loss, speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraformat.cli.console import clean, say
from loraformat.storage.byte_sizes import format_size

__all__ = ["TrainingBar"]


class TrainingBar:
    """A progress display on stderr; a context manager. `quiet` draws nothing.

    With `plan` it shows that of a run before its first step; `notes_told` is how many of a report's
    notes were shown then.
    """

    def __init__(self, *, quiet: bool, plan: bool = True) -> None:
        self._quiet, self._plan = quiet, plan
        self._bar: Any = None
        self._steps = 0
        self._held = ""
        self.notes_told = 0

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar and leave it on screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def rows(self, done: int, total: int) -> None:
        """Show the number of scanned rows."""
        self._count("data", "row", done, total)

    def batches(self, name: str, done: int, total: int) -> None:
        """Show the number of evaluated batches."""
        self._count(Path(name).name, "batch", done, total)

    def _count(self, label: str, unit: str, done: int, total: int) -> None:
        if self._quiet:
            return
        self._draw(label, unit, total)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def announce(self, report: Any) -> None:
        """Show the plan, its notes, and one sample with its target tokens."""
        self._steps = report.steps
        if self._quiet or not self._plan:
            return
        self.close()
        self.notes_told = len(report.notes)
        for line in (*report.plan_lines(), *(f"note: {note}" for note in report.notes)):
            click.echo(clean(line), err=True)
        say("a sample, with target tokens between ⟦ and ⟧:", err=True)
        for line in _first_lines(report.preview):
            click.echo(f"  {clean(line)}", err=True)

    def observe(self, event: dict[str, Any]) -> None:
        """Show a step, an evaluation, a sample."""
        if self._quiet:
            return
        if event["event"] == "step":
            self._step(event)
        elif event["event"] == "evaluation":
            self._held = f"{event['eval_loss']:.4f}"
            self._say(
                f"step {event['step']}: held-out loss {event['eval_loss']:.4f}, "
                f"perplexity {event['eval_perplexity']:.4g}"
            )
        elif event["event"] == "sample":
            self._say(f"{event['prompt']}⟦{event['text']}⟧")

    def _step(self, event: dict[str, Any]) -> None:
        self._draw("train", "step", self._steps, event["step"] - 1)
        shown = {
            "loss": f"{event['loss']:.4f}",
            "tokens/s": f"{event['tokens_per_second']:.0f}",
            "memory": format_size(event["memory"]),
        }
        if self._held:
            shown["held-out"] = self._held
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(event["step"] - self._bar.n)

    def _draw(self, label: str, unit: str, total: int, done: int = 0) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=label, unit=unit, total=total, initial=done, disable=None)
        self._bar.total = total

    def _say(self, text: str) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode():
            say(text, err=True)


def _first_lines(text: str, lines: int = 12, width: int = 400) -> list[str]:
    shown = [line if len(line) <= width else line[:width] + " …" for line in text.split("\n")]
    return shown if len(shown) <= lines else [*shown[:lines], "…"]
