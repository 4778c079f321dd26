"""``convert`` with adapters: in, out, and between directories; what is refused, and how."""

import json
import os
import shutil

import pytest
import torch

from loraformat.bundle.integrity import BASE_FINGERPRINT, BASE_SOURCE, verify_bundle
from loraformat.bundle.update import parse_bundle_slot, remove_adapter
from loraformat.cli import main
from loraformat.errors import FormatError, InputError, OutputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.adapter import open_adapter
from tests.adapters.bundles import logits, manifest, name_base

OTHER = "0" * 64


def test_in_and_out_byte_for_byte(work, snapshot):
    report = convert(work.adapter, work.bundle / "adapters" / "medical")
    assert (report.verbatim, report.modules, report.ranks) == (True, 4, [4])
    convert(work.bundle / "adapters" / "medical", work.path / "out")
    assert snapshot(work.path / "out") == snapshot(work.adapter)
    assert verify_bundle(work.bundle) == []


def test_only_the_manifest_of_a_bundle_changes(work, snapshot):
    before, said = snapshot(work.bundle), manifest(work.bundle)
    convert(work.adapter, work.bundle / "adapters" / "medical")
    after = snapshot(work.bundle)
    assert {n for n in before if after[n] != before[n]} == {"loraformat.json"}
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"adapters"}
    assert {**manifest(work.bundle), "adapters": {}} == said


def test_canonical_names_its_base_and_computes_the_same(work):
    convert(work.adapter, work.bundle / "adapters" / "as-is")
    report = convert(work.adapter, work.bundle / "adapters" / "anew", canonical=True)
    assert not report.verbatim
    assert report.base_fingerprint == manifest(work.bundle)["fingerprint"]
    from loraformat.storage.safe_directory import SafeDirectory
    from loraformat.tensors.mapped import MappedFile

    file = MappedFile(SafeDirectory(work.bundle / "adapters" / "anew"), "adapter_model.safetensors")
    assert file.header.metadata[BASE_FINGERPRINT] == report.base_fingerprint
    assert json.loads(file.header.metadata[BASE_SOURCE]) == {"format": "safetensors"}
    file.close()
    config = json.loads((work.bundle / "adapters" / "anew" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    wanted = logits(work.bundle, work.adapter)
    assert torch.equal(logits(work.bundle, work.bundle / "adapters" / "as-is"), wanted)
    found = logits(work.bundle, work.bundle / "adapters" / "anew")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_dtype_is_a_reason_to_write_anew(work):
    report = convert(work.adapter, work.path / "out", dtype="bf16")
    assert not report.verbatim
    assert "its factors become bf16" in report.notes[-1]
    with open_adapter(work.path / "out") as adapter:
        assert {delta.a.dtype for delta in adapter.deltas.values()} == {"BF16"}


def test_another_base_is_refused_and_both_are_named(work, snapshot):
    ours = manifest(work.bundle)["fingerprint"]
    name_base(work.adapter, OTHER)
    before = snapshot(work.bundle)
    target = work.bundle / "adapters" / "medical"
    with pytest.raises(InputError, match="--allow-base-mismatch") as caught:
        convert(work.adapter, target)
    assert OTHER in str(caught.value)
    assert ours in str(caught.value)
    assert snapshot(work.bundle) == before
    report = convert(work.adapter, target, allow_base_mismatch=True)
    assert (report.verbatim, report.base_fingerprint) == (False, ours)
    assert verify_bundle(work.bundle) == []


def test_the_right_base_needs_no_note(work):
    name_base(work.adapter, manifest(work.bundle)["fingerprint"])
    report = convert(work.adapter, work.bundle / "adapters" / "medical")
    assert (report.verbatim, report.notes) == (True, [])


def test_an_adapter_of_another_shape_is_refused(work, snapshot):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.adapters.bundles import save_adapter

    other = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, eos_token_id=1, bos_token_id=0,
    ))  # fmt: skip
    save_adapter(other, work.path / "other")
    before = snapshot(work.bundle)
    with pytest.raises(InputError, match="another base"):
        convert(work.path / "other", work.bundle / "adapters" / "other")
    with pytest.raises(InputError, match="another base"):
        convert(work.path / "other", work.path / "out", base=work.base)
    assert snapshot(work.bundle) == before
    assert not (work.path / "out").exists()


def test_a_changed_file_does_not_leave_the_bundle(work):
    place = work.bundle / "adapters" / "medical"
    convert(work.adapter, place)
    notes = place / "notes" / "training.txt"
    notes.write_bytes(notes.read_bytes().replace(b"three", b"seven"))
    with pytest.raises(FormatError, match="training") as caught:
        convert(place, work.path / "out")
    assert caught.value.rule == "V03"
    assert not (work.path / "out").exists()


