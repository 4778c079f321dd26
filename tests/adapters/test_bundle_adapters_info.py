"""What ``info`` shows of adapters, and what ``verify`` finds in them."""

import json

import pytest
from safetensors.torch import load_file, save_file

from loraformat.cli import main
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.verify import verify
from tests.adapters.bundles import manifest, name_base


def cli(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


def change_weights(path, change):
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, {"format": "pt"})


def test_info_of_an_adapter(work, capsys):
    found = info(work.adapter)
    assert (found.kind, found.format, found.ranks, found.alphas) == ("adapter", "peft", [4], [8.0])
    assert (found.scalings, found.targets) == ([2.0], ["q_proj", "up_proj"])
    assert found.parameters == 2 * 4 * (64 + 64 + 64 + 96)
    assert found.bytes == sum(f.stat().st_size for f in work.adapter.rglob("*") if f.is_file())
    assert (found.dora, found.biases, found.embeddings, found.bundle) == (0, 0, 0, None)
    assert {module.rank for module in found.modules} == {4}
    assert cli("info", work.adapter, "--tensors") == 0
    text = capsys.readouterr().out
    assert "4 modules: q_proj, up_proj" in text
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert cli("info", work.adapter, "--json") == 0
    assert "modules" not in json.loads(capsys.readouterr().out)


def test_info_of_dora_and_replaced_modules(work):
    from transformers import AutoModelForCausalLM

    from tests.adapters.bundles import save_adapter

    model = AutoModelForCausalLM.from_pretrained(work.base)
    options = {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]}
    save_adapter(model, work.path / "dora", **options)
    found = info(work.path / "dora")
    assert (found.dora, found.scalings, found.replacements) == (4, [4.0], ["lm_head.weight"])


def test_info_of_an_adapter_in_a_bundle(work):
    convert(work.adapter, work.bundle / "adapters" / "medical", canonical=True)
    found = info(work.bundle / "adapters" / "medical")
    assert found.bundle == str(work.bundle)
    assert found.base_fingerprint == manifest(work.bundle)["fingerprint"]
    (adapter,) = info(work.bundle).adapters
    assert (adapter.name, adapter.ranks, adapter.targets) == ("medical", [4], ["q_proj", "up_proj"])


def test_a_sound_adapter(work, capsys):
    result = verify(work.adapter)
    assert (result.findings, result.hashed, result.tensors) == ([], False, 8)
    convert(work.adapter, work.bundle / "adapters" / "medical")
    result = verify(work.bundle / "adapters" / "medical")
    assert (result.findings, result.hashed) == ([], True)
    assert cli("verify", work.adapter) == 0
    assert "no hashes" in capsys.readouterr().out


def half(tensors):
    del tensors[next(name for name in tensors if "lora_B" in name)]


def nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.mark.parametrize(("change", "said"), [(half, "lora_B"), (nan, "NaN")])
def test_what_no_rule_forbids_and_nothing_can_use(work, capsys, change, said):
    change_weights(work.adapter, change)
    (finding,) = verify(work.adapter).findings
    assert (finding.rule, said in finding.problem) == ("", True)
    assert cli("verify", work.adapter) == 4
    assert not capsys.readouterr().out.startswith(":")


def no_object(path):
    (path / "adapter_config.json").write_text('["LORA"]')


def cut(path):
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def newline(path):
    weights = path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[8] = ord("\n")
    weights.write_bytes(data)


BROKEN = {"A02": no_object, "H09": cut, "H02": newline}


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_files_are_findings_with_a_rule(work, rule):
    BROKEN[rule](work.adapter)
    findings = verify(work.adapter).findings
    assert [finding.rule for finding in findings] == [rule]


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_adapter_of_a_bundle_is_named(work, rule):
    """Listed with the right hashes, but wrong in itself."""
    convert(work.adapter, work.bundle / "adapters" / "good")
    convert(work.adapter, work.bundle / "adapters" / "bad")
    list_again(work.bundle, BROKEN[rule])
    findings = verify(work.bundle).findings
    assert [finding.rule for finding in findings] == [rule]
    assert "adapters/bad/" in findings[0].path
    assert [f.rule for f in verify(work.bundle / "adapters" / "bad").findings] == [rule]
    assert verify(work.bundle / "adapters" / "good").findings == []


def list_again(bundle, change):
    """Change the adapter ``bad`` and let the manifest list it as it is now."""
    from loraformat.bundle.update import records_of

    directory = bundle / "adapters" / "bad"
    change(directory)
    said = manifest(bundle)
    said["adapters"]["bad"]["files"] = {
        name: {"bytes": record.bytes, "sha256": record.sha256}
        for name, record in records_of(directory).items()
    }
    (bundle / "loraformat.json").write_text(json.dumps(said))


def test_an_adapter_of_another_base_and_a_changed_file(work):
    convert(work.adapter, work.bundle / "adapters" / "bad")
    list_again(work.bundle, lambda path: name_base(path, "0" * 64))
    for path in (work.bundle, work.bundle / "adapters" / "bad"):
        assert [finding.rule for finding in verify(path).findings] == ["A01"]
    notes = work.bundle / "adapters" / "bad" / "notes" / "training.txt"
    notes.write_bytes(notes.read_bytes().replace(b"three", b"seven"))
    for path in (work.bundle, work.bundle / "adapters" / "bad"):
        findings = verify(path).findings
        assert {finding.rule for finding in findings} == {"A01", "V03"}
        assert any("training.txt" in finding.path for finding in findings)
