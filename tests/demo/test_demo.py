"""The demo: what each verb does to perplexity has the sign that it must have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loraformat.cli.demo import command
from loraformat.demo import SMALL_MODEL
from loraformat.demo.llama_cpp import Question, ask
from loraformat.demo.merging import tensor_hashes
from loraformat.demo.pipeline import DemoReport, demo
from loraformat.demo.step import Step


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(directory: Path) -> DemoReport:
    return demo(directory)


@pytest.fixture(scope="module")
def steps(report: DemoReport) -> dict[str, Step]:
    return {step.path.name: step for step in reversed(report.steps)}  # the step that made it


def manual(step: Any) -> float:
    return float(step.perplexity["manual"].perplexity)


def test_all_of_it_is_measured(report: DemoReport) -> None:
    assert report.notes == []
    assert all(step.perplexity for step in report.steps if step.measured)


def test_a_bundle_is_as_good_as_its_dense_values(report: DemoReport) -> None:
    original, bundle, dense, bitsandbytes = (
        model.perplexity["library"].perplexity for model in report.bases.models
    )
    assert original < bundle < 1.05 * original
    assert dense == pytest.approx(bundle, rel=1e-3)
    assert bitsandbytes == pytest.approx(bundle, rel=1e-6)


def test_an_adapter_helps_on_its_own_text(report: DemoReport, steps: dict[str, Step]) -> None:
    bundle = report.bases.models[1]
    for kind in ("manual", "tests"):
        alone = bundle.perplexity[kind].perplexity
        assert steps[kind].perplexity[kind].perplexity < 0.9 * alone


def test_the_form_for_every_runtime_is_the_same_adapter(steps: dict[str, Step]) -> None:
    fixed = steps["fixed"]
    assert (fixed.figures["wrong_before"], fixed.figures["wrong_after"]) == (1, 0)
    assert manual(fixed) == pytest.approx(manual(steps["manual"]), rel=1e-5)


def test_merged_is_the_adapter_as_peft_applies_it(steps: dict[str, Step]) -> None:
    assert manual(steps["merged"]) == pytest.approx(manual(steps["manual"]), rel=2e-3)


def test_quantizing_again_swallows_the_adapter(report: DemoReport, steps: dict[str, Step]) -> None:
    base, adapted = manual(report.bases.models[1]), manual(steps["manual"])
    left = (base - manual(steps["requantized"])) / (base - adapted)
    assert left < 0.25
    assert steps["requantized"].figures["kept"] < 0.15


def test_merging_into_the_original_is_not_worse(steps: dict[str, Step]) -> None:
    assert manual(steps["merged-original"]) < 1.01 * manual(steps["merged"])


def test_the_page_on_bases_says_what_is_measured(
    report: DemoReport, steps: dict[str, Step]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "which-base.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    written = {row[1].strip(): row[5].strip() for row in rows if len(row) == 8}
    original, bundle = report.bases.models[:2]
    measured = {
        "original, without an adapter": manual(original),
        "bundle, NF4, without an adapter": manual(bundle),
        "bundle with a separate adapter": manual(steps["manual"]),
        "merged into the NF4 values, bf16": manual(steps["merged"]),
        "merged into the original, bf16": manual(steps["merged-original"]),
        "merged into the NF4 values, NF4 again": manual(steps["requantized"]),
    }
    for title, perplexity in measured.items():
        assert float(written[title]) == pytest.approx(perplexity, rel=2e-3), title


def test_undoing_gives_the_original(directory: Path, steps: dict[str, Step]) -> None:
    assert tensor_hashes(directory / "unmerged") == tensor_hashes(SMALL_MODEL)
    assert tensor_hashes(directory / "merged-original") != tensor_hashes(SMALL_MODEL)
    assert steps["merged-original"].figures["undo_bits_per_weight"] < 0.3


@pytest.mark.parametrize("name", ["rank8", "energy90"])
def test_reduced_is_slightly_worse(name: str, steps: dict[str, Step]) -> None:
    assert manual(steps["manual"]) < manual(steps[name]) < 1.03 * manual(steps["manual"])
    assert steps[name].nbytes < 0.5 * steps["manual"].nbytes


def test_combined_does_both(report: DemoReport, steps: dict[str, Step]) -> None:
    for kind in ("manual", "tests"):
        alone = report.bases.models[1].perplexity[kind].perplexity
        best = steps[kind].perplexity[kind].perplexity
        assert steps["both"].perplexity[kind].perplexity < (alone + best) / 2


def test_extracted_is_as_good_as_what_was_merged(steps: dict[str, Step]) -> None:
    assert manual(steps["extracted"]) == pytest.approx(manual(steps["manual"]), rel=5e-3)
    assert steps["extracted"].figures["captured"] > 0.99


def test_training_lowers_the_loss(report: DemoReport) -> None:
    assert report.training is not None
    steps, losses = zip(*report.training.losses, strict=True)
    assert steps == (10, 20, 30, 40)
    assert losses[-1] < losses[1] < losses[0] and losses[-1] < losses[0] - 0.1
    steps, held_out = zip(*report.training.held_out, strict=True)
    assert steps == (0, 10, 20, 30, 40)
    assert list(held_out) == sorted(held_out, reverse=True)
    assert np.exp(held_out[0]) == pytest.approx(report.training.before, rel=1e-6)
    # The adapter was stored and read again between these two.
    assert np.exp(held_out[-1]) == pytest.approx(report.training.after, rel=1e-5)


def test_what_is_learned_holds_on_text_held_out(report: DemoReport, steps: dict[str, Step]) -> None:
    """Ours and PEFT's figures are of other windows, so they differ a little."""
    training = report.training
    assert training is not None
    assert training.after < 0.88 * training.before
    assert training.before == pytest.approx(manual(report.bases.models[1]), rel=0.01)
    assert training.after == pytest.approx(manual(steps["learned"]), rel=0.01)


