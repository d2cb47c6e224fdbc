"""Other ways to bound a dense model's cache, through kvpress 0.5.5, on the transformers that dynamask runs on.

kvpress wants transformers < 5.3. Its presses need little of it: modules that only its other parts import are replaced
by empty ones, and the position of the prefill, which newer attention modules no longer receive, goes to its hook.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamask.errors import UsageError

PEERS = ("streaming_llm", "snapkv", "tova", "expected_attention", "keydiff", "ada_snapkv", "ada_expected_attention")
_UNUSED = {
    "cachetools": ("LRUCache", "cached"),
    "datasets": ("load_dataset",),
    "fire": ("Fire",),
    "pandas": (),
    "peft": (),
    "requests": ("get",),
}


def _missing(*_: Any, **__: Any) -> Any:
    return lambda function: function


def load() -> Any:
    """Import kvpress.

    Raises:
        UsageError: it is not installed.
    """
    if "kvpress" in sys.modules:
        return sys.modules["kvpress"]
    stand_ins = []
    for name, members in _UNUSED.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            stand_ins.append(name)
            module = types.ModuleType(name)
            for member in members:
                setattr(module, member, _missing)
            sys.modules[name] = module
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress
    except ImportError as error:
        raise UsageError(f"kvpress cannot be imported ({error}): pip install --no-deps kvpress==0.5.5") from error
    finally:
        for name in stand_ins:  # others may look for the real module, and must not find this one
            del sys.modules[name]
    from kvpress.presses import base_press

    for name, function in functions.items():  # it wraps every attention function, in a way that fits dense ones alone
        if name.startswith("dynamask"):
            ALL_ATTENTION_FUNCTIONS[name] = function
    original = base_press.BasePress.forward_hook

    def forward_hook(self: Any, module: Any, given: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if "cache_position" not in kwargs:  # transformers before 5.3 passed it
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            length, new = layer.keys.shape[2], kwargs["hidden_states"].shape[1]
            kwargs = {**kwargs, "cache_position": torch.arange(length - new, length)}
        return original(self, module, given, kwargs, output)

    base_press.BasePress.forward_hook = forward_hook
    return kvpress


def press(name: str, keep: int, length: int) -> Any:
    """The press of that name, set so that `keep` of `length` positions stay in each KV head, on the mean for ada_*."""
    kvpress = load()
    # The presses keep int(length * (1 - ratio)): a small surplus keeps the rounding from losing a position.
    ratio = max(0.0, 1.0 - (min(keep, length) + 0.5) / length)
    if name.startswith("ada_"):
        return kvpress.AdaKVPress(_plain(kvpress, name.removeprefix("ada_"), ratio))
    return _plain(kvpress, name, ratio)


def _plain(kvpress: Any, name: str, ratio: float) -> Any:
    makers = {
        "streaming_llm": kvpress.StreamingLLMPress,
        "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress,
        "expected_attention": kvpress.ExpectedAttentionPress,
        "keydiff": kvpress.KeyDiffPress,
    }
    return makers[name](compression_ratio=ratio)


def compressing(model: Any, name: str, keep: int) -> Callable[[int], AbstractContextManager[Any]]:
    """What `Form.compress` takes: the press is active while a context is read, before any question is known."""

    @contextmanager
    def active(length: int) -> Any:
        if length <= keep:
            yield None
            return
        with press(name, keep, length)(model) as found:
            yield found

    return active
