"""The tables: bitsandbytes' numbers, and search tables that hold what the kernels rely on."""

import hashlib
from types import SimpleNamespace

import torch

from loraformat.nf4.kernels import tables as made
from loraformat.tensors.torch_arrays import tensor_of
from tests import torch_codec as codec

# SHA-256 of the little-endian bytes of bitsandbytes 0.50.2's quant_map and nested_quant_map.
LEVELS = "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
NESTED = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def tables():
    found = made.tables()
    return SimpleNamespace(**{name: tensor_of(found[name]) for name in found.dtype.names})


def sha256(values):
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def test_bits_are_those_of_checkpoints():
    assert sha256(codec.levels()) == LEVELS
    assert sha256(codec.nested_map()) == NESTED


def test_bits_are_those_of_bitsandbytes():
    import bitsandbytes.functional as bnb

    assert torch.equal(codec.levels(), bnb.get_4bit_type("nf4", device="cpu").float())
    assert torch.equal(codec.nested_map(), bnb.create_dynamic_map().float())


def test_thresholds_are_midpoints():
    middle = (codec.levels()[:-1] + codec.levels()[1:]) / 2
    assert torch.equal(tables().thresholds[:15], middle)
    assert tables().thresholds[15] == torch.inf


def test_a_bin_holds_at_most_one_threshold_and_none_near_its_edge():
    edges = torch.arange(33, dtype=torch.float64) / 15.5 - 1
    thresholds = tables().thresholds[:15].double()
    assert torch.histogram(thresholds, bins=edges).hist.max() == 1
    assert (edges[:, None] - thresholds).abs().min() > 1.5e-3


def test_leading_bits_leave_at_most_one_bound():
    t = tables()
    bounds = t.nested_bounds[:255]
    key = (bounds.view(torch.int32) >> 17) & 0x7FFF
    assert key.unique().numel() == 255
    for s in (bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0))):
        base = t.nested_base[((s.view(torch.int32) >> 17) & 0x7FFF).long()].long()
        assert torch.equal(base + (s > t.nested_bounds[base]), torch.bucketize(s, bounds))


def test_public_tables_are_copies():
    codec.levels().zero_()
    assert codec.levels()[0] == -1


def test_bits_per_weight():
    assert codec.bits_per_weight() == 4 + 8 / 64 + 32 / (64 * 256)
    assert codec.bits_per_weight(32, double_quant=False) == 5.0
    q = codec.quantize(torch.zeros(1 << 20))
    stored = q.packed.nbytes + q.absmax.nbytes + q.nested_absmax.nbytes
    assert 8 * stored / q.count == codec.bits_per_weight()
