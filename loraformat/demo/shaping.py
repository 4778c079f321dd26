"""Demo, part 3: reduce, combine, extract, check and spectrum.

Smaller by their singular values, two into one, one out of a fine-tune, one that every runtime
reads alike, and a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loraformat.demo import SMALL_MODEL
from loraformat.demo.step import Step, Workspace
from loraformat.errors import MissingDependencyError
from loraformat.ops.check.check import check, fix
from loraformat.ops.combine.combine import combine
from loraformat.ops.extract.extract import extract
from loraformat.ops.plots import check_picture
from loraformat.ops.reduce import reduce
from loraformat.ops.spectrum.plot import plot_spectrum
from loraformat.ops.spectrum.spectrum import spectrum

__all__ = ["shape_adapters"]


def shape_adapters(work: Workspace) -> Iterator[Step]:
    """Reduce, combine, extract and fix adapters, and draw one's spectrum."""

    def reduced(title: str, name: str, words: str, **how: Any) -> Step:
        target = work.directory / name
        report = reduce(work.manual, target, force=work.force, **how)
        assert report.energy is not None
        ranks = [module.new_rank for module in report.modules]
        span = f"ranks {min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"rank {ranks[0]}"
        line = (
            f"{span} instead of {report.modules[0].old_rank}: {report.new_parameters:,} of "
            f"{report.old_parameters:,} parameters hold {report.energy:.1%} of the energy"
        )
        figures = {"energy": report.energy, "parameters": report.new_parameters}
        command = f"reduce bundle/adapters/manual -o {name} {words}"
        return Step(title, command, line, target, report.seconds, figures, "adapter")

    work.say("reducing manual")
    yield reduced("manual, reduced to rank 8", "rank8", "--rank 8", rank=8)
    yield reduced("manual, at 90 % energy", "energy90", "--energy 0.9", energy=0.9)
    yield _combined(work)
    yield _extracted(work)
    yield _fixed(work)
    yield _drawn(work)


def _combined(work: Workspace) -> Step:
    work.say("combining manual and tests")
    target = work.directory / "both"
    adapters = [work.manual, work.manual.with_name("tests")]
    report = combine(adapters, target, method="svd", rank=24, force=work.force)
    kept = min(module.energy for module in report.modules)
    return Step(
        "manual and tests in one",
        "combine bundle/adapters/manual bundle/adapters/tests -o both --rank 24",
        f"ranks 24 and 16 in 24: every module keeps {kept:.1%} of the sum's energy or more",
        target,
        report.seconds,
        {"least_energy": kept, "parameters": report.parameters},
        "adapter",
        ("library", "manual", "tests"),
    )


def _extracted(work: Workspace) -> Step:
    work.say("extracting an adapter")
    target = work.directory / "extracted"
    tuned = work.directory / "merged-original"
    report = extract(SMALL_MODEL, tuned, target, rank="auto", force=work.force)
    ranks = [module.rank for module in report.modules]
    return Step(
        "extracted from the fine-tune",
        f"extract {SMALL_MODEL.name} merged-original -o extracted --rank auto",
        f"ranks {min(ranks)} to {max(ranks)} above the rounding noise, {report.captured:.1%} of "
        "the difference",
        target,
        report.seconds,
        {"captured": report.captured, "parameters": report.parameters},
        "adapter",
    )


def _fixed(work: Workspace) -> Step:
    work.say("checking runtime compatibility of manual")
    target = work.directory / "fixed"
    before = [name for name, word in check(work.manual).verdicts.items() if word == "wrong"]
    report = fix(work.manual, target, force=work.force)
    after = [name for name, word in check(target).verdicts.items() if word == "wrong"]
    return Step(
        "manual, portable form",
        "check bundle/adapters/manual --fix -o fixed",
        f"wrong before: {', '.join(before) or 'none'}; after: {', '.join(after) or 'none'}; "
        f"rank {report.ranks[0]}",
        target,
        report.seconds,
        {"wrong_before": len(before), "wrong_after": len(after), "parameters": report.parameters},
        "adapter",
    )


def _drawn(work: Workspace) -> Step:
    work.say("drawing the spectrum of manual")
    picture = work.directory / "spectrum.png"
    report = spectrum(work.manual)
    ranks = report.suggested
    line = ", ".join(f"{word} of the energy at rank {rank}" for word, rank in ranks.items())
    try:
        check_picture(picture)
        plot_spectrum(report, picture)
    except MissingDependencyError as missing:
        picture, line = work.manual, f"{line} (no picture: {missing.hint})"
    figures = {f"rank_{word.rstrip('%')}": float(rank) for word, rank in ranks.items()}
    return Step(
        "spectrum",
        "spectrum bundle/adapters/manual --plot spectrum.png",
        line,
        picture,
        0.0,
        figures,
    )