def test_an_unlisted_file_stays_behind(work, snapshot):
    place = work.bundle / "adapters" / "medical"
    convert(work.adapter, place)
    (place / "extra.txt").write_text("nobody knows me")
    convert(place, work.path / "out")
    assert snapshot(work.path / "out") == snapshot(work.adapter)


def test_from_bundle_to_bundle(work, snapshot):
    shutil.copytree(work.bundle, work.path / "second")
    convert(work.adapter, work.bundle / "adapters" / "medical")
    convert(work.bundle / "adapters" / "medical", work.path / "second" / "adapters" / "law")
    assert snapshot(work.path / "second" / "adapters" / "law") == snapshot(work.adapter)
    assert verify_bundle(work.path / "second") == []


def test_replacing_needs_force_and_leaves_the_others(work, snapshot):
    first = work.bundle / "adapters" / "first"
    convert(work.adapter, first)
    convert(work.adapter, work.bundle / "adapters" / "second")
    (work.adapter / "README.md").write_text("new")
    with pytest.raises(OutputError, match="--force"):
        convert(work.adapter, first)
    convert(work.adapter, first, force=True)
    assert snapshot(first) == snapshot(work.adapter)
    assert list(manifest(work.bundle)["adapters"]) == ["second", "first"]
    assert verify_bundle(work.bundle) == []
    assert sorted(path.name for path in (work.bundle / "adapters").iterdir()) == ["first", "second"]


def test_a_directory_that_no_manifest_lists_is_not_overwritten(work):
    stranger = work.bundle / "adapters" / "medical"
    shutil.copytree(work.adapter, stranger)
    (stranger / "README.md").write_text("mine")
    (stranger / "more.txt").write_text("mine")
    with pytest.raises(OutputError, match="not listed in the manifest"):
        convert(work.adapter, stranger)
    assert (stranger / "README.md").read_text() == "mine"
    convert(work.adapter, stranger, force=True)
    assert not (stranger / "more.txt").exists()
    assert verify_bundle(work.bundle) == []


def test_names_that_differ_only_in_case(work):
    convert(work.adapter, work.bundle / "adapters" / "medical")
    with pytest.raises(OutputError, match="only in case"):
        convert(work.adapter, work.bundle / "adapters" / "Medical", force=True)


@pytest.mark.parametrize("name", [".hidden", "nul", "a b", "é", "x" * 97, "-x"])
def test_bad_names(work, snapshot, name):
    before = snapshot(work.bundle)
    with pytest.raises(UsageError, match="M09"):
        convert(work.adapter, work.bundle / "adapters" / name)
    assert snapshot(work.bundle) == before


def test_dots_do_not_lead_out(work):
    with pytest.raises(OutputError):  # it is the bundle itself
        convert(work.adapter, work.bundle / "adapters" / "..")
    with pytest.raises(UsageError, match="name one"):
        convert(work.adapter, work.bundle / "adapters")


def test_links_are_not_followed(work, snapshot):
    secret = work.path / "secret.txt"
    secret.write_text("secret")
    (work.adapter / "link.txt").symlink_to(secret)
    before = snapshot(work.bundle)
    with pytest.raises(InputError, match="leads out"):
        convert(work.adapter, work.bundle / "adapters" / "medical")
    assert snapshot(work.bundle) == before


