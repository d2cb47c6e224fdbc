"""What a training will take: operations, memory of a GPU, time, and the command that starts it.

A step's time is modelled as the operations of its three kinds over the share of the GPU's peak that each reaches, and a
constant; where layers are not compiled, a step takes at least as long as its launches. The shares and the constants are
fitted to measured steps (`measured.json`, written by `lab/scripts/fit_plan.py`), of recomputed layers, and checked
against steps of one and two GPUs that they were not fitted to. Communication is modelled from bandwidths, as hidden
behind computation but for a share.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.errors import UsageError
from dynamask.models.configuration import DynamaskConfig
from dynamask.training.flops import causal_pairs
from dynamask.training.loss import MOST_LOGITS

MEASURED = Path(__file__).with_name("measured.json")
"""The fitted constants."""

PEAK_FLOPS = 989e12
"""Dense bfloat16 operations per second of an H100 (vendor's data sheet): the unit of the fitted shares."""

GPU_BYTES = 80e9
"""Memory of an H100."""

NODE_BYTES_PER_SECOND = 300e9
"""Bus bandwidth of collectives inside a node with NVLink, assumed."""

_COUNTED: dict[str, int] = {}
"""Parameters by configuration: building a large model takes a second even without weights."""

_EXPOSED = 0.1
"""Share of the communication that is assumed not to hide behind computation."""


@dataclass(frozen=True)
class Work:
    """Operations of one step on one GPU, recomputation included.

    Attributes:
        products: of the weights' matrix products, the output layer's among them.
        interval: of attention over kept keys.
        dense: of attention over all keys.
        learning: of the attention over all keys that ranks learn from.
        useful: of the step without recomputation and without what ranks learn from.
    """

    products: float
    interval: float
    dense: float
    learning: float
    useful: float


@dataclass(frozen=True)
class Plan:
    """A training, as it is expected to go.

    Attributes:
        parameters: of the model.
        flops: useful operations of the whole training.
        steps: optimizer steps.
        tokens_per_step: over all GPUs.
        memory: bytes of a GPU by what takes them; "peak" is what must fit.
        step_seconds: of one step; of these, `exposed_seconds` wait for communication.
        exposed_seconds: see above.
        days: of the whole training.
        share_of_peak: useful operations over the GPUs' peak.
        fits: whether "peak" is below the GPU's memory, less a tenth.
        error: the largest relative error of the model over the measured steps, those of two GPUs among them.
        measured: those steps, in words.
    """

    parameters: int
    flops: float
    steps: int
    tokens_per_step: int
    memory: dict[str, float]
    step_seconds: float
    exposed_seconds: float
    days: float
    share_of_peak: float
    fits: bool
    error: float
    measured: str


def parameters_of(config: DynamaskConfig) -> int:
    """Count the parameters of a model without making its weights."""
    import torch

    from dynamask.models import DynamaskForCausalLM

    key = config.to_json_string(use_diff=False)
    if key not in _COUNTED:
        with torch.device("meta"):
            _COUNTED[key] = sum(parameter.numel() for parameter in DynamaskForCausalLM(config).parameters())
    return _COUNTED[key]


def work_of(config: DynamaskConfig, context: int, *, sequences: int, recompute: bool, learns: bool) -> Work:
    """Count the operations of a step on one GPU.

    Args:
        config: of the model.
        context: tokens of a sequence.
        sequences: of the GPU's batch.
        recompute: whether layers are computed again in the backward pass.
        learns: whether learned ranks learn, from one of four sequences of a batch, at least one.
    """
    tokens = context * sequences
    embedding = config.vocab_size * config.hidden_size
    weights = 6.0 * (parameters_of(config) - embedding * (1 if config.tie_word_embeddings else 2) + embedding) * tokens
    ratio = config.num_attention_heads // config.num_key_value_heads
    interval = dense = 0.0
    for mixer, windows in zip(config.layer_mixers, config.head_windows, strict=True):
        full = mixer not in ("dma", "swa")
        pairs = sum(causal_pairs(context, None if full else window) for window in windows) * ratio
        if full or min(windows) >= context:
            dense += pairs
        else:
            interval += pairs
    per_pair = 12.0 * config.head_dim * sequences
    useful = weights + per_pair * (interval + dense)
    again = 4 / 3 if recompute else 1.0
    ranked = sum(mixer == "dma" for mixer in config.layer_mixers) if config.ranking == "learned" and learns else 0
    # Two passes over all pairs, a product of queries and keys each.
    learning = 4.0 * config.head_dim * causal_pairs(context) * config.num_attention_heads * ranked
    learning *= -(-sequences // 4) * (2 if recompute else 1)
    return Work(weights * again, per_pair * interval * again, per_pair * dense * again, learning, useful)


def plan(
    config: DynamaskConfig,
    *,
    gpus: int,
    tokens: float,
    context: int,
    sequences: int = 1,
    recompute: bool = True,
    compiled: bool = True,
    gpus_per_node: int = 8,
    network: float = 50e9,
) -> Plan:
    """Plan a training by FSDP2 over all GPUs.

    Args:
        config: of the model.
        gpus: how many.
        tokens: of the whole training.
        context: tokens of a sequence.
        sequences: a GPU's in each step.
        recompute: whether layers are computed again in the backward pass (gradient_checkpointing).
        compiled: whether layers are compiled; others are launched one operation at a time.
        gpus_per_node: how many share NVLink.
        network: bytes per second of one GPU between nodes.

    Raises:
        UsageError: numbers below 1, GPUs that are no whole number of nodes, or a context that the model is not made
            for.
    """
    for name, value in (("gpus", gpus), ("tokens", tokens), ("batch", sequences), ("gpus per node", gpus_per_node)):
        if not 1 <= value < float("inf"):
            raise UsageError(f"{name} must be at least 1, and finite; got {value}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UsageError(
            f"{gpus} GPUs are no whole number of nodes of {gpus_per_node}: give a multiple of gpus per node, or another"
        )
    if not 0 < network < float("inf"):
        raise UsageError(f"network must be above 0 bytes per second, and finite; got {network:g}")
    if not 2 <= context <= config.max_position_embeddings:
        raise UsageError(
            f"context must be from 2 to the model's max_position_embeddings={config.max_position_embeddings}; got "
            f"{context}: set model.max_position_embeddings={context} for a longer one"
        )
    constants: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    shares = constants["share_of_peak"]
    parameters = parameters_of(config)
    work = work_of(config, context, sequences=sequences, recompute=recompute, learns=True)
    computing = work.products / shares["products"] + work.interval / shares["interval_attention"]
    computing += work.dense / shares["dense_attention"] + work.learning / shares["learning"]
    computing = computing / PEAK_FLOPS + constants["seconds_per_step"]
    if not compiled:
        computing = max(computing, constants["launch_seconds_per_layer"] * config.num_hidden_layers)

    # Weights are gathered in bfloat16 forward and backward, gradients reduced in float32.
    moved = 8.0 * parameters * (gpus - 1) / gpus
    communicating = moved / (NODE_BYTES_PER_SECOND if gpus <= gpus_per_node else min(network, NODE_BYTES_PER_SECOND))
    exposed = max(communicating - computing, _EXPOSED * communicating)
    seconds = computing + exposed

    per_step = gpus * sequences * context
    steps = -(-int(tokens) // per_step)
    memory = _memory(config, parameters, gpus, context * sequences, recompute, constants)
    flops = work.useful / (sequences * context) * tokens
    return Plan(
        parameters=parameters,
        flops=flops,
        steps=steps,
        tokens_per_step=per_step,
        memory=memory,
        step_seconds=seconds,
        exposed_seconds=exposed,
        days=steps * seconds / 86400,
        share_of_peak=work.useful / seconds / PEAK_FLOPS,
        fits=memory["peak"] < 0.9 * GPU_BYTES,
        error=constants["largest_error"],
        measured=f"{constants['steps']} steps of the 1.7b preset on one {constants['device']} and checked against "
        f"{len(constants['checked'])} steps on one and two {constants['checked_device']}",
    )


def _memory(
    config: DynamaskConfig, parameters: int, gpus: int, tokens: int, recompute: bool, constants: dict[str, Any]
) -> dict[str, float]:
    """Bytes on one GPU: float32 weights, gradients and moments, split; activations; what is gathered for a layer."""
    width, layers = config.hidden_size, config.num_hidden_layers
    working = constants["working_bytes_per_token_and_width"] * width * tokens
    if recompute:
        kept = 4.0 * width * layers * tokens + working
    else:
        # Inputs of all products, of norms and of attention, and the parts of SwiGLU, in bfloat16.
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        kept = 2.0 * (6 * width + 3 * heads + 4 * config.intermediate_size) * layers * tokens + working
    state = {"weights": 4.0, "gradients": 4.0, "optimizer": 8.0}
    memory = {name: size * parameters / gpus for name, size in state.items()}
    embedding = config.vocab_size * width
    gathered = 0.0 if gpus == 1 else 2.0 * embedding + 2 * 2.0 * (parameters - embedding) / layers
    memory["buffers"] = constants["buffer_bytes_per_parameter"] * parameters  # of FSDP, the loss and the allocator
    memory |= {"activations": kept, "logits": 6.0 * min(MOST_LOGITS, config.vocab_size * tokens), "gathered": gathered}
    # The first logits are gone before all gradients are there.
    step = memory["weights"] + memory["optimizer"] + gathered + memory["buffers"]
    memory["peak"] = max(step + memory["gradients"], step + kept + max(memory["logits"], memory["gradients"] / 2))
    return memory


def launch_command(arguments: str, gpus: int, gpus_per_node: int = 8) -> str:
    """Return the command that starts a training.

    Args:
        arguments: settings of `dynamask train`.
        gpus: how many.
        gpus_per_node: how many a node has; more than that are started by Slurm.
    """
    if gpus == 1:
        return f"dynamask train {arguments}"
    if gpus <= gpus_per_node:
        return f"torchrun --standalone --nproc-per-node {gpus} -m dynamask train {arguments}"
    nodes = -(-gpus // gpus_per_node)
    return (
        f"srun --nodes {nodes} --ntasks-per-node 1 --gpus-per-node {gpus_per_node} torchrun --nnodes {nodes} "
        f"--nproc-per-node {gpus_per_node} --max-restarts 3 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID "
        f"--rdzv-endpoint $(scontrol show hostnames | head -n 1):29500 -m dynamask train {arguments}"
    )
