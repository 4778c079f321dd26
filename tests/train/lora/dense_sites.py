"""Dense layers as sites, so that branches are held against PEFT without the engine."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from loraformat.train.lora.target_modules import TargetModule

ROWS_AT_ONCE = 5


def tiles_of(matrix):
    """Uneven tiles in one reused buffer, as the engine's are."""

    def tiles(expert):
        whole = matrix[expert] if matrix.dim() == 3 else matrix
        buffer = torch.empty(ROWS_AT_ONCE, whole.shape[1])
        for first in range(0, len(whole), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(whole))
            yield first, last, buffer[: last - first].copy_(whole[first:last])

    return tiles


def site_of(name, module, **options):
    """The site of a layer whose branch a forward hook calls."""
    holder = {}

    def attach(branch):
        holder["branch"] = branch
        module.register_forward_hook(lambda _, inputs, output: branch(inputs[0], output))

    weight = module.weight.detach()
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))  # Gemma's own
        options = {"kind": "embedding", "output_scale": scale, **options}
        shape = weight.shape
    elif isinstance(module, Conv1D):
        options["transposed"] = True
        weight = weight.T
        shape = weight.shape[::-1]
    else:
        shape = weight.shape[::-1]
    return TargetModule(
        name=name, in_features=shape[0], out_features=shape[1], tiles=tiles_of(weight),
        attach=attach, bias=getattr(module, "bias", None),
        **{"kind": "linear", **options},
    )  # fmt: skip


def sites_of(model):
    """Sites of a dense transformers model: linears, fused experts, embedding, head."""
    embedding, head, found = model.get_input_embeddings(), model.get_output_embeddings(), []
    for name, module in model.named_modules():
        if module is embedding:
            found.append(site_of(name, module))
        elif isinstance(module, (nn.Linear, Conv1D)):
            found.append(site_of(name, module, **({"kind": "head"} if module is head else {})))
        elif isinstance(module, MixtralExperts):
            found += expert_sites(name, module)
    return found


def expert_sites(name, module):
    """Sites of the two projections of fused experts, whose loop is written out here."""
    branches = {}

    def project(which, x, expert):
        y = functional.linear(x, getattr(module, which)[expert])
        return branches[which](x, y, expert) if which in branches else y

    def forward(hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for expert in range(module.num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            gate, up = project("gate_up_proj", hidden_states[tokens], expert).chunk(2, -1)
            y = project("down_proj", module.act_fn(gate) * up, expert)
            total = total.index_add(0, tokens, y * top_k_weights[tokens, slots, None])
        return total

    module.forward = forward
    return [
        plain_site(
            f"{name}.{which}", getattr(module, which).detach(),
            attach=partial(branches.__setitem__, which),
        )
        for which in ("gate_up_proj", "down_proj")
    ]  # fmt: skip


def plain_site(name, weight, **options):
    """A site of a weight that nothing computes with."""
    experts = {"kind": "experts", "experts": len(weight)} if weight.dim() == 3 else {}
    sizes = weight.shape[-2:] if options.get("kind") == "embedding" else weight.shape[:-3:-1]
    return TargetModule(
        name=name, in_features=sizes[0], out_features=sizes[1],
        tiles=tiles_of(weight),
        **{"kind": "linear", "attach": lambda branch: None, **experts, **options},
    )  # fmt: skip
