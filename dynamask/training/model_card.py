"""The model card of a trained model: what it is, how to load it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dynamask.hub import is_hub_name
from dynamask.training.config import TrainConfig

USE = (
    "```python",
    "import dynamask  # registers the architecture",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("path/or/name")',
    'tokenizer = AutoTokenizer.from_pretrained("path/or/name")',
    "```",
    "",
    "`pip install dynamask-attention` provides the import. The checkpoint cannot be exported to GGUF or ONNX: these",
    "formats have no operator whose keys expire.",
    "",
)
"""How to load a model of dynamask, in lines of Markdown."""


def card_head(base: str | None, *, sparse: bool = True) -> list[str]:
    """Return the head of a model card: what the hub reads, and an empty line.

    Args:
        base: name on the hub of the model that it was made from; None: none that others can find.
        sparse: whether attention runs on dynamask.
    """
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([] if base is None else [f"base_model: {base}"]),
        "tags: [dynamask, sparse-attention, long-context]" if sparse else "tags: [dynamask]",
        "---",
        "",
    ]


def trained_card(settings: TrainConfig, model: Any, loss: float) -> str:
    """Return the model card of a model that `dynamask train` trained, in Markdown.

    Args:
        settings: of the run.
        model: the trained model.
        loss: on held-out text, in nats per token; with a teacher, the divergence from it.
    """
    config = model.config
    sparse = hasattr(config, "head_windows")  # a dense model of transformers can be trained as well
    budget = config.budget if sparse else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = settings.steps * settings.batch_size * settings.gradient_accumulation * (settings.context or 0)
    facts = [
        ("parameters", f"{parameters / 1e6:.1f} M"),
        ("layers, heads, key/value heads", _shape(config)),
        ("attention", _attention(config)),
        ("budget: mean window of a key/value head", "none" if budget is None else f"{budget:.0f} keys"),
        ("data", ", ".join(_data(settings.data))),
        ("context", f"{settings.context} tokens"),
        ("training", f"{settings.steps} steps, about {tokens / 1e6:.1f} M tokens of one process"),
        (
            "loss on held-out text" if settings.teacher is None else "divergence from the teacher on held-out text",
            f"{loss:.3f} nats per token",
        ),
    ]
    start = settings.init
    return "\n".join(
        [
            *card_head(start if start is not None and is_hub_name(start) else None, sparse=sparse),
            "# A model trained by dynamask",
            "",
            *(USE if sparse else ()),
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in facts),
            "",
            *(_settings(config) if sparse else ()),
            "What it is for, and what it must not be used for: not said yet.",
            "",
        ]
    )


def _settings(config: Any) -> list[str]:
    fields = {name: getattr(config, name, None) for name in ("windows", "local", "sinks", "ranking")}
    return ["Settings of the attention:", "", "```json", json.dumps(fields), "```", ""]


def _shape(config: Any) -> str:
    return f"{config.num_hidden_layers}, {config.num_attention_heads}, {config.num_key_value_heads}"


def _attention(config: Any) -> str:
    names = getattr(config, "layer_mixers", None)
    return str(config.model_type) if names is None else ", ".join(dict.fromkeys(names))


def _data(sources: str | Sequence[str]) -> list[str]:
    """The sources that others can find; paths of one machine are left out."""
    listed = [sources] if isinstance(sources, str) else list(sources)
    public = [source for source in listed if source == "stdlib" or is_hub_name(source)]
    return public + (["local files"] if len(public) < len(listed) else [])