def test_adapters_may_not_be_a_link(work):
    (work.path / "elsewhere").mkdir()
    (work.bundle / "adapters").symlink_to(work.path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        convert(work.adapter, work.bundle / "adapters" / "medical")
    assert list((work.path / "elsewhere").iterdir()) == []


def test_hidden_files_stay_behind_and_odd_names_are_refused(work):
    (work.adapter / ".cache").mkdir()
    (work.adapter / ".cache" / "x").write_text("")
    convert(work.adapter, work.bundle / "adapters" / "medical")
    assert not (work.bundle / "adapters" / "medical" / ".cache").exists()
    (work.adapter / "what?.txt").write_text("")
    with pytest.raises(UnsupportedError, match="cannot be part of a bundle"):
        convert(work.adapter, work.bundle / "adapters" / "odd")


def test_a_manifest_in_a_hub_cache_is_not_replaced(work):
    blob = work.path / "blob"
    shutil.move(work.bundle / "loraformat.json", blob)
    (work.bundle / "loraformat.json").symlink_to(blob)
    with pytest.raises((OutputError, InputError)):
        convert(work.adapter, work.bundle / "adapters" / "medical")
    assert (work.bundle / "loraformat.json").is_symlink()


def test_removing(work, snapshot):
    before = snapshot(work.bundle)
    convert(work.adapter, work.bundle / "adapters" / "medical")
    place = parse_bundle_slot(work.bundle / "adapters" / "medical")
    remove_adapter(place)
    assert snapshot(work.bundle) == before
    with pytest.raises(InputError, match="listed in the manifest"):
        remove_adapter(place)


def test_a_dry_run_writes_nothing(work, snapshot):
    before = snapshot(work.path)
    report = convert(work.adapter, work.bundle / "adapters" / "medical", dry_run=True)
    assert report.dry_run
    assert report.output_bytes == sum(
        f.stat().st_size for f in work.adapter.rglob("*") if f.is_file()
    )
    assert snapshot(work.path) == before
    assert not (work.bundle / "adapters").exists()


def test_a_nan_is_refused(work):
    from safetensors.torch import load_file, save_file

    weights = work.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        convert(work.adapter, work.bundle / "adapters" / "medical")


def cli(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--block-size", "64", "--skip", "x"], "--block-size, --skip"),
        (["--max-shard-size", "1GB"], "--max-shard-size"),
        (["--no-double-quant", "--include", "x"], "--no-double-quant, --include"),
        (["--to", "loraformat"], "loraformat"),
        (["--base", "x"], "--base"),
    ],
)
def test_exit_2_for_options_of_bases(work, capsys, options, named):
    assert cli("convert", work.adapter, work.bundle / "adapters" / "medical", *options) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [["--canonical"], ["--allow-base-mismatch"], ["--base", "x"]],
)
def test_exit_2_for_options_of_adapters(work, capsys, option):
    assert cli("convert", work.base, work.path / "out", *option) == 2
    assert option[0] in capsys.readouterr().err
    assert cli("convert", work.base, work.bundle / "adapters" / "base") == 2


def test_exit_codes_and_words(work, capsys):
    target = work.bundle / "adapters" / "medical"
    assert cli("convert", work.adapter, target) == 0
    assert "copied byte for byte" in capsys.readouterr().out
    assert cli("convert", work.adapter, target) == 5
    assert cli("convert", target, target, "--force") == 5
    name_base(work.adapter, OTHER)
    assert cli("convert", work.adapter, target, "--force") == 3
    capsys.readouterr()
    assert cli("convert", target, work.path / "out", "--json") == 0
    members = json.loads(capsys.readouterr().out)
    assert (members["schema"], members["kind"]) == ("loraformat.convert", "adapter")
    assert os.listdir(work.bundle / "adapters") == ["medical"]


def test_a_pickle_is_read_on_request_and_written_anew(work):
    from safetensors.torch import load_file

    weights = work.adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), work.adapter / "adapter_model.bin")
    wanted = logits(work.bundle, work.adapter)
    weights.unlink()
    target = work.bundle / "adapters" / "medical"
    with pytest.raises(InputError, match="--allow-pickle"):
        convert(work.adapter, target)
    report = convert(work.adapter, target, allow_pickle=True)
    assert not report.verbatim
    assert "pickle" in report.notes[-1]
    assert not (target / "adapter_model.bin").exists()
    assert (target / "notes" / "training.txt").exists()
    assert verify_bundle(work.bundle) == []
    torch.testing.assert_close(logits(work.bundle, target), wanted, rtol=0, atol=1e-5)


def test_what_other_verbs_write_into_a_bundle_is_listed(work):
    target = work.bundle / "adapters" / "small"
    assert cli("reduce", work.adapter, "-o", target, "--rank", "2") == 0
    assert list(manifest(work.bundle)["adapters"]) == ["small"]
    assert verify_bundle(work.bundle) == []
    assert cli("reduce", work.adapter, "-o", target, "--rank", "3") == 5
    assert cli("reduce", work.adapter, "-o", target, "--rank", "3", "--force") == 0
    with open_adapter(target) as adapter:
        assert {delta.rank for delta in adapter.deltas.values()} == {3}


def test_the_verb_that_removes(work, snapshot, capsys):
    before = snapshot(work.bundle)
    target = work.bundle / "adapters" / "medical"
    convert(work.adapter, target)
    assert cli("remove", target, "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == "medical"
    assert snapshot(work.bundle) == before
    assert cli("remove", target) == 3
    assert cli("remove", work.adapter) == 2


def test_an_adapter_whose_files_are_gone_can_be_removed(work):
    target = work.bundle / "adapters" / "medical"
    convert(work.adapter, target)
    shutil.rmtree(target)
    assert verify_bundle(work.bundle) != []
    remove_adapter(parse_bundle_slot(target))
    assert verify_bundle(work.bundle) == []
