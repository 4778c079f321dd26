"""``loraformat check`` on the command line: exit codes, JSON, files, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from loraformat.cli import main
from loraformat.runtimes.known import RUNTIMES


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["check", *map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=out, err=err)

    return call


def test_a_sound_adapter_exits_0_and_a_wrong_one_4(run, adapter, base):
    result = run(adapter("plain"), "--base", base)
    assert (result.code, result.err) == (0, "")
    assert "transformers right -" in " ".join(result.out.split())
    result = run(adapter("rslora"), "--base", base)
    assert result.code == 4
    assert "sglang WRONG RSLORA_IGNORED" in " ".join(result.out.split())
    assert f"loraformat check {adapter('rslora')} --fix -o rslora-fixed --base {base}" in result.out


def test_json(run, adapter):
    result = run(adapter("dora"), "--runtime", "vllm", "--json")
    members = json.loads(result.out)
    assert result.code == 4
    assert members["schema"] == "loraformat.check"
    assert members["verdicts"] == {"vllm": "wrong"}
    (finding,) = members["findings"]
    assert finding["rule"] == "DORA"
    assert finding["level"] == "fail"
    assert finding["command"] == f"loraformat merge BASE {adapter('dora')} -o dora-merged"
    assert "facts" not in members


def test_quiet_says_it_with_the_exit_code_alone(run, adapter):
    for feature, code in (("plain", 0), ("rslora", 4)):
        result = run(adapter(feature), "--quiet")
        assert (result.code, result.out, result.err) == (code, "", "")


def test_fix(run, adapter, base, tmp_path):
    result = run(adapter("all scalings"), "--fix", "-o", "out", "--base", base)
    assert result.code == 0
    assert result.out.startswith("wrote out: 14 modules, rank 16\n")
    again = run(adapter("all scalings"), "--fix", "-o", "out", "--json")
    assert again.code == 5
    result = run(adapter("all scalings"), "--fix", "-o", "out", "--force", "--json")
    assert json.loads(result.out)["fixed"]["ranks"] == [16]
    assert not list(tmp_path.glob("*.partial"))


def test_fix_into_a_bundle(run, adapter, base, tmp_path):
    with pytest.raises(SystemExit):
        main(["convert", str(base), str(tmp_path / "bundle"), "--quiet"])
    result = run(adapter("rslora"), "--fix", "-o", "bundle/adapters/polite")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "bundle/adapters/polite/adapter_config.json").read_text())
    assert config["use_rslora"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fix"], "add -o OUT"),
        (["-o", "out"], "add --fix"),
        (["--dtype", "f32"], "add --fix"),
        (["--force"], "add --fix"),
        (["--runtime", "vlm"], "no runtime 'vlm', wanted one of transformers, vllm"),
    ],
)
def test_usage(run, adapter, arguments, said):
    result = run(adapter("plain"), *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.out == ""


def test_what_cannot_be_fixed(run, adapter, tmp_path):
    result = run(adapter("dora"), "--fix", "-o", "out")
    assert result.code == 3
    assert "loraformat merge BASE ADAPTER" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_no_adapter(run, base):
    result = run(base)
    assert result.code == 3
    assert "BUNDLE/adapters/NAME" in result.err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"peft_type": "LORA", "r": 1e400}', "error"),
        ('{"peft_type": "LORA", "r": 99999999}', "wanted an integer"),
        ('{"peft_type": "LORA", "lora_alpha": "x\\u001b[2J"}', "wanted a finite number"),
        ('{"peft_type": "LORA", "alpha_pattern": {"(a+)+(?=b)": 1}}', "alpha_pattern"),
    ],
)
def test_a_damaged_config(run, adapter, tmp_path, config, said):
    shutil.copytree(adapter("plain"), tmp_path / "A")
    (tmp_path / "A" / "adapter_config.json").write_text(config)
    result = run("A")
    assert result.code == 3
    assert said in result.err
    assert result.err.count("\n") == 1
    assert "\x1b" not in result.err


@pytest.mark.parametrize("change", ["cut", "bytes"])
def test_damaged_weights(run, adapter, tmp_path, change):
    shutil.copytree(adapter("plain"), tmp_path / "A")
    path = tmp_path / "A" / "adapter_model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-7] if change == "cut" else b"\xff" * 64 + raw[64:])
    result = run("A")
    assert result.code == 3
    assert result.err.count("\n") == 1


def test_a_strangers_words_do_not_move_the_cursor(run, adapter, tmp_path):
    """Names of modules come from the file."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter("half a pair"), tmp_path / "A")
    path = tmp_path / "A" / "adapter_model.safetensors"
    tensors = {name.replace("mlp", "m\u202elp"): t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    result = run("A")
    assert result.code in (3, 4)
    assert "\u202e" not in result.out + result.err


def test_a_pickle_is_opened_only_where_that_is_allowed(run, adapter, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(adapter("plain"), tmp_path / "A")
    weights = tmp_path / "A" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "A" / "adapter_model.bin")
    weights.unlink()
    assert run("A").code == 3
    assert run("A", "--allow-pickle").code == 0


def test_neither_the_input_nor_its_directory_changes(run, adapter, base):
    folder = adapter("alpha_pattern")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(folder, "--base", base, "--fix", "-o", "out")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_help_of_the_word_for_every_runtime(run):
    text = " ".join(run("--help").out.split())
    assert all(name in text for name in RUNTIMES)


# --write


def test_write(run, adapter, base, tmp_path):
    result = run(adapter("plain"), "--base", base, "--write", "run")
    assert result.code == 0
    files = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert set(files) == {
        "Modelfile", "run_llama_cpp.sh", "run_lorax.sh", "run_mlx.sh", "run_sglang.sh",
        "run_transformers.py", "run_vllm.sh",
    }  # fmt: skip
    for name, text in files.items():
        assert name == "Modelfile" or str(adapter("plain")) in text
        if name.endswith(".sh"):
            assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0
    lines = files["Modelfile"].splitlines()
    assert [line for line in lines if line[:2] not in ("# ", "")] == ["FROM ./plain-merged.gguf"]
    older = lines.index("# FROM ./model.gguf")
    assert lines[older + 1] == "# ADAPTER ./plain.gguf"
    assert lines[older + 3].startswith("# loraformat convert ")


def test_write_for_an_adapter_of_conversations(run, adapter, base, tmp_path):
    folder = shutil.copytree(adapter("plain"), tmp_path / "A")
    pieces = {"begin": "", "system": ["<s>", "</s>"], "user": "<u>", "answer": "<a>", "end": "<e>"}
    said = {"format": pieces, "stops": ["<e>"], "stop_ids": [5]}
    (folder / "training_record.json").write_text(json.dumps({"training": {"chat": said}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert run(folder, "--base", base, "--write", "run").code in (0, 4)
    files = {path.name: path.read_text() for path in (tmp_path / "run").iterdir()}
    assert not any("Once upon a time" in text for text in files.values())
    assert 'TEMPLATE """{{ if .System }}<s>{{ .System }}</s>{{ end }}<u>' in files["Modelfile"]
    assert 'PARAMETER stop "<e>"' in files["Modelfile"]
    assert f"--chat-template {folder}/chat_template.jinja" in files["run_vllm.sh"]
    assert '"stop_token_ids": [5]' in files["run_vllm.sh"]
    assert "-cnv" in files["run_llama_cpp.sh"]
    assert "apply_chat_template" in files["run_transformers.py"]
    compile(files["run_transformers.py"], "script", "exec")
    # Trained on documents, with the base's template beside it.
    (folder / "training_record.json").write_text(json.dumps({"training": {"chat": None}}))
    assert run(folder, "--base", base, "--write", "plain").code in (0, 4)
    assert "TEMPLATE" not in (tmp_path / "plain" / "Modelfile").read_text()
    (folder / "training_record.json").write_text("{")
    assert run(folder, "--base", base, "--write", "again").code == 3
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_write_for_another_trainer_s_adapter_of_conversations(run, adapter, base, tmp_path, name):
    folder = shutil.copytree(adapter("plain"), tmp_path / "A")
    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = {"bos_token": "<s>", "eos_token": "<|end|>"}
    if name == "tokenizer_config.json":
        config["chat_template"] = template
    else:
        (folder / name).write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert run(folder, "--base", base, "--write", "run").code in (0, 4)
    modelfile = (tmp_path / "run" / "Modelfile").read_text()
    assert (
        'TEMPLATE """{{ if .System }}<|system|>{{ .System }}<|end|>{{ end }}<|user|>{{ .Prompt }}'
        '<|end|><|assistant|>{{ .Response }}<|end|>"""\nPARAMETER stop "<|end|>"\n'
    ) in modelfile
    assert "-cnv" in (tmp_path / "run" / "run_llama_cpp.sh").read_text()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('none') }}")
    assert run(folder, "--base", base, "--write", "again").code in (0, 4)
    modelfile = (tmp_path / "again" / "Modelfile").read_text()
    assert 'TEMPLATE "' not in modelfile and "not put in Ollama's language here" in modelfile


def test_the_commit_of_the_base_that_an_adapter_names_is_loaded(run, adapter, tmp_path):
    folder, commit = tmp_path / "A", "0123456789" * 4
    shutil.copytree(adapter("plain"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": commit}))
    assert run(folder, "--write", "run").code == 0
    assert (
        f"vllm serve org/tiny-llama --revision {commit}"
        in (tmp_path / "run" / "run_vllm.sh").read_text()
    )
    assert (
        f"loraformat convert org/tiny-llama@{commit} model.gguf"
        in (tmp_path / "run" / "run_llama_cpp.sh").read_text()
    )


def test_the_files_of_a_gguf_adapter_name_it(run, adapter, base, tmp_path):
    with pytest.raises(SystemExit):
        main(["convert", str(adapter("plain")), str(tmp_path / "a b.gguf"), "--base", str(base),
              "--quiet"])  # fmt: skip
    result = run("a b.gguf", "--base", base, "--write", "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "Modelfile", "run_llama_cpp.sh"
    }  # fmt: skip
    assert "note: no file for vllm: reads no gguf-lora" in result.out
    assert f"# ADAPTER {tmp_path}/a b.gguf" in (tmp_path / "run" / "Modelfile").read_text()
    assert f"'{tmp_path}/a b.gguf'" in (tmp_path / "run" / "run_llama_cpp.sh").read_text()


def test_the_commands_in_front_make_the_files_that_are_named(run, adapter, base, tmp_path):
    named = ["--runtime", "llama.cpp", "--runtime", "ollama"]
    run(adapter("rslora"), "--base", base, *named, "--fix", "-o", "f", "--write", "run")
    script = (tmp_path / "run" / "run_llama_cpp.sh").read_text()
    made = [line for line in script.splitlines() if line.startswith("loraformat ")]
    modelfile = (tmp_path / "run" / "Modelfile").read_text()
    made.append(modelfile.splitlines()[0].removeprefix("# "))
    assert len(made) == 3 and " merge " in made[2]
    for line in made:
        runner = line.replace("loraformat", f"{sys.executable} -m loraformat", 1)
        subprocess.run(runner, shell=True, check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "model.gguf").is_file()
    assert (tmp_path / "f.gguf").is_file()
    assert "\nFROM ./f-merged.gguf\n" in modelfile and (tmp_path / "f-merged.gguf").is_file()


def test_nothing_is_written_for_a_runtime_that_would_be_wrong(run, adapter, base, tmp_path):
    result = run(adapter("rslora"), "--base", base, "--write", "run", "--json")
    assert result.code == 4
    written = json.loads(result.out)["written"]
    assert {"run_vllm.sh", "run_llama_cpp.sh", "Modelfile"} <= set(written["files"])
    assert "run_sglang.sh" not in written["files"]
    assert any(
        "sglang: not supported correctly (RSLORA_IGNORED)" in line for line in written["left_out"]
    )


def test_write_wants_a_base_and_a_new_directory(run, adapter, base, tmp_path):
    shutil.copytree(adapter("plain"), tmp_path / "A")
    config = json.loads((tmp_path / "A" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "A" / "adapter_config.json").write_text(json.dumps(config))
    result = run("A", "--write", "run")
    assert result.code == 2
    assert "--base" in result.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert run("A", "--base", base, "--write", "run").code == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_named_runtime_of_another_format_is_right_after_the_command_it_names(
    run, adapter, base, tmp_path
):
    alone = run(adapter("plain"), "--runtime", "llama.cpp")
    assert (alone.code, "FORMAT" in alone.out) == (4, True)
    held = run(adapter("plain"), "--runtime", "llama.cpp", "--base", base, "--json")
    (finding,) = json.loads(held.out)["findings"]
    assert (held.code, finding["rule"], finding["level"]) == (0, "FORMAT", "warn")
    assert finding["command"].startswith("loraformat convert ")
