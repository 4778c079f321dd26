"""Words, names and globs to modules; what means nothing is refused with the nearest named."""

import pytest
import torch
from dense_sites import plain_site

from loraformat.errors import UsageError
from loraformat.train import LoraOptions
from loraformat.train.lora.target_modules import resolve

LAYERS = (
    "self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.gate",
)  # fmt: skip


@pytest.fixture(scope="module")
def sites():
    weight = torch.ones(2, 2)
    names = [f"model.layers.{n}.{name}" for n in (0, 1, 11) for name in LAYERS]
    stack = plain_site("model.layers.11.mlp.experts.down_proj", torch.ones(3, 2, 2))
    return [
        plain_site("model.embed_tokens", weight, kind="embedding"),
        *(plain_site(name, weight) for name in names),
        stack,
        plain_site("lm_head", weight, kind="head"),
    ]


def chosen(sites, *targets, **options):
    return list(resolve(sites, LoraOptions(targets=targets, **options)))


def test_all_linear_is_every_linear_of_the_layers_but_no_router_head_or_embedding(sites):
    found = chosen(sites, "all-linear")
    assert len(found) == 3 * 4 + 1
    assert "model.layers.11.mlp.experts.down_proj" in found
    assert not {name for name in found if name.endswith((".gate", "lm_head", "embed_tokens"))}


def test_attention_and_mlp_are_all_linear_in_two_parts(sites):
    attention, mlp = chosen(sites, "attention"), chosen(sites, "mlp")
    assert len(attention) == 6 and not set(attention) & set(mlp)
    assert sorted(attention + mlp) == sorted(chosen(sites, "all-linear"))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"),
        ("falcon", "transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_h_to_4h"),
        ("opt", "model.decoder.layers.0.self_attn.k_proj", "model.decoder.layers.0.fc1"),
        ("mixtral", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_groups_know_the_words_of_other_families(family, attention, mlp):
    sites = [plain_site(attention, torch.ones(2, 2)), plain_site(mlp, torch.ones(2, 2))]
    assert chosen(sites, "attention") == [attention]
    assert chosen(sites, "mlp") == [mlp]


def test_names_last_parts_and_globs(sites):
    assert chosen(sites, "model.layers.1.mlp.gate") == ["model.layers.1.mlp.gate"]
    assert chosen(sites, "mlp.gate") == [f"model.layers.{n}.mlp.gate" for n in (0, 1, 11)]
    assert chosen(sites, "layers.1?.*_proj") == chosen(sites, "model.layers.11.*_proj")
    assert chosen(sites, "v_proj", "q_proj")[0].endswith("q_proj")  # in the model's order


def test_embeddings_and_head_come_on_request_or_by_name(sites):
    assert chosen(sites, "q_proj", embeddings=True, head=True)[0] == "model.embed_tokens"
    assert chosen(sites, "lm_head") == ["lm_head"]
    bare = [site for site in sites if site.kind == "linear"]
    with pytest.raises(UsageError, match="no head"):
        chosen(bare, "q_proj", head=True)


def test_what_means_nothing_is_refused_with_the_nearest_named(sites):
    with pytest.raises(UsageError, match=r"q_prj is not a module.*nearest is q_proj"):
        chosen(sites, "q_proj", "q_prj")
    with pytest.raises(UsageError, match="nearest is all-linear"):
        chosen(sites, "all_linear")
    with pytest.raises(UsageError, match=r"nearest is model\.layers\.1\.mlp\.gate"):
        chosen(sites, "model.layers.2.mlp.gat")
    with pytest.raises(UsageError, match="proj is not a module"):
        chosen(sites, "proj")  # a part of a name is not its last part


def test_ranks_by_pattern_the_last_one_wins(sites):
    ranks = {"*_proj": 4, "layers.1.mlp.*": 2}
    found = resolve(sites, LoraOptions(rank=8, ranks=ranks, head=True))
    assert found["model.layers.0.mlp.down_proj"] == 4
    assert found["model.layers.1.mlp.down_proj"] == 2
    assert found["lm_head"] == 8
    with pytest.raises(UsageError, match=r"rank of k_proj is of no module.*nearest"):
        resolve(sites, LoraOptions(ranks={"k_proj": 2}))


def test_a_router_is_trained_if_it_is_named_and_by_no_glob():
    router = plain_site("model.layers.0.mlp.gate.weight", torch.ones(2, 2), kind="parameter")
    sites = [plain_site("model.layers.0.mlp.up_proj", torch.ones(2, 2)), router]
    assert chosen(sites, "gate.weight") == [router.name]
    assert chosen(sites, "all-linear") == chosen(sites, "*.mlp.*") == [sites[0].name]


def test_what_peft_refuses_is_left_out_and_refused_if_it_is_named():
    refused = plain_site("model.layers.0.mixer.out_proj", torch.ones(2, 2), in_peft="refused")
    sites = [plain_site("model.layers.0.mixer.in_proj", torch.ones(2, 2)), refused]
    assert chosen(sites, "all-linear") == [sites[0].name]
    with pytest.raises(UsageError, match=r"out_proj.*omit it"):
        chosen(sites, "out_proj")


def test_linears_beside_the_layers_are_trained_if_they_are_named():
    beside = plain_site("model.mixer.proj", torch.ones(2, 2), in_layers=False)
    sites = [plain_site("model.layers.0.mlp.up_proj", torch.ones(2, 2)), beside]
    assert chosen(sites, "all-linear") == [sites[0].name]
    assert chosen(sites, "proj") == [beside.name]
