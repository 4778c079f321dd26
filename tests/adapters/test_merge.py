"""Merging against PEFT, against plain arithmetic, and against what must not happen."""

import json

import pytest
import torch

from loraformat.errors import InputError, OutputError, UnsupportedError, UsageError
from loraformat.model.adapter import RowReplacement
from loraformat.ops.convert.convert import convert
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
from tests.torch_tensors import numbers


def dense_delta(d):
    b, a = numbers(d.b).double(), numbers(d.a).double()
    full = d.scaling * b @ a
    return full if d.orientation == "linear" else full.T


# Arithmetic


@pytest.mark.parametrize("source", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("target", [None, *TYPES])
def test_every_dtype_is_rounded_once(tmp_path, source, target):
    base, tensors = small(tmp_path, source)
    d = delta(Q, 32, 32)
    merge(base, [adapter(d)], tmp_path / "out", dtype=target)
    got = weights_of(tmp_path / "out")
    wanted = TYPES[target] if target else source
    assert {tensor.dtype for tensor in got.values()} == {wanted}
    exact = tensors[Q].double() + dense_delta(d)
    ulp = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}[wanted]
    error = (got[Q].double() - exact).abs()
    assert bool((error <= 0.51 * 2 * ulp * exact.abs() + 1e-6).all())
    assert torch.equal(got[K], tensors[K].to(wanted))


def test_weights_and_several_adapters(tmp_path):
    base, tensors = small(tmp_path)
    one, two = delta(Q, 32, 32, seed=1), delta(Q, 32, 32, rank=7, seed=5, scaling=0.5)
    merge(base, [adapter(one), adapter(two)], tmp_path / "out", weight=[0.7, -0.3])
    wanted = tensors[Q].double() + 0.7 * dense_delta(one) - 0.3 * dense_delta(two)
    torch.testing.assert_close(weights_of(tmp_path / "out")[Q].double(), wanted, atol=1e-6, rtol=0)


def dora_weight(weight, d):
    total = weight.double() + dense_delta(d)
    axis = 1 if d.orientation == "linear" else 0
    norm = total.norm(dim=axis, keepdim=True)
    shape = (-1, 1) if axis == 1 else (1, -1)
    return numbers(d.magnitude).double().view(shape) * total / norm


