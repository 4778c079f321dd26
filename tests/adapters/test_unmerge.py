"""Every bit comes back, or nothing does."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.errors import FormatError, OutputError, UnsupportedError, UsageError
from loraformat.model.adapter import RowReplacement
from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge
from loraformat.testing import dense
from tests.adapters.merging import (
    EMBED,
    TYPES,
    K,
    Q,
    adapter,
    delta,
    gauss,
    save_model,
    small,
    weights_of,
)


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def there_and_back(tmp_path, base, adapters, **options):
    report = merge(base, adapters, tmp_path / "out", undo=tmp_path / "undo.lfu", **options)
    back = unmerge(
        tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo.lfu", adapter=adapters
    )
    assert back.exact
    same_bits(weights_of(base), weights_of(tmp_path / "back"))
    assert (tmp_path / "back/config.json").read_bytes() == (base / "config.json").read_bytes()
    return report


@pytest.mark.parametrize("scale", [0.003, 0.05, 3.0])
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES, [None, *TYPES]))
def test_exact(tmp_path, source, target, scale):
    base, _ = small(tmp_path, TYPES[source])
    there_and_back(tmp_path, base, [adapter(delta(Q, 32, 32, scale=scale))], dtype=target)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3]])
def test_several_adapters_with_dora(tmp_path, weights):
    base, _ = small(tmp_path, torch.bfloat16)
    magnitude = dense("m", gauss(32, seed=3) + 0.5)  # negative ones, too
    one = adapter(delta(Q, 32, 32, magnitude=magnitude), delta(K, 16, 32, seed=4))
    two = adapter(delta(Q, 32, 32, rank=9, seed=5))
    there_and_back(tmp_path, base, [one, two], weight=weights)


def test_dora_on_conv1d(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    magnitude = dense("m", gauss(32, seed=3).abs())
    there_and_back(
        tmp_path, base, [adapter(delta(K, 32, 16, orientation="transposed", magnitude=magnitude))]
    )


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_special_values(tmp_path, dtype):
    special = gauss(64, 64)
    special[0, :6] = torch.tensor([0.0, -0.0, 6e4, -6e4, 1e-8, -1e-8])
    odd = special.clone()
    odd[3, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    names = [Q, K, "z.weight"]
    tensors = {Q: special.to(dtype), K: odd.to(dtype), "z.weight": torch.zeros(64, 64).to(dtype)}
    tensors["z.weight"].neg_()
    base = save_model(tmp_path / "base", tensors)
    given = adapter(*(delta(name, 64, 64, scale=5.0, seed=i) for i, name in enumerate(names)))
    there_and_back(tmp_path, base, [given])


def test_replacements_rows_biases_and_an_untied_head(tmp_path):
    bias = Q.replace("weight", "bias")
    tensors = {
        EMBED: gauss(10, 32),
        Q: gauss(32, 32),
        bias: gauss(32),
        "model.norm.weight": gauss(32),
    }
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = save_model(tmp_path / "base", {n: t.bfloat16() for n, t in tensors.items()}, config)
    given = adapter(
        delta(Q, 32, 32, bias=dense("b", gauss(32, seed=4))),
        delta("lm_head.weight", 10, 32),
        replacements={"model.norm.weight": dense("n", gauss(32, seed=5))},
        rows={EMBED: RowReplacement(EMBED, (3, 9), dense("r", gauss(2, 32, seed=6)))},
    )
    there_and_back(tmp_path, base, [given])
    assert "lm_head.weight" in weights_of(tmp_path / "out")


def test_experts_and_shards(tmp_path):
    fused = "model.layers.0.mlp.experts"
    tensors = {f"{fused}.{e}.{leaf}.weight": gauss(12, 8, seed=e).bfloat16()
               for e in range(3) for leaf in ("gate_proj", "up_proj")}  # fmt: skip
    base = save_model(tmp_path / "base", tensors)
    up = delta(f"{fused}.gate_up_proj", 0, 0, a=gauss(3, 2, 8), b=gauss(3, 24, 2, seed=2))
    there_and_back(tmp_path, base, [adapter(up)], max_shard_size=400)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_few_hundredths_of_a_bit(tmp_path, monkeypatch):
    base = save_model(tmp_path / "base", {Q: gauss(1024, 1500).bfloat16()})
    given = adapter(delta(Q, 1024, 1500, rank=4, scale=0.1, scaling=0.5))
    report = there_and_back(tmp_path, base, [given])
    assert 0.008 < report.total.relative < 0.012
    assert report.undo.bits_per_weight < 0.05


def test_two_merges_in_reverse_order(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    one, two = [adapter(delta(Q, 32, 32, seed=1))], [adapter(delta(Q, 32, 32, seed=5))]
    merge(base, one, tmp_path / "first", undo=tmp_path / "1.lfu")
    merge(tmp_path / "first", two, tmp_path / "second", undo=tmp_path / "2.lfu")
    with pytest.raises(FormatError, match=r"later merges first.*U06"):
        unmerge(tmp_path / "second", tmp_path / "no", undo=tmp_path / "1.lfu", adapter=one)
    assert not (tmp_path / "no").exists()
    unmerge(tmp_path / "second", tmp_path / "back1", undo=tmp_path / "2.lfu", adapter=two)
    unmerge(tmp_path / "back1", tmp_path / "back", undo=tmp_path / "1.lfu", adapter=one)
    same_bits(weights_of(base), weights_of(tmp_path / "back"))


def test_threads_do_not_matter(tmp_path):
    base = save_model(tmp_path / "base", {Q: gauss(300, 400).bfloat16()})
    given = [adapter(delta(Q, 300, 400, rank=16))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        merge(base, given, tmp_path / "out", undo=tmp_path / "undo.lfu")
        torch.set_num_threads(2)
        unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo.lfu", adapter=given)
        merge(base, given, tmp_path / "out2", undo=tmp_path / "undo2.lfu")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "undo.lfu").read_bytes() == (tmp_path / "undo2.lfu").read_bytes()


def test_refusals(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    given = [adapter(delta(Q, 32, 32))]
    record = tmp_path / "undo.lfu"
    merge(base, given, tmp_path / "out", undo=record)
    with pytest.raises(OutputError, match="already exists"):
        merge(base, given, tmp_path / "again", undo=record)
    with pytest.raises(FormatError, match="U05"):
        unmerge(
            tmp_path / "out",
            tmp_path / "x",
            undo=record,
            adapter=[adapter(delta(Q, 32, 32, seed=3))],
        )
    with pytest.raises(FormatError, match="U01"):
        unmerge(tmp_path / "out", tmp_path / "x", undo=base / "model.safetensors", adapter=given)
    with pytest.raises(UsageError, match="--undo"):
        unmerge(tmp_path / "out", tmp_path / "x")
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != K}, base / "model.safetensors")
    with pytest.raises(FormatError, match="U04"):
        unmerge(base, tmp_path / "x", undo=record, adapter=given)
    raw = bytearray(record.read_bytes())
    raw[-1] ^= 0xFF
    record.write_bytes(raw)
    with pytest.raises(FormatError, match=r"U0[789]"):
        unmerge(tmp_path / "out", tmp_path / "x", undo=record, adapter=given)
    assert not (tmp_path / "x").exists()


def test_subtraction_says_how_far_off_it_is(tmp_path):
    base, tensors = small(tmp_path, torch.bfloat16)
    given = [adapter(delta(Q, 32, 32))]
    merge(base, given, tmp_path / "out", weight=[0.5])
    report = unmerge(tmp_path / "out", tmp_path / "back", adapter=given, weight=[0.5])
    got, wanted = weights_of(tmp_path / "back")[Q].double(), tensors[Q].double()
    assert 0 < (got - wanted).norm() / wanted.norm() < report.error_bound < 0.01
    assert not report.exact
    assert "not exactly the original" in report.notes[0]
    (module,) = report.modules
    assert module.name == Q
    assert 0 < (got - wanted).abs().max() <= module.largest < 0.1
    assert (got - wanted).norm() / got.norm() <= module.relative == report.error_bound
    dora = [adapter(delta(Q, 32, 32, magnitude=dense("m", torch.ones(32))))]
    with pytest.raises(UnsupportedError, match="DoRA"):
        unmerge(tmp_path / "out", tmp_path / "x", adapter=dora)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_no_weight_is_further_off_than_the_bound(tmp_path, dtype, scale):
    base, tensors = small(tmp_path, dtype)
    given = [adapter(delta(Q, 32, 32, scale=scale))]
    merge(base, given, tmp_path / "out")
    report = unmerge(tmp_path / "out", tmp_path / "back", adapter=given)
    off = weights_of(tmp_path / "back")[Q].double() - tensors[Q].double()
    (module,) = report.modules
    assert 0 < off.abs().max() <= module.largest
    # A large delta takes so many bits that the bound is nearly reached.
    assert off.abs().max() > (module.largest / 20 if scale >= 1 else 0)
    assert module.steps >= 1 and module.saturated == 0


def test_saturated_weights_are_not_vouched_for(tmp_path):
    base, tensors = small(tmp_path, torch.float16)
    given = [adapter(delta(Q, 32, 32, scale=100.0))]
    merge(base, given, tmp_path / "out")
    report = unmerge(tmp_path / "out", tmp_path / "back", adapter=given)
    merged = weights_of(tmp_path / "out")[Q]
    assert report.modules[0].saturated == int((merged.abs() == 65504).sum()) > 0
    assert "may have any error" in report.notes[0]
    known = merged.abs() < 65504
    off = weights_of(tmp_path / "back")[Q].double() - tensors[Q].double()
    assert off[known].abs().max() <= report.modules[0].largest


def test_a_record_is_a_safetensors_file(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    merge(base, [adapter(delta(Q, 32, 32))], tmp_path / "out", undo=tmp_path / "undo.lfu")
    from safetensors import safe_open

    with safe_open(tmp_path / "undo.lfu", "pt") as file:
        record = json.loads(file.metadata()["loraformat.undo"])
    assert record["formula"] == "fixed-point-1"
    assert record["tensors"][Q]["mode"] == "interval"
