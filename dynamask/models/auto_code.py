"""What a saved model carries so that transformers opens it where dynamask is not imported.

A file of one import beside the configuration, named in its `auto_map`: programs that load models by name alone
(`lm_eval`, `transformers serve`) open it with `trust_remote_code=True`. Where dynamask is imported its own classes are
taken, and nobody is asked to trust anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FILE = "dynamask_auto.py"
"""Name of the file in a saved model's folder."""

_TEXT = '''"""Opens this model where dynamask is not imported; needs `pip install dynamask-attention`."""

from {module} import {names}

__all__ = {listed}
'''


class CarriesAutoCode:
    """Mixed in before a configuration: `save_pretrained` writes the file and names it."""

    auto_module: str
    """The module that has the classes."""

    def auto_classes(self) -> dict[str, str]:
        """Return the names of transformers' Auto classes -> those of this configuration's classes."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save the configuration, see transformers."""
        classes = self.auto_classes()
        self.auto_map = {auto: f"{Path(FILE).stem}.{name}" for auto, name in classes.items()}
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        names = sorted(set(classes.values()))
        text = _TEXT.format(module=self.auto_module, names=", ".join(names), listed=names)
        Path(save_directory, FILE).write_text(text, encoding="utf-8")
        return result

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy dynamask's source into every folder the model is saved to."""


class KeepsOwnCode:
    """Mixed in before a model."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing, see `CarriesAutoCode`."""
