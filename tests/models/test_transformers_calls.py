"""Calls by transformers: caches by every name, static caches, checkpointing, label smoothing, offloaded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments

from dynamask import BoundedCache, DynamaskForCausalLM, InvalidInputError
from dynamask.models import new_cache
from dynamask.models.cache_argument import CACHE_NAME
from tests.conftest import VARIANTS, tiny_model, variant

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
FEW = ["dma", "dma-heads-paper", "swa-sinks", "dma-latent", "nsa"]


@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
@torch.no_grad()
def test_a_cache_is_taken_by_every_name_transformers_has_for_it(name: str) -> None:
    model = tiny_model("dma")
    expected = model(IDS, use_cache=False).logits
    cache = new_cache(model.config)
    for part, at in ((IDS[:, :9], slice(9)), (IDS[:, 9:], slice(9, None))):
        output = model(part, **{name: cache})
        torch.testing.assert_close(output.logits, expected[:, at])
    assert output.past_key_values is getattr(output, CACHE_NAME) is cache
    inner = model.model(IDS[:, :3], **{name: new_cache(model.config)})
    assert inner.past_key_values.get_seq_length() == 3
    with pytest.raises(InvalidInputError, match="give one cache"):
        model(IDS, past_key_values=cache, cache=new_cache(model.config))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["bounded", "dynamic", "static", "offloaded"])
def test_generates_from_every_kind_of_cache(name: str, kind: str) -> None:
    model = variant(name)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    options: dict = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(IDS, use_cache=False, **options)
    if kind == "bounded":
        if not all(type(layer.mixer).bounded for layer in model.model.layers):
            with pytest.raises(InvalidInputError, match="every past key"):
                BoundedCache(model.config)
            return
        options[CACHE_NAME] = BoundedCache(model.config)
    elif kind == "dynamic":
        options[CACHE_NAME] = DynamicCache()
    elif kind == "offloaded" and not torch.cuda.is_available():
        options["cache_implementation"] = "dynamic"
    else:
        options["cache_implementation"] = kind
    assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.filterwarnings("ignore")
def test_an_early_exit_drafts_with_fewer_layers() -> None:
    model = variant("dma-heads")
    calls = [0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    options: dict = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    assisted = model.generate(IDS[:1], assistant_early_exit=1, **options)
    assert calls[0] > calls[1]
    assert torch.equal(assisted, model.generate(IDS[:1], **options))


@pytest.mark.parametrize("name", ["dma", "dma-paper", "swa-sinks", "mha"])
@pytest.mark.parametrize("full", [True, False])
def test_gradient_checkpointing_behind_a_prefix_keeps_the_prefix(name: str, full: bool) -> None:
    model = variant(name).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        prefix = torch.linspace(-1, 1, 2 * 4 * 32).reshape(2, 4, 32).double().requires_grad_()
        cache = DynamicCache() if full else new_cache(model.config)
        model(inputs_embeds=prefix, past_key_values=cache, use_cache=True)
        loss = model(IDS, labels=IDS, past_key_values=cache).loss
        results.append((loss.detach(), torch.autograd.grad(loss, prefix)[0]))
    assert results[0][1].abs().sum() > 0
    torch.testing.assert_close(*results)


def test_generates_in_training_mode_with_gradient_checkpointing() -> None:
    model = tiny_model("dma")
    expected = model.generate(IDS, max_new_tokens=5, pad_token_id=0, do_sample=False)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, max_new_tokens=5, pad_token_id=0, do_sample=False), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_ranks_learn_under_gradient_checkpointing(reentrant: bool) -> None:
    gradients = []
    for kwargs in (None, {"use_reentrant": reentrant}):
        model = tiny_model("dma").train()
        if kwargs is not None:
            model.gradient_checkpointing_enable(kwargs)
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


class _OneStep(Trainer):
    """Shows the loss that a step is trained with."""

    losses: list[float]

    def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_shifts_labels(smoothing: float, tmp_path: Path) -> None:
    model = tiny_model("swa").float()
    with torch.no_grad():
        log_p = model(IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
    labels = IDS[:, 1:]
    nll, uniform = -log_p.gather(-1, labels[..., None]).mean(), -log_p.mean()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, label_smoothing_factor=smoothing, report_to=[], save_strategy="no", use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = _OneStep(model=model, args=arguments, train_dataset=rows)
    trainer.losses = []
    trainer.train()
    assert trainer.losses[0] == pytest.approx(float((1 - smoothing) * nll + smoothing * uniform), rel=1e-5)


@torch.no_grad()
def test_weights_on_disk_give_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for name in ("dma", "dma-paper", "swa", "mla", "nsa"):
        model = variant(name).float()
        model.save_pretrained(tmp_path / name)
        expected = model(IDS, use_cache=False).logits
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
        device_map |= {"model.norm": "cpu", "lm_head": "cpu"}
        loaded = DynamaskForCausalLM.from_pretrained(
            tmp_path / name, device_map=device_map, offload_folder=tmp_path / f"{name}-offload"
        )
        torch.testing.assert_close(loaded(IDS, use_cache=False).logits, expected)
        step = loaded(IDS, use_cache=True)
        parts = [loaded(part, past_key_values=new_cache(model.config)).logits for part in (IDS,)]
        torch.testing.assert_close(parts[0], expected)
        one = loaded(IDS[:, :1], **{CACHE_NAME: getattr(step, CACHE_NAME)}).logits
        whole = model(torch.cat([IDS, IDS[:, :1]], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(one, whole)


def test_every_variant_is_known() -> None:
    assert set(FEW) <= set(VARIANTS)


class _Opaque(torch.nn.Module):
    """A projection without a weight to read, as quantisers and adapters leave it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object) -> torch.Tensor:
        return self.inner(*args)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dma", "dma-paper", "swa", "mha", "mla", "nsa"])
def test_projections_are_called_and_never_read(name: str) -> None:
    model = variant(name)
    expected = model(IDS, use_cache=False).logits
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, key, _Opaque(child))
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
    cache = new_cache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in IDS.split([10, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_keys_without_ranks_are_refused() -> None:
    model, cache = tiny_model("dma"), DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 2, 5, 8).double(), torch.zeros(2, 2, 5, 8).double(), layer)  # as prefix tuning does
    with pytest.raises(InvalidInputError, match="keys that have no ranks"):
        model(IDS, past_key_values=cache)


@pytest.mark.parametrize("attention", ["dma", "swa", "mla"])
def test_continuous_batching_is_refused_before_the_first_token(attention: str) -> None:
    model = tiny_model(attention)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(InvalidInputError, match="cannot serve continuous batching"):
            call([[5, 6, 7]])


def test_a_cache_for_another_number_of_layers_is_refused_at_once() -> None:
    model, other = tiny_model(), tiny_model(num_hidden_layers=3)
    with pytest.raises(InvalidInputError, match=r"made for 3 layers and the model has \d"):
        model(torch.arange(6)[None], past_key_values=other._new_cache())