def test_the_sample_is_text(report: DemoReport) -> None:
    assert report.training is not None
    assert sum(map(str.isalpha, report.training.sample)) > 40


def test_llama_cpp_computes_the_same(report: DemoReport) -> None:
    titles = [one.title for one in report.agreements]
    assert titles == ["merged.gguf", "base.gguf with learned.gguf"]
    for one in report.agreements:
        assert (one.positions, one.vocabulary) == (64, 2048)
        assert one.difference < 2e-4
        assert one.perplexity == pytest.approx(one.ours, rel=1e-4)
        assert one.same_tokens and one.same_next and one.same_text and one.text


def test_llama_cpp_computes_something_else_without_the_adapter(
    directory: Path, report: DemoReport
) -> None:
    question = Question("x", [0, 5, 6], [0, 5], 4, vocabulary=2048, ordinary=70)
    base, adapter = directory / "base.gguf", directory / "learned.gguf"
    without, beside = ask(base, question), ask(base, question, adapter)
    assert np.abs(np.subtract(without.log_probabilities, beside.log_probabilities)).max() > 0.1


def test_there_is_a_loss_curve(report: DemoReport) -> None:
    assert report.training is not None and report.training.curve is not None
    assert report.training.curve.read_bytes().startswith(b"\x89PNG")


def test_there_is_a_picture(directory: Path) -> None:
    assert (directory / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_json(report: DemoReport) -> None:
    again = json.loads(json.dumps(report.to_dict()))
    assert [model["title"] for model in again["models"]] == [
        "original",
        "bundle",
        "dense",
        "bitsandbytes",
    ]
    assert all(step["bytes"] > 0 for step in again["adapters"])
    assert again["training"]["heldout_perplexity"]["after"] > 1
    assert len(again["training"]["losses"]) == 4
    assert [one["same_next"] for one in again["llama_cpp"]] == [True, True]


def test_the_command_prints_tables_and_commands(
    report: DemoReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is the one above, so that it takes no second one."""
    monkeypatch.setattr("loraformat.demo.pipeline.demo", lambda *args, **kwargs: report)
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    for step in report.steps:
        assert step.command in result.output and step.result in result.output
    for title in ("original", "bundle", "merged, then NF4 again", "learned, trained here"):
        assert f"\n{title} " in result.output
    assert report.training is not None
    assert (
        f"{report.training.before:.2f} before, {report.training.after:.2f} after" in result.output
    )
    assert "\nbase.gguf with learned.gguf " in result.output and "different" not in result.output
