"""Spectra: the numbers, the table and the picture."""

import json
from dataclasses import replace

import pytest
import torch

from loraformat.errors import MissingDependencyError
from loraformat.ops import plots as module
from loraformat.ops.spectrum.plot import plot_spectrum
from loraformat.ops.spectrum.spectrum import spectrum_of
from loraformat.testing import dense
from tests.adapters.memory_adapters import adapter, delta, effect, random_adapter


def test_numbers_against_the_full_svd():
    whole = random_adapter()
    report = spectrum_of(whole)
    assert report.parameters == sum(change.parameters for change in whole.deltas.values())
    for found in report.modules:
        d = effect(whole.deltas[found.target])
        s = torch.linalg.svdvals(d)[: found.rank]
        assert torch.allclose(torch.tensor(found.singular_values, dtype=torch.float64), s)
        assert found.norm == pytest.approx(float(d.norm()))
        assert found.stable_rank == pytest.approx(float(d.norm() / s[0]) ** 2)
        assert found.energies[-1] == pytest.approx(1)
        for word, share in (("90%", 0.9), ("95%", 0.95), ("99%", 0.99)):
            k = found.suggested[word]
            assert found.energies[k - 1] >= share
            assert k == 1 or found.energies[k - 2] < share
    assert (report.modules[0].kind, report.modules[0].layer) == ("q_proj", 0)


def test_the_suggestion_for_all_keeps_what_it_says():
    from loraformat.ops.reduce import Reduction, reduce_adapter

    whole = random_adapter()
    report = spectrum_of(whole)
    for word, rank in report.suggested.items():
        share = float(word[:-1]) / 100
        assert reduce_adapter(whole, Reduction(rank=rank))[1].energy >= share
        assert reduce_adapter(whole, Reduction(rank=rank - 1))[1].energy < share
    _, reduced = reduce_adapter(whole, Reduction(energy=0.95))
    assert report.suggested_parameters["95%"] == reduced.new_parameters


def test_statistics_give_ranks_of_outputs():
    b, a = torch.eye(4), torch.diag(torch.tensor([8.0, 4.0, 2.0, 0.1]))
    moment = dense("s", torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])))
    whole = adapter(delta("x.weight", b, a, second_moment=moment))
    found = spectrum_of(whole).modules[0]
    assert found.suggested["99%"] == 3
    assert found.output_suggested["99%"] == 1


def odd_adapter():
    whole = random_adapter()
    zero = delta("lm_head.weight", torch.zeros(4, 3), torch.ones(3, 5))
    experts = delta("model.layers.1.mlp.experts.up_proj", torch.randn(2, 6, 3),
                    torch.randn(2, 3, 8), magnitude=dense("m", torch.ones(6)))  # fmt: skip
    return replace(whole, deltas={**whole.deltas, zero.target: zero, experts.target: experts})


def test_zeros_experts_and_magnitudes():
    report = spectrum_of(odd_adapter())
    zero, experts = report.modules[-2:]
    assert (zero.norm, zero.stable_rank, zero.suggested["99%"]) == (0, 0, 0)
    assert experts.experts == 2
    assert any("DoRA" in note for note in report.notes)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("make", [random_adapter, odd_adapter])
def test_a_picture(tmp_path, make, suffix):
    path = tmp_path / f"spectrum.{suffix}"
    plot_spectrum(spectrum_of(make()), path)
    assert path.stat().st_size > 5_000
    heads = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert path.read_bytes().startswith(heads[suffix])


def test_a_picture_of_many_kinds(tmp_path):
    deltas = [
        delta(f"model.layers.{i}.kind_{i % 13}.weight", torch.randn(9, 2), torch.randn(2, 9))
        for i in range(40)
    ]
    plot_spectrum(spectrum_of(adapter(*deltas)), tmp_path / "spectrum.png")


def test_matplotlib_is_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loraformat\[plot\]'"):
        plot_spectrum(spectrum_of(random_adapter()), tmp_path / "spectrum.png")


def test_a_picture_of_a_whole_model(tmp_path):
    """Seven kinds by 32 layers: bands instead of lines, and a row for every layer."""
    deltas = [
        delta(f"model.layers.{layer}.{kind}.weight", torch.randn(9, r), torch.randn(r, 12))
        for layer in range(32)
        for r, kind in enumerate("abcdefg", 1)
    ]
    report = spectrum_of(adapter(*deltas))
    plot_spectrum(report, tmp_path / "spectrum.svg")
    drawn = (tmp_path / "spectrum.svg").read_text()
    texts = ["224 modules of rank 1 to 7", "median and range of each kind"]
    texts += [f"{word}: rank {rank}, or" for word, rank in report.suggested.items()]
    missing = [text for text in texts if text not in drawn]
    assert not missing
    rows = [str(layer) for layer in range(32) if f"<!-- {layer} -->" not in drawn]
    assert not rows
