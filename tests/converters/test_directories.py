"""Model directories as they are found: one file or many, with an index or without, and the rest."""

import json
import os

import pytest
import torch
from loraformat_converters.safetensors import CONVERTER
from safetensors.torch import load_file, save_file

from loraformat.errors import FormatError, InputError, OutputError, UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.model import open_model
from loraformat.testing import checkpoint, contents, dense, file_tree, save

INDEX = "model.safetensors.index.json"
LLAMA = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "model_type": "llama"}


def weights():
    random = torch.Generator().manual_seed(0)
    names = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("up", "down")]
    shapes = {f"{name}.weight": (64, 64) for name in names}
    shapes |= {"model.embed_tokens.weight": (8, 64), "model.norm.weight": (64,)}
    return {n: torch.randn(shape, generator=random).bfloat16() for n, shape in shapes.items()}


@pytest.fixture
def tensors():
    return weights()


@pytest.fixture
def directory(tmp_path, tensors):
    """Return a function that writes tensors into shards as a stranger would."""

    def write(count=1, index=True, config=LLAMA):
        path = tmp_path / "source"
        path.mkdir()
        files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        files = files if count > 1 else ["model.safetensors"]
        homes = {name: files[n % count] for n, name in enumerate(tensors)}
        for file in files:
            save_file({n: t for n, t in tensors.items() if homes[n] == file}, path / file)
        if index and count > 1:
            (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
        if config is not None:
            (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return path

    return write


def same(path, tensors):
    found = load_file(path)
    return found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)


class TestWeightFiles:
    def test_one_file_without_a_directory(self, directory, tensors, tmp_path):
        source = directory() / "model.safetensors"
        report = convert(source, tmp_path / "bundle")
        assert (report.source_format, report.quantized) == ("safetensors", 6)
        assert any("no config.json" in note for note in report.notes)
        assert not (tmp_path / "bundle" / "config.json").exists()
        convert(source, tmp_path / "dense", to_format="safetensors")
        assert same(tmp_path / "dense" / "model.safetensors", tensors)

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, directory, tensors, tmp_path, index):
        convert(directory(3, index), tmp_path / "dense", to_format="safetensors")
        assert same(tmp_path / "dense" / "model.safetensors", tensors)
        assert not (tmp_path / "dense" / INDEX).exists()

    def test_shards_as_output(self, directory, tensors, tmp_path):
        convert(directory(), tmp_path / "dense", to_format="safetensors", max_shard_size=20_000)
        weight_map = json.loads((tmp_path / "dense" / INDEX).read_bytes())["weight_map"]
        assert weight_map.keys() == tensors.keys()
        assert len(set(weight_map.values())) > 2
        found = {}
        for file in (tmp_path / "dense").glob("*.safetensors"):
            found |= load_file(file)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    @pytest.mark.parametrize("index", [True, False])
    def test_a_missing_shard_is_named(self, directory, tmp_path, index):
        source = directory(3, index)
        (source / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors: is missing"):
            convert(source, tmp_path / "bundle")

    def test_the_last_shards_are_missing(self, directory, tmp_path):
        source = directory(3, index=False)
        (source / "model-00003-of-00003.safetensors").unlink()
        with pytest.raises(InputError, match="model-00003-of-00003"):
            convert(source, tmp_path / "bundle")

    def test_an_index_of_other_shards(self, directory, tmp_path):
        source = directory(3)
        index = json.loads((source / INDEX).read_bytes())
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
        index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00003.safetensors"
        (source / INDEX).write_text(json.dumps(index))
        with pytest.raises(FormatError, match="does not hold it"):
            convert(source, tmp_path / "bundle")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7])
    def test_an_index_that_leads_outwards(self, directory, tmp_path, name):
        source = directory(2)
        (source / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(FormatError, match="not a bare"):
            convert(source, tmp_path / "bundle")

    def test_one_tensor_in_two_shards(self, directory, tensors, tmp_path):
        source = directory(2, index=False)
        name = "model-00001-of-00002.safetensors"
        save_file({"model.norm.weight": tensors["model.norm.weight"]}, source / name)
        save_file(
            {"model.norm.weight": tensors["model.norm.weight"]}, source / name.replace("1-", "2-")
        )
        with pytest.raises(FormatError, match="is also in another shard"):
            convert(source, tmp_path / "bundle")

    def test_no_weights(self, tmp_path):
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "config.json").write_text("{}")
        with pytest.raises(UnsupportedError, match="contains no model in a known format"):
            convert(tmp_path / "source", tmp_path / "bundle")


