"""What each process of a group checks: a model on its shard against the model on the whole sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from dynamask import DynamaskConfig, DynamaskForCausalLM
from dynamask.convert import upcycle
from dynamask.convert.models import set_slopes, set_windows
from dynamask.errors import InvalidInputError
from dynamask.mixers import DynamicMaskGate, RankPredictor
from dynamask.ops.context_parallel import context_parallel, split_sequence

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
SHAPE: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def native(**fields: Any) -> Any:
    config = DynamaskConfig(**SHAPE, **HEADS, head_dim=8, **fields)
    return _scrambled(DynamaskForCausalLM(config))


def llama() -> Any:
    dense = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, initializer_range=0.3))
    model = upcycle(dense, 8, local=3, sinks=1)
    set_windows(model, [[8, 13], [5, 40]])
    set_slopes(model, [[0.05, 0.0], [0.0, 0.1]])
    return _scrambled(model)


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, **HEADS, head_dim=8, layer_types=kinds, sliding_window=6, initializer_range=0.3)
    return _scrambled(upcycle(Gemma3ForCausalLM(config), 9, local=2, sinks=2))


def _scrambled(model: Any) -> Any:
    """Ranks that differ, large weights, float64."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            module.down.weight.data.normal_(0, 1, generator=generator)
        if isinstance(module, DynamicMaskGate):
            for parameter in module.parameters():
                parameter.data.normal_(0, 1, generator=generator)
    model.config.trained_ranks = True
    return model.double().train()


MODELS = {
    "learned": lambda: native(windows=[[6, 11], 9], local=2, sinks=1),
    "paper": lambda: native(windows=7, ranking="paper", local=0, sinks=0),
    "swa": lambda: native(attention="swa", windows=8, sinks=2, local=0),
    "llama": llama,
    "gemma": gemma,
}


def agrees(name: str, packed: bool, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.randint(0, 61, (2, 45), generator=torch.Generator().manual_seed(2))
    positions = None
    if packed:
        positions = torch.cat([torch.arange(n) for n in (9, 6, 22, 8)]).expand(2, 45)
    alone = copy.deepcopy(model)
    given: dict[str, Tensor] = {} if positions is None else {"position_ids": positions}
    labels = tokens if positions is None else tokens.masked_fill(positions == 0, -100)
    whole = alone(input_ids=tokens, labels=labels, use_cache=False, **given)
    goal = F.pad(labels[:, 1:], (0, 1), value=-100)
    count = (goal != -100).sum()
    weight = getattr(model.config, "rank_loss_weight", 0.1)
    ranks = getattr(whole, "aux_loss", None)
    assert (ranks is not None) == (name in ("learned", "llama", "gemma"))
    loss = F.cross_entropy(whole.logits.transpose(1, 2), goal, reduction="sum") / count
    (loss if ranks is None else loss + weight * ranks).backward()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = split_sequence(mesh, tokens, position_ids=positions)
    with context_parallel(mesh):
        part = model(**batch)
    start = 45 * dist.get_rank() // dist.get_world_size()
    own = slice(start, start + part.logits.shape[1])
    allowed = {"rtol": 1e-4, "atol": 1e-6} if name == "gemma" else CLOSE  # whose norms compute in float32
    torch.testing.assert_close(part.logits, whole.logits.detach()[:, own], **allowed)
    assert batch["num_items_in_batch"] == count
    loss = F.cross_entropy(part.logits.transpose(1, 2), batch["shift_labels"], reduction="sum") / count
    if ranks is not None:
        torch.testing.assert_close(part.aux_loss, ranks.detach(), rtol=1e-6, atol=1e-6)
        loss = loss + weight * part.aux_loss * (batch["shift_labels"] != -100).sum() / count
    loss.backward()
    total = part.loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    for (key, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        if ours.grad is not None:
            dist.all_reduce(ours.grad)
            torch.testing.assert_close(ours.grad, theirs.grad, **allowed, msg=lambda m, n=key: f"{name} {n}: {m}")


def refusals() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with context_parallel(mesh):
        for model in (native(windows=4, local=0, sinks=0), llama()):
            with pytest.raises(InvalidInputError, match="leaves no cache"):
                model(input_ids=tokens, use_cache=True)
            with pytest.raises(InvalidInputError, match="padding"):
                model(input_ids=tokens, attention_mask=torch.tensor([[0] + [1] * 7]))
        with pytest.raises(InvalidInputError, match="serves dma and swa"):
            native(attention="mha")(input_ids=tokens)
        dense = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, attn_implementation="dynamask"))
        with pytest.raises(InvalidInputError, match="keys of other processes"):
            dense(input_ids=tokens)
        with pytest.raises(InvalidInputError, match="call the causal LM"):
            llama().model(input_ids=tokens)
    with pytest.raises(InvalidInputError, match="cannot be split over"):
        split_sequence(mesh, tokens[:, : dist.get_world_size() - 1])


def grid() -> None:
    """Two sequences, each over two processes, and FSDP2 over all four."""
    torch.manual_seed(0)
    model = native(windows=7, ranking="paper", local=0, sinks=0)
    alone = copy.deepcopy(model)
    tokens = torch.randint(0, 61, (2, 45), generator=torch.Generator().manual_seed(2))
    count = 2 * 44
    logits = alone(input_ids=tokens, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="sum").div(count).backward()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    everyone = init_device_mesh("cpu", (4,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    row = mesh.get_local_rank("data")
    batch = split_sequence(mesh["context"], tokens[row : row + 1])
    with context_parallel(mesh["context"]):
        part = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    loss = F.cross_entropy(part.logits.transpose(1, 2), batch["shift_labels"], reduction="sum") / count
    (loss * 4).backward()  # FSDP averages over all processes what they must sum
    for (key, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        found: Any = ours.grad
        torch.testing.assert_close(found.full_tensor(), theirs.grad, **CLOSE, msg=lambda m, n=key: f"{n}: {m}")


def short() -> None:
    agrees("learned", packed=True, checkpointing=False)
    agrees("llama", packed=False, checkpointing=False)
    refusals()


def everything() -> None:
    for name in MODELS:
        for packed in (False, True):
            agrees(name, packed, checkpointing=packed)
    refusals()
