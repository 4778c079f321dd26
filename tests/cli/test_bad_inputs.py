"""Bad inputs of many kinds: exit 3 (or 4 from verify), one line, no traceback, no output."""

import json
import os
import struct

import numpy
import pytest
from safetensors.numpy import load_file, save_file


def empty_directory(model):
    for path in model.iterdir():
        path.unlink()


def only_a_text_file(model):
    empty_directory(model)
    (model / "README.md").write_text("hello")


def empty_weights(model):
    (model / "model.safetensors").write_bytes(b"")


def broken_header(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'{"', b'["', 1))


def endless_header(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def truncated_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def pickle_instead(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def weights_are_a_directory(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()


def weights_are_a_fifo(model):
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def link_that_leads_out(model):
    path = model / "model.safetensors"
    path.rename(model.parent / "elsewhere.safetensors")
    path.symlink_to(model.parent / "elsewhere.safetensors")


def dangling_link(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("nowhere")


def link_loop(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")


def broken_config(model):
    (model / "config.json").write_text("{")


def config_is_a_list(model):
    (model / "config.json").write_text("[1]")


def config_nested_too_deep(model):
    (model / "config.json").write_text('{"a": ' + "[" * 128 + "]" * 128 + "}")


def missing_shard(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")


def index_that_climbs(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def index_with_a_missing_shard(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized_by_a_stranger(model):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (model / "config.json").write_text(json.dumps(config))


def bitsandbytes_without_nf4(model):
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (model / "config.json").write_text(json.dumps(config))


def broken_manifest(model):
    (model / "loraformat.json").write_text("not json")


def empty_manifest(model):
    (model / "loraformat.json").write_text("")


def manifest_of_the_future(model):
    (model / "loraformat.json").write_text('{"format": "loraformat", "format_version": "2.0"}')


BREAKAGES = [
    empty_directory, only_a_text_file, empty_weights, broken_header, endless_header,
    truncated_weights, pickle_instead, weights_are_a_directory, weights_are_a_fifo,
    link_that_leads_out, dangling_link, link_loop, broken_config, config_is_a_list,
    config_nested_too_deep, missing_shard, index_that_climbs, index_with_a_missing_shard,
    quantized_by_a_stranger, bitsandbytes_without_nf4, broken_manifest, empty_manifest,
    manifest_of_the_future,
]  # fmt: skip


def check_line(text):
    assert text.startswith("error: "), text
    assert text.count("\n") == 1
    assert "Traceback" not in text
    assert "internal error" not in text


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_directory(run, model, tmp_path, breakage):
    breakage(model)
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["convert", model, tmp_path / "out"], ["info", model]):
        result = run(*arguments)
        assert (result.code, result.out) == (3, ""), result
        check_line(result.err)
        assert str(model) in result.err
    result = run("verify", model)
    assert result.code in (3, 4)
    if result.code == 3:
        check_line(result.err)
    else:
        assert result.out[0].isupper()
        assert result.err == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF", bytes(100), b"\xff" * 100])
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.txt"])
def test_a_file_instead_of_a_directory(run, tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    for verb in (["info", path], ["convert", path, tmp_path / "out"]):
        result = run(*verb)
        assert result.code == 3
        check_line(result.err)
    assert run("verify", path).code in (3, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "word", ["", " ", "x" * 5000, "a/" + "y" * 300, "org/na me", "a\nb", "~nobody", "org/name@"]
)
def test_words_that_are_no_path(run, tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    result = run("info", word)
    assert result.code == 3
    check_line(result.err)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(run, model, tmp_path, value):
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][2, 5] = value
    save_file(tensors, path)
    result = run("convert", model, tmp_path / "out")
    assert result.code == 3
    check_line(result.err)
    assert f"{model}: tensor {name} holds {value} at element {2 * 64 + 5}" in result.err
    assert "--skip" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert run("convert", model, tmp_path / "out", "--skip", "*.3.mlp.*").code == 0


def test_float16_overflow(run, model, tmp_path):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, path)
    result = run("convert", model, tmp_path / "out", "--to", "safetensors", "--dtype", "f16")
    assert result.code == 3
    check_line(result.err)
    assert "model.norm.weight" in result.err
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_was_damaged_is_not_converted(run, bundle, tmp_path):
    shard = sorted(bundle.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[4096] ^= 1
    shard.write_bytes(data)
    result = run("convert", bundle, tmp_path / "out", "--to", "safetensors")
    assert result.code == 3
    check_line(result.err)
    assert result.err.rstrip().endswith("[rule V01]")
    assert "model.layers." in result.err
    assert not (tmp_path / "out").exists()


# Strangers' words do not reach the terminal as they are


def assert_clean(*texts):
    for text in texts:
        assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


def test_escape_sequences_in_names(run, model, tmp_path):
    hostile = "evil\x1b]0;title\x07\x1b[2Jname"
    path = model / "model.safetensors"
    save_file({hostile: numpy.zeros(2, numpy.float32)}, path)
    (model / f"{hostile}.txt").write_text("carried")
    for arguments in (
        ["info", model, "--tensors"],
        ["verify", model],
        ["convert", model, tmp_path / "o"],
    ):
        result = run(*arguments)
        assert result.code in (3, 4)
        assert_clean(result.out, result.err)


def test_escape_sequences_in_a_config(run, model):
    config = {"architectures": ["A\x1b[31m\x9b2J"], "model_type": "\x1b[2J"}
    (model / "config.json").write_text(json.dumps(config))
    result = run("info", model)
    assert result.code == 0
    assert "A\\x1b[31m\\x9b2J" in result.out
    assert_clean(result.out, result.err)


def test_escape_sequences_in_file_names(run, model, tmp_path):
    (model / "note\x1b[31m.txt").write_text("carried")
    result = run("convert", model, tmp_path / "out", "--to", "safetensors")
    assert_clean(result.out, result.err)


def test_escape_sequences_in_the_path_itself(run, model, tmp_path):
    hostile = tmp_path / "mo\x1b[31mdel"
    model.rename(hostile)
    for arguments in (
        ["convert", hostile, tmp_path / "out"],
        ["verify", hostile],
        ["info", hostile],
    ):
        result = run(*arguments)
        assert result.code == 0
        assert_clean(result.out, result.err)
    assert_clean(run("info", tmp_path / "no\x1b[31m").err)


@pytest.mark.parametrize("architectures", [[{}], [[]], {}, 7, [None], "text", [1]])
def test_odd_architectures(run, model, architectures):
    (model / "config.json").write_text(
        json.dumps({"architectures": architectures, "model_type": 3})
    )
    for flags in ([], ["--json"]):
        assert run("info", model, *flags).code == 0


def test_a_bad_config_beside_an_adapter(run, with_adapter):
    path = with_adapter / "adapters" / "polite" / "adapter_config.json"
    before = path.read_bytes()
    for text in ("[1]", "{", '{"a": 1,}'):
        path.write_text(text.ljust(len(before)))  # of the length that the manifest says
        assert run("verify", with_adapter).code == 4
        result = run("info", with_adapter)
        assert result.code in (0, 3)
        if result.code:
            check_line(result.err)