class TestTiedWeights:
    def test_an_absent_head_stays_absent(self, directory, tmp_path):
        source = directory(config=LLAMA | {"tie_word_embeddings": True})
        convert(source, tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
        names = load_file(tmp_path / "dense" / "model.safetensors").keys()
        assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names

    def test_both_keys_stay(self, directory, tensors, tmp_path):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        source = directory(config=LLAMA | {"tie_word_embeddings": True})
        convert(source, tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
        found = load_file(tmp_path / "dense" / "model.safetensors")
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(found[name], tensors[name])


OTHER_FILES = {
    "README.md": b"# card\r\n",
    "LICENSE": b"Apache-2.0",
    "tokenizer.json": b"{}",
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b'{"chat_template": "{{ x }}"}',
    "chat_template.jinja": "{{ größe }}".encode(),
    "generation_config.json": b'{"top_k": 1}',
    "1_Pooling/config.json": b"{}",
    "figures/loss.png": b"\x89PNG",
}


class TestOtherFiles:
    @pytest.fixture
    def source(self, directory):
        path = directory()
        for name, data in OTHER_FILES.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        return path

    @pytest.mark.parametrize("target", ["loraformat", "safetensors", "bitsandbytes"])
    def test_all_are_carried(self, source, tmp_path, target):
        report = convert(source, tmp_path / "out", to_format=target)
        out = file_tree(tmp_path / "out")
        assert {name: out.get(name) for name in OTHER_FILES} == OTHER_FILES
        assert not [loss for loss in report.lost if any(name in loss for name in OTHER_FILES)]

    def test_they_come_back_from_a_bundle(self, source, tmp_path):
        convert(source, tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
        before, after = file_tree(source), file_tree(tmp_path / "dense")
        assert before.keys() == after.keys()
        assert all(before[name] == after[name] for name in before if name != "model.safetensors")

    @pytest.mark.parametrize(
        "name",
        [
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.gguf",
            "tf_model.h5",
            "onnx/model.onnx",
        ],
    )
    def test_weights_in_other_formats_are_reported(self, source, tmp_path, name):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"weights")
        report = convert(source, tmp_path / "bundle")
        assert [loss for loss in report.lost if loss.startswith(name)]
        assert not (tmp_path / "bundle" / name).exists()

    def test_other_safetensors_are_reported(self, source, tmp_path):
        save_file({"x": torch.ones(1)}, source / "consolidated.safetensors")
        report = convert(source, tmp_path / "bundle")
        assert [loss for loss in report.lost if loss.startswith("consolidated.safetensors")]

    def test_strict_refuses_what_would_stay_behind(self, source, tmp_path):
        (source / "pytorch_model.bin").write_bytes(b"weights")
        with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*omit --strict"):
            convert(source, tmp_path / "bundle", strict=True)
        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize("target", ["loraformat", "bitsandbytes", "safetensors"])
    def test_strict_is_content_where_nothing_is_lost(self, source, tmp_path, target):
        assert convert(source, tmp_path / "out", to_format=target, strict=True).lost == []

    def test_strict_refuses_to_lose_the_manifest(self, source, tmp_path):
        convert(source, tmp_path / "bundle")
        with pytest.raises(UnsupportedError, match="the manifest with its hashes"):
            convert(tmp_path / "bundle", tmp_path / "out", to_format="safetensors", strict=True)

    def test_a_link_out_of_the_directory(self, source, tmp_path):
        (tmp_path / "secret").write_bytes(b"secret")
        (source / "notes.txt").symlink_to(tmp_path / "secret")
        with pytest.raises(InputError, match="leads out of its directory"):
            convert(source, tmp_path / "bundle")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "source"]

    def test_hidden_files_stay(self, source, tmp_path):
        (source / ".gitattributes").write_bytes(b"*.safetensors filter=lfs")
        convert(source, tmp_path / "bundle")
        assert not (tmp_path / "bundle" / ".gitattributes").exists()

    def test_a_bundle_inside_is_no_bundle(self, source, tmp_path):
        """Names that a bundle needs for itself are not carried into one."""
        (source / "adapters" / "x").mkdir(parents=True)
        (source / "adapters" / "x" / "notes.txt").write_bytes(b"x")
        report = convert(source, tmp_path / "bundle")
        assert [loss for loss in report.lost if loss.startswith("adapters/x/notes.txt")]


class TestConfig:
    def test_comes_back_byte_for_byte(self, directory, tmp_path):
        config = LLAMA | {
            "quantile": 0.1,
            "rope": {"b": [1, 2.5e-05], "a": None},
            "é": "ü",
            "zz": True,
        }
        source = directory(config=config)
        convert(source, tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "peer", to_format="bitsandbytes")
        convert(tmp_path / "peer", tmp_path / "dense", to_format="safetensors")
        raw = (source / "config.json").read_bytes()
        assert (tmp_path / "dense" / "config.json").read_bytes() == raw
        quantized = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
        assert quantized.pop("quantization_config")["quant_method"] == "bitsandbytes"
        assert quantized == config and list(quantized) == sorted(config)

    def test_unquantized_stays_byte_for_byte_in_any_form(self, directory, tmp_path):
        source = directory()
        raw = b'{"z":1,\t"model_type": "llama", "a":1.50}'
        (source / "config.json").write_bytes(raw)
        convert(source, tmp_path / "dense", to_format="safetensors")
        convert(source, tmp_path / "bundle", skip=["*"])
        for place in ("dense", "bundle"):
            assert (tmp_path / place / "config.json").read_bytes() == raw

    @pytest.mark.parametrize("raw", [b"[]", b"{", b'{"a": NAN}', b'{"a": 1,}', b"\xff"])
    def test_that_is_not_json(self, directory, tmp_path, raw):
        source = directory()
        (source / "config.json").write_bytes(raw)
        with pytest.raises(InputError, match=r"config\.json: not"):
            convert(source, tmp_path / "bundle")

    @pytest.mark.parametrize(
        "method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "quanto"]
    )
    def test_other_quantizations_are_refused_by_name(self, directory, tmp_path, method):
        source = directory(config=LLAMA | {"quantization_config": {"quant_method": method}})
        with pytest.raises(UnsupportedError, match=f"is quantized with {method}"):
            convert(source, tmp_path / "bundle")

    def test_quantization_without_a_name(self, directory, tmp_path):
        source = directory(config=LLAMA | {"quantization_config": {"bits": 4}})
        with pytest.raises(UnsupportedError, match="an unnamed method"):
            convert(source, tmp_path / "bundle")


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_each_keeps_its_own(self, tmp_path, dtype):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        tensors = {"model.layers.0.mlp.up_proj.weight": weight, "lm_head.weight": weight}
        model = checkpoint(*(dense(name, tensor) for name, tensor in tensors.items()))
        save(CONVERTER, model, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
        found = load_file(tmp_path / "dense" / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        assert torch.equal(found["lm_head.weight"], weight)
        error = (found["model.layers.0.mlp.up_proj.weight"] - weight).float().norm()
        assert 0.05 < error / weight.float().norm() < 0.12

    @pytest.mark.parametrize("word, dtype", [("f32", "float32"), ("f16", "float16")])
    def test_dtype_option(self, directory, tensors, tmp_path, word, dtype):
        convert(directory(), tmp_path / "dense", to_format="safetensors", dtype=word)
        found = load_file(tmp_path / "dense" / "model.safetensors")
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor.to(getattr(torch, dtype)))
        assert json.loads((tmp_path / "dense" / "config.json").read_bytes())["dtype"] == dtype

    def test_dtype_option_on_a_bundle(self, directory, tmp_path):
        """What the codes stand for does not depend on the type they are decoded to."""
        source = directory()
        convert(source, tmp_path / "one", dtype="f32")
        convert(source, tmp_path / "other")
        for name in ("one", "other"):
            convert(tmp_path / name, tmp_path / f"{name}-f32", to_format="safetensors", dtype="f32")
        one, other = (file_tree(tmp_path / f"{name}-f32") for name in ("one", "other"))
        assert one["model.safetensors"] == other["model.safetensors"]

    def test_integers_are_left_alone(self, tmp_path):
        model = checkpoint(dense("steps", torch.tensor([1, 2])), dense("w", torch.ones(2)))
        save(CONVERTER, model, tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "dense", to_format="safetensors", dtype="f16")
        found = load_file(tmp_path / "dense" / "model.safetensors")
        assert (found["steps"].dtype, found["w"].dtype) == (torch.int64, torch.float16)

    def test_too_large_for_float16(self, tmp_path):
        save(CONVERTER, checkpoint(dense("w", torch.tensor([7e4]))), tmp_path / "source")
        with pytest.raises(UnsupportedError, match="beyond float16's 65504; use --dtype bf16"):
            convert(tmp_path / "source", tmp_path / "out", to_format="safetensors", dtype="f16")
        assert not (tmp_path / "out").exists()


class TestDryRun:
    @pytest.mark.parametrize("target", ["loraformat", "safetensors", "bitsandbytes"])
    def test_writes_nothing_and_tells_the_size(self, directory, tmp_path, target):
        source = directory()
        before = sorted(p.name for p in tmp_path.iterdir())
        plan = convert(source, tmp_path / "out", to_format=target, dry_run=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        done = convert(source, tmp_path / "out", to_format=target)
        assert (plan.dry_run, done.dry_run) == (True, False)
        for field in (
            "source_format",
            "target_format",
            "tensors",
            "quantized",
            "parameters",
            "lost",
        ):
            assert getattr(plan, field) == getattr(done, field)
        assert plan.output_bytes < done.output_bytes < plan.output_bytes + 60_000
        assert any(note.startswith("shard 1 of 1") for note in plan.notes)


def test_the_source_is_never_touched(directory, tmp_path):
    source = directory(2)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    convert(source, tmp_path / "bundle")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(OutputError):
            convert(source, target, to_format="safetensors", force=True)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before


def test_reading_without_mapping(directory, tmp_path, monkeypatch):
    """``LORAFORMAT_IO=pread`` reads the same."""
    source = directory(2)
    mapped = convert(source, tmp_path / "one")
    monkeypatch.setitem(os.environ, "LORAFORMAT_IO", "pread")
    assert convert(source, tmp_path / "two").quantized == mapped.quantized
    assert file_tree(tmp_path / "one") == file_tree(tmp_path / "two")
    with open_model(source) as opened:
        assert len(contents(opened)) == 8
