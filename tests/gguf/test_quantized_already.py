"""What was quantized before is said, with a figure, and its values are kept where they can be."""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
import transformers
from bases import SMALL, apart
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.quantization.blocks import dequantize
from safetensors.torch import load_file

from loraformat.bundle.manifest_rules import parse_manifest
from loraformat.card import Base, BundleFacts, bundle_card
from loraformat.cli import main
from loraformat.demo import ADAPTERS
from loraformat.model import quantization_history as past
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from loraformat.ops.verify import verify
from loraformat.storage.safe_paths import MANIFEST_NAME
from loraformat.tensors.torch_arrays import tensor_of

LORA = ADAPTERS["manual"]
PROMPTS = [[0, *range(first, first + 10)] for first in range(100, 1100, 100)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a function: the small real model in a form of that name."""
    place = tmp_path_factory.mktemp("sources")

    def make(name):
        target = place / name
        if not target.exists():
            dtype = target.stem if target.suffix else None
            form = {"bundle": "loraformat"}.get(name, None if target.suffix else name)
            convert(SMALL, target, dtype=dtype, to_format=form)
        return target

    return make


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def lines(report):
    return [note for note in report.notes if note.startswith("already quantized")]


def relative(found, before):
    return float((found.double() - before.double()).norm() / before.double().norm())


@pytest.mark.parametrize(
    ("name", "target", "dtype", "was", "now"),
    [
        ("q4_1.gguf", "out", None, "Q4_1 and Q8_0 (22 weights", "NF4"),
        ("q8_0.gguf", "out", None, "Q8_0 (22 weights", "NF4"),
        ("q4_0.gguf", "out.gguf", "q8_0", "Q4_0 and Q8_0", "Q8_0"),
        ("q8_0.gguf", "out.gguf", "q4_1", "Q8_0", "Q4_1"),
        ("bundle", "out.gguf", "q8_0", "NF4 (21 weights, 4.13 bits each)", "Q8_0"),
        ("bundle", "out.gguf", "q4_0", "NF4", "Q4_0"),
        ("bitsandbytes", "out.gguf", "q5_1", "NF4", "Q5_1"),
    ],
)
def test_one_line_says_it_with_the_figure(source, name, target, dtype, was, now, tmp_path):
    planned = convert(source(name), tmp_path / target, dtype=dtype, dry_run=True)
    report = convert(source(name), tmp_path / target, dtype=dtype)
    (line,), (before,) = lines(report), lines(planned)
    assert was in line and f"; {now} adds an error of" in line
    assert "not the original" in line and f"{now} quantizes them again" in before
    assert [str(step) for step in report.quantized_before] == [line.split("were ")[1].split(";")[0]]
    with open_model(source(name)) as old, open_model(tmp_path / target) as new:
        key = "model.layers.1.mlp.up_proj.weight"
        one, other = (
            tensor_of(tensor.dequantize("F32") if hasattr(tensor, "dequantize") else tensor.array())
            for tensor in (old.tensors[key], new.tensors[key])
        )
    told = float(line.split("error of ")[1].split("%")[0]) / 100
    assert told == pytest.approx(relative(other, one), rel=0.2, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "target", "dtype"),
    [
        ("bundle", "out.gguf", "f16"),
        ("bundle", "out", None),
        ("bitsandbytes", "out", None),
        ("q8_0.gguf", "out.gguf", "q8_0"),
        ("q4_0.gguf", "out.gguf", "f32"),
        ("f16.gguf", "out", None),
    ],
)
def test_nothing_is_said_where_nothing_is_quantized_again(source, name, target, dtype, tmp_path):
    assert not lines(convert(source(name), tmp_path / target, dtype=dtype))


def test_the_original_is_not_spoken_of(tmp_path):
    for target, dtype in (("out", None), ("out.gguf", "q4_0")):
        report = convert(SMALL, tmp_path / target, dtype=dtype)
        assert not report.quantized_before and not lines(report)
    manifest = (tmp_path / "out" / MANIFEST_NAME).read_bytes()
    assert parse_manifest(manifest, tmp_path).extensions == {}


def test_a_bundle_says_it_in_manifest_card_and_info(source, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    convert(source("q4_1.gguf"), bundle)
    manifest = parse_manifest((bundle / MANIFEST_NAME).read_bytes(), bundle)
    (step,) = past.from_extension(manifest.extensions)
    assert step.types == {"Q4_1": 21, "Q8_0": 1} and 5 < step.bits_per_weight < 6
    assert not verify(bundle).findings
    summary = info(bundle)
    card = bundle_card(BundleFacts("me/small", Base("org/base"), summary, [])).render()
    assert "quantized already when it was made" in card
    assert "against the quantized source" in card
    command("info", bundle)
    said = capsys.readouterr()
    assert "Q4_1 and Q8_0 (22 weights" in said.out + said.err
    plain = info(source("bundle"))
    assert not plain.quantized_before


def test_every_step_travels(source, tmp_path):
    """Through a bundle, a copy of it, a GGUF file of floats, and one of blocks."""
    convert(source("q4_1.gguf"), tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "copy")
    merge(tmp_path / "copy", [LORA], tmp_path / "beside", to="loraformat")
    convert(tmp_path / "beside", tmp_path / "plain.gguf", dtype="f16")
    convert(tmp_path / "plain.gguf", tmp_path / "last.gguf", dtype="q5_0")
    report = convert(tmp_path / "last.gguf", tmp_path / "again")
    words = [list(step.types) for step in report.quantized_before]
    assert words == [["Q4_1", "Q8_0"], ["NF4"], ["Q5_0", "Q8_0"]]
    assert "then NF4 (21 weights, 4.13 bits each), then Q5_0" in lines(report)[0]


def test_a_dense_detour_is_no_way_around(source, tmp_path):
    convert(source("bundle"), tmp_path / "dense", to_format="safetensors")
    report = convert(tmp_path / "dense", tmp_path / "q4_0.gguf", dtype="q4_0")
    assert "NF4 (21 weights" in lines(report)[0]
    merge(source("q4_1.gguf"), [LORA], tmp_path / "merged")
    assert "Q4_1 and Q8_0" in lines(convert(tmp_path / "merged", tmp_path / "bundle"))[0]
    convert(source("q4_1.gguf"), tmp_path / "bnb", to_format="bitsandbytes")
    report = convert(tmp_path / "bnb", tmp_path / "again.gguf", dtype="q8_0")
    assert "Q4_1 and Q8_0 (22 weights, 5.84 bits each), then NF4" in lines(report)[0]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize(
    "body",
    [
        None, 3, {}, {"steps": 1}, {"steps": []}, {"steps": [{}]}, {"steps": [{"types": []}]},
        {"steps": [{"types": {"Q4_1": 0}, "bits_per_weight": 5}]},
        {"steps": [{"types": {"Q4_1": True}, "bits_per_weight": 5}]},
        {"steps": [{"types": {"\x1b[31m": 1}, "bits_per_weight": 5}]},
        {"steps": [{"types": {"Q" * 99: 1}, "bits_per_weight": 5}]},
        {"steps": [{"types": {"Q4_1": 1}, "bits_per_weight": "5"}]},
        {"steps": [{"types": {"Q4_1": 1}, "bits_per_weight": 1e300}]},
        {"steps": [{"types": {"Q4_1": 1}, "bits_per_weight": 5}] * 99},
        {"steps": [{"types": {f"Q{n}": 1 for n in range(99)}, "bits_per_weight": 5}]},
    ],
)  # fmt: skip
def test_what_strangers_write_there_is_nothing(body):
    assert past.from_extension({past.EXTENSION: body}) == ()
    text = json.dumps(body["steps"]) if isinstance(body, dict) and "steps" in body else "{]"
    assert past.from_text(text) == ()


def test_a_dense_export_keeps_the_values_of_blocks(source, tmp_path):
    path = source("q4_1.gguf")
    report = convert(path, tmp_path / "dense", to_format="safetensors")
    assert any("dequantized to f32, which is exact" in note for note in report.notes)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    with open_gguf(path) as file:
        stored = file.tensors["blk.1.ffn_up.weight"]
        values = dequantize(file.load(stored.name), stored.type, stored.shape)
    wanted = torch.from_numpy(values)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], wanted)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, wanted), "not rounded on opening"
    small = convert(path, tmp_path / "small", to_format="safetensors", dtype="bf16")
    assert not any("dequantized to f32, which is exact" in note for note in small.notes)
    merged = merge(path, [LORA], tmp_path / "merged", undo=tmp_path / "undo.lfu")
    assert merged.total.error < 1e-3, "in f32, too"
    assert any("dequantized to f32, which is exact" in note for note in merged.notes)


@pytest.mark.parametrize("name", ["q4_0.gguf", "bundle"])
def test_a_merge_that_drowns_the_delta_names_the_other_way(source, name, tmp_path, monkeypatch):
    base = source(name)
    report = merge(base, [LORA], tmp_path / "merged.gguf", dtype="q4_0")
    assert len(lines(report)) == 1
    (warning,) = [one for one in report.warnings if "already quantized" in one]
    assert f"keeps {report.total.gain:.1%} of the delta with an error of" in warning
    monkeypatch.chdir(tmp_path)
    *made, last = warning.split("separately instead: ")[1].split("; ")
    for line in made:
        program, *arguments = shlex.split(line)
        assert program == "loraformat"
        command(*arguments)
    program, option, model, *beside = shlex.split(last)
    assert (program, option, beside) == ("llama-server", "-m", ["--lora", "lora.gguf"])
    found = log_probabilities(model, PROMPTS, [("lora.gguf", 1.0)])
    merge(base, [LORA], tmp_path / "exact.gguf", dtype="f32")
    exact, drowned = (
        log_probabilities(tmp_path / file, PROMPTS) for file in ("exact.gguf", "merged.gguf")
    )
    lost, lost_merged = (
        float((np.exp(exact) * (exact - other)).sum(1).mean()) for other in (found, drowned)
    )
    assert lost < 0.2 * lost_merged, (lost, lost_merged)


@pytest.mark.parametrize("dtype", ["q8_0", "f16"])
def test_where_the_delta_stays_nobody_warns(source, dtype, tmp_path):
    report = merge(source("bundle"), [LORA], tmp_path / "merged.gguf", dtype=dtype)
    assert not report.warnings
    assert len(lines(report)) == (dtype == "q8_0")


def test_the_original_merged_into_few_bits_is_no_second_time(tmp_path):
    report = merge(SMALL, [LORA], tmp_path / "merged.gguf", dtype="q4_0")
    assert not report.warnings and not lines(report) and not report.quantized_before


def test_several_adapters_stand_beside_with_their_weights(source, tmp_path):
    report = merge(
        source("q4_0.gguf"), [LORA, ADAPTERS["tests"]], tmp_path / "merged.gguf",
        weight=[0.5, 1], dtype="q4_0",
    )  # fmt: skip
    (warning,) = [one for one in report.warnings if "already quantized" in one]
    assert "--lora-scaled lora-1.gguf:0.5 --lora lora-2.gguf" in warning


def test_quantized_again_by_request_it_is_told_of(source, tmp_path):
    report = merge(
        source("q4_1.gguf"), [LORA], tmp_path / "again", to="loraformat", requantize=True
    )
    assert lines(report) and report.warnings
    assert [list(step.types) for step in info(tmp_path / "again").quantized_before] == [
        ["Q4_1", "Q8_0"]
    ]


def test_json_has_the_steps(source, tmp_path, capsys):
    command("convert", source("q4_1.gguf"), tmp_path / "bundle", "--json")
    said = json.loads(capsys.readouterr().out)
    (step,) = said["quantized_before"]
    assert step["types"] == {"Q4_1": 21, "Q8_0": 1}


def test_the_values_are_those_of_the_file(source, tmp_path):
    """What llama.cpp says of the file, it says of its dense export in float32."""
    convert(source("q5_0.gguf"), tmp_path / "dense", to_format="safetensors")
    convert(tmp_path / "dense", tmp_path / "back.gguf", dtype="f32")
    convert(source("q5_0.gguf"), tmp_path / "exact.gguf", dtype="f32")
    one, other = (
        list(log_probabilities(tmp_path / name, PROMPTS)) for name in ("back.gguf", "exact.gguf")
    )
    assert apart(one, other) < 1e-5


def test_the_original_is_named_where_it_is_known(source, tmp_path):
    bundle = shutil.copytree(source("bundle"), tmp_path / "bundle")
    path = bundle / MANIFEST_NAME
    said = json.loads(path.read_text())
    said["source"] |= {"repo": "org/small", "revision": "abc"}
    path.write_text(json.dumps(said))
    report = convert(bundle, tmp_path / "model.gguf", dtype="q4_0")
    assert lines(report)[0].endswith("Use the original weights, org/small")
    assert any("llama-quantize writes q4_k_m from an f16 file" in note for note in report.notes)
    convert(source("q4_1.gguf"), tmp_path / "twice")
    said = json.loads((tmp_path / "twice" / MANIFEST_NAME).read_text())
    said["source"] |= {"repo": "org/small-gguf"}
    (tmp_path / "twice" / MANIFEST_NAME).write_text(json.dumps(said))
    report = convert(tmp_path / "twice", tmp_path / "again.gguf", dtype="q4_0")
    assert "org/" not in lines(report)[0], "which are no original"