@pytest.mark.parametrize("orientation", ["linear", "transposed"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_dora(tmp_path, orientation, weight):
    base, tensors = small(tmp_path)
    shape = (16, 32) if orientation == "linear" else (32, 16)
    magnitude = dense("m", gauss(shape[0], seed=3).abs() + 1)
    d = delta(K, *shape, orientation=orientation, magnitude=magnitude)
    merge(base, [adapter(d)], tmp_path / "out", weight=[weight])
    wanted = tensors[K].double() * (1 - weight) + weight * dora_weight(tensors[K], d)
    torch.testing.assert_close(weights_of(tmp_path / "out")[K].double(), wanted, atol=3e-6, rtol=0)


def test_dora_beside_a_plain_adapter(tmp_path):
    base, tensors = small(tmp_path)
    d = delta(Q, 32, 32, magnitude=dense("m", gauss(32, seed=3).abs() + 1))
    plain = delta(Q, 32, 32, seed=9)
    merge(base, [adapter(d), adapter(plain)], tmp_path / "out", weight=[0.4, 2.0])
    change = 0.4 * (dora_weight(tensors[Q], d) - tensors[Q]) + 2 * dense_delta(plain)
    got = weights_of(tmp_path / "out")[Q].double()
    torch.testing.assert_close(got, tensors[Q] + change, atol=5e-6, rtol=0)


def test_bias_replacement_and_rows(tmp_path):
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors = {
        EMBED: gauss(10, 32),
        Q: gauss(32, 32),
        bias: gauss(32),
        "model.norm.weight": gauss(32),
    }
    base = save_model(tmp_path / "base", tensors)
    d = delta(Q, 32, 32, bias=dense("b", gauss(32, seed=4)))
    given = adapter(
        d,
        replacements={"model.norm.weight": dense("n", gauss(32, seed=5))},
        rows={EMBED: RowReplacement(EMBED, (3, 9), dense("r", gauss(2, 32, seed=6)))},
    )
    report = merge(base, [given], tmp_path / "out", weight=[1.0])
    got = weights_of(tmp_path / "out")
    torch.testing.assert_close(got[bias], tensors[bias] + 2 * gauss(32, seed=4))
    assert torch.equal(got["model.norm.weight"], gauss(32, seed=5))
    assert torch.equal(got[EMBED][[3, 9]], gauss(2, 32, seed=6))
    assert torch.equal(got[EMBED][:3], tensors[EMBED][:3])
    assert (report.merged, report.replaced) == (2, 2)
    assert "lm_head.weight" not in got  # PEFT gives tied heads the new tokens, too


# What is tied, and what is fused


@pytest.mark.parametrize("target", ["lm_head.weight", EMBED])
def test_a_tied_head_becomes_its_own(tmp_path, target):
    base, tensors = small(tmp_path, tie_word_embeddings=True)
    d = delta(target, 10, 32) if target != EMBED else delta(EMBED, 32, 10, orientation="transposed")
    report = merge(base, [adapter(d)], tmp_path / "out")
    got = weights_of(tmp_path / "out")
    changed = tensors[EMBED].double() + dense_delta(d)
    other = EMBED if target != EMBED else "lm_head.weight"
    torch.testing.assert_close(got[target].double(), changed, atol=1e-6, rtol=0)
    assert torch.equal(got[other], tensors[EMBED])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert any("tied" in note for note in report.notes)


@pytest.mark.parametrize("style", ["mixtral", "qwen"])
def test_fused_experts_are_spread_over_the_disk(tmp_path, style):
    home, leaves = {
        "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
        "qwen": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    }[style]
    prefix = f"model.layers.0.{home}"
    tensors = {
        f"{prefix}.{e}.{leaf}.weight": gauss(*((12, 8) if leaf != leaves[2] else (8, 12)), seed=e)
        for e in range(3)
        for leaf in leaves
    }
    base = save_model(tmp_path / "base", tensors)
    fused = "model.layers.0.mlp.experts"
    up = delta(f"{fused}.gate_up_proj", 0, 0, a=gauss(3, 2, 8), b=gauss(3, 24, 2, seed=2))
    down = delta(f"{fused}.down_proj", 0, 0, a=gauss(3, 2, 12), b=gauss(3, 8, 2, seed=3))
    merge(base, [adapter(up, down)], tmp_path / "out")
    got = weights_of(tmp_path / "out")
    for e in range(3):
        both, last = dense_delta(up)[e], dense_delta(down)[e]
        for leaf, change in zip(leaves, (both[:12], both[12:], last), strict=True):
            name = f"{prefix}.{e}.{leaf}.weight"
            torch.testing.assert_close(
                got[name].double(), tensors[name] + change, atol=1e-5, rtol=0
            )


def test_fused_experts_on_disk(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = save_model(tmp_path / "base", {name: gauss(3, 24, 8)})
    d = delta(name, 0, 0, a=gauss(3, 2, 8), b=gauss(3, 24, 2, seed=2))
    merge(base, [adapter(d)], tmp_path / "out")
    got = weights_of(tmp_path / "out")[name].double()
    torch.testing.assert_close(got, gauss(3, 24, 8) + dense_delta(d), atol=1e-5, rtol=0)


@pytest.mark.parametrize("home", ["block_sparse_moe", "mlp"])
def test_an_experts_own_adapter_on_fused_experts(tmp_path, home):
    fused = "model.layers.0.mlp.experts"
    stored = {f"{fused}.gate_up_proj": gauss(3, 24, 8), f"{fused}.down_proj": gauss(3, 8, 12)}
    base = save_model(tmp_path / "base", stored)
    leaves = ("w1", "w3", "w2") if home != "mlp" else ("gate_proj", "up_proj", "down_proj")
    own = f"model.layers.0.{home}.experts.2"
    up = delta(f"{own}.{leaves[1]}.weight", 12, 8)
    down = delta(f"{own}.{leaves[2]}.weight", 8, 12, seed=5)
    given, undo = adapter(up, down), tmp_path / "undo"
    merge(base, [given], tmp_path / "out", undo=undo)
    unmerge(tmp_path / "out", tmp_path / "back", undo=undo, adapter=[given])
    back = weights_of(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    wanted = {name: tensor.double() for name, tensor in stored.items()}
    wanted[f"{fused}.gate_up_proj"][2, 12:] += dense_delta(up)
    wanted[f"{fused}.down_proj"][2] += dense_delta(down)
    for name, tensor in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=0)
    beyond = delta(f"{own[:-1]}3.{leaves[2]}.weight", 8, 12)
    with pytest.raises(UnsupportedError, match="inside"):
        merge(base, [adapter(beyond)], tmp_path / "no")


# Quantized bases


@pytest.mark.parametrize("form", ["loraformat", "bitsandbytes"])
def test_a_quantized_base_becomes_dense(tmp_path, form):
    base, _ = small(tmp_path)
    convert(base, tmp_path / "nf4", to_format=form)
    convert(tmp_path / "nf4", tmp_path / "decoded", to_format="safetensors", dtype="f32")
    d = delta(Q, 32, 32)
    merge(tmp_path / "nf4", [adapter(d)], tmp_path / "out")
    got, decoded = weights_of(tmp_path / "out"), weights_of(tmp_path / "decoded")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    wanted = (decoded[Q].double() + dense_delta(d)).bfloat16()
    assert (got[Q] != wanted).sum() < 3
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_delta_of_what_an_adapter_replaces_in_float64(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    new, d = gauss(32, 32, seed=3).double(), delta(Q, 32, 32)
    merge(base, [adapter(d, replacements={Q: dense("new", new)})], tmp_path / "out")
    wanted = (new + dense_delta(d)).bfloat16()
    assert (weights_of(tmp_path / "out")[Q] != wanted).sum() < 3


def test_quantizing_again_must_be_asked_for_and_is_measured(tmp_path):
    base, _ = small(tmp_path)
    convert(base, tmp_path / "nf4")
    given = adapter(delta(Q, 32, 32, scale=0.02))
    with pytest.raises(UsageError, match="--requantize"):
        merge(base, [given], tmp_path / "out", to="loraformat")
    report = merge(tmp_path / "nf4", [given], tmp_path / "out", to="loraformat", requantize=True)
    assert report.total.relative < 0.02
    assert report.total.gain < 0.2
    assert "requantizing keeps" in report.warnings[0]
    dense_report = merge(base, [given], tmp_path / "again", to="loraformat", requantize=True)
    assert dense_report.total.error > 3


# Reports, refusals, files


def test_small_deltas_are_warned_of(tmp_path):
    base, _ = small(tmp_path, torch.bfloat16)
    given = adapter(delta(Q, 32, 32, scale=0.012))
    report = merge(base, [given], tmp_path / "out")
    assert 0.3 < report.total.gain < 0.9
    assert report.total.swallowed > 0.3
    assert "--dtype f16" in report.warnings[0]
    finer = merge(base, [given], tmp_path / "finer", dtype="f32")
    assert finer.total.gain == pytest.approx(1, abs=1e-3)
    assert not finer.warnings


def test_float16_saturates_and_says_so(tmp_path):
    base = save_model(tmp_path / "base", {Q: torch.full((4, 4), 60000.0).half()})
    d = delta(Q, 4, 4, a=torch.ones(1, 4) * 100, b=torch.ones(4, 1) * 100, scaling=1.0)
    report = merge(base, [adapter(d)], tmp_path / "out")
    assert bool((weights_of(tmp_path / "out")[Q] == 65504).all())
    assert report.total.clipped == 16


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "changes no module"),
        ([delta(Q.replace("q_proj", "q_prj"), 32, 32)], "the nearest is " + Q),
        ([delta(Q, 31, 32)], r"delta of shape \(31, 32\)"),
        ([delta(Q, 32, 32, bias=dense("b", torch.ones(32)))], "adds a bias"),
        ([delta(Q, 32, 32, b=torch.full((32, 4), float("nan")))], "NaN"),
    ],
)
def test_refusals(tmp_path, deltas, message):
    base, _ = small(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        merge(base, [adapter(*deltas)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_fingerprints(tmp_path):
    base, _ = small(tmp_path)
    convert(base, tmp_path / "nf4")
    given = adapter(delta(Q, 32, 32), base_fingerprint="0" * 64)
    with pytest.raises(InputError, match="--allow-base-mismatch"):
        merge(tmp_path / "nf4", [given], tmp_path / "out")
    report = merge(tmp_path / "nf4", [given], tmp_path / "out", allow_base_mismatch=True)
    assert any("may not work on this base" in note for note in report.notes)
    ours = json.loads((tmp_path / "nf4/loraformat.json").read_text())["fingerprint"]
    given.base_fingerprint = ours
    assert not merge(tmp_path / "nf4", [given], tmp_path / "ok").notes


def test_output_rules(tmp_path):
    base, _ = small(tmp_path)
    given = adapter(delta(Q, 32, 32))
    assert merge(base, [given], tmp_path / "out", dry_run=True).dry_run
    assert not (tmp_path / "out").exists()
    merge(base, [given], tmp_path / "out", max_shard_size=3000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    with pytest.raises(OutputError, match="already exists"):
        merge(base, [given], tmp_path / "out")
    with pytest.raises(OutputError, match="is or contains the input"):
        merge(base, [given], base, force=True)
    with pytest.raises(UsageError, match="2 weights for 1"):
        merge(base, [given], tmp_path / "new", weight=[1, 2])
    merge(tmp_path / "out", [given], tmp_path / "twice", weight=[-1])
    back = weights_of(tmp_path / "twice")
    torch.testing.assert_close(back[Q], weights_of(base)[Q], atol=1e-6, rtol=0)


def test_a_killed_merge_continues(tmp_path, monkeypatch):
    base, _ = small(tmp_path)
    given = adapter(delta(Q, 32, 32))
    merge(base, [given], tmp_path / "straight", max_shard_size=3000)
    from loraformat.ops.merge import tensor

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensor, "merge_tile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [given], tmp_path / "out", max_shard_size=1500)
    assert (tmp_path / "out.partial").is_dir()
    merge(base, [given], tmp_path / "out", max_shard_size=1500)
    straight, again = weights_of(tmp_path / "straight"), weights_of(tmp_path / "out")
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_merge_with_a_record_starts_again(tmp_path, monkeypatch):
    base, tensors = small(tmp_path)
    given, undo = adapter(delta(Q, 32, 32)), tmp_path / "undo.lfu"
    from loraformat.ops.merge import tensor

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensor, "merge_tile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [given], tmp_path / "out", max_shard_size=1500, undo=undo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.partial"]
    report = merge(base, [given], tmp_path / "out", max_shard_size=1500, undo=undo)
    assert report.total is not None and not any("interrupted" in note for note in report.notes)
    unmerge(tmp_path / "out", tmp_path / "back", undo=undo, adapter=[given])
    back = weights_of(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_merge_that_goes_on_says_what_it_did_not_measure(tmp_path, monkeypatch):
    base, _ = small(tmp_path)
    given = adapter(delta(K, 16, 32), delta(Q, 32, 32))
    from loraformat.ops.merge import tensor

    genuine, calls = tensor.merge_tile, []

    def interrupt_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return genuine(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tensor, "merge_tile", interrupt_the_second)
        with pytest.raises(KeyboardInterrupt):
            merge(base, [given], tmp_path / "out", max_shard_size=1500)
    report = merge(base, [given], tmp_path / "out", max_shard_size=1500)
    assert (report.merged, len(report.modules)) == (2, 1)
    assert any("1 tensors were merged by an earlier, interrupted run" in n for n in report.notes)
