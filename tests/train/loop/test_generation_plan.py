"""What a run takes to write on from prompts is in its memory plan, and stays below it."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from loraformat.errors import InputError
from loraformat.train.run.memory_plan import advise
from loraformat.train.run.text_generation import generation_bytes
from tests.train.loop import tiny_runs
from tests.train.loop.test_plan import plan

ALONE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: Runs, and prints the plan beside the peaks of the process and of the one that renders templates.
MEASURED = """
import json, sys
from pathlib import Path
from loraformat.chat_templates import process as template_process
from loraformat.train.loop import memory
from loraformat.train.run.train import train
from tests.train.loop.tiny_runs import options
where, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
planned, written = {}, []
def announce(report):
    planned.update(report.plan.to_json())
def observe(event):
    written.extend([event] if "prompt" in event else [])
rows = str(where / changes.pop("rows"))
train(options(where / "bundle", rows, where / changes.pop("name"), eval=(rows,), steps=1,
              seq_len=64, activation_memory=0, prompt=("moon rain garden " * 500,), **changes),
      announce=announce, observe=observe)
number = template_process.shared().number
templates = 0
if number:
    status = Path(f"/proc/{number}/status").read_text()
    templates = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"plan": planned, "peak": memory.peak(), "templates": templates,
                  "samples": len(written)}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models that take more for a prompt than for a step: wide layers, wide heads."""
    where = tmp_path_factory.mktemp("prompts")
    sizes = {"hidden_size": 256, "max_position_embeddings": 4096}
    wide = {"intermediate_size": 4096, "num_hidden_layers": 2}
    heads = {"intermediate_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 4,
             "head_dim": 256}  # fmt: skip
    for name, changes in (("wide", wide), ("heads", heads)):
        (where / name).mkdir()
        tiny_runs.make_bundle(where / name, **sizes, **changes)
        rows = tiny_runs.write_rows(where / name / "rows.jsonl", 8)
        (where / name / "chats.jsonl").write_text("".join(map(_chat, rows.open())))
        (where / name / "template.jinja").write_text(TEMPLATE)
    return where


def _chat(line: str) -> str:
    row = json.loads(line)
    turns = [("user", row["prompt"]), ("assistant", row["completion"].strip())]
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"


def measured(start, where: Path, **changes):
    """Return what a run in a process of its own told."""
    process = start("-c", MEASURED, where, json.dumps(changes), env=ALONE, cwd=".")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_plan_bounds_a_run_that_writes_on_from_prompts(start, place):
    told = measured(start, place / "wide", name="out", rows="rows.jsonl")
    assert told["samples"] == 2
    plan = told["plan"]
    # Without what is counted for the prompt it would be exceeded.
    assert plan["total"] - plan["generation"] < told["peak"] < plan["total"] < 2 * told["peak"]


def test_the_plan_bounds_a_run_whose_prompts_a_template_writes(start, place):
    where = place / "heads"
    told = measured(
        start, where, name="chat", rows="chats.jsonl", chat_template=str(where / "template.jinja")
    )
    assert told["samples"] == 2 and told["templates"]
    plan, peak = told["plan"], told["peak"] + told["templates"]
    assert plan["templates"] and plan["total"] - plan["generation"] < peak < plan["total"]


_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 160, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_OWN = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 48},
    "falcon": {"alibi": False},
    "gpt2": {},
    "minicpm3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", _OWN)
def test_keys_and_values_that_classes_keep_are_counted(name):
    config = transformers.AutoConfig.for_model(name, **_SMALL, **_OWN[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        kept = model(torch.ones(1, 20, dtype=torch.int64), use_cache=True).past_key_values
    nbytes = sum(one.keys.nbytes + one.values.nbytes for one in kept.layers)
    one_more = generation_bytes(config, 1, 20) - generation_bytes(config, 1, 19)
    heads = config.num_attention_heads * max(
        getattr(config, name, None) or 16 for name in ("head_dim", "qk_head_dim")
    )
    assert 20 * (one_more - 2 * heads * 4) / 2 == nbytes


def test_scores_of_all_pairs_count_where_attention_computes_them():
    config = transformers.LlamaConfig(attn_implementation="eager")
    eager = generation_bytes(config, 1000, 1)
    config._attn_implementation = "sdpa"
    assert eager - generation_bytes(config, 1000, 1) == 32 * 1000**2 * 16 - 1000**2


def test_advice_is_to_leave_the_prompt_out():
    said = plan(generation=10**10, limit=10**10)
    advice = advise(said, length=64, rows=1, optimizer="sgd", states="memory", rank=1)
    assert advice == ["no --prompt saves about 10.0 GB"]
    assert said.parts["generation"] == 10**10


def test_a_prompt_without_room_is_refused_before_the_first_step(tmp_path, place):
    from loraformat.train.run.train import train

    rows = str(place / "wide" / "rows.jsonl")
    options = tiny_runs.options(
        place / "wide" / "bundle", rows, tmp_path / "out", eval=(rows,), prompt=("moon " * 5000,)
    )
    with pytest.raises(InputError, match="the model takes 4096"):
        train(options)
    assert not list(tmp_path.iterdir())
