"""The study `recurrent`: its forms differ in one layer, and its mixer is no mixer outside its runs."""

from __future__ import annotations

import importlib.util

import pytest

from dynamask.errors import InvalidInputError, UsageError
from dynamask.mixers import MIXERS
from dynamask_lab.language.engine import LanguageConfig, build_model
from dynamask_lab.studies import RECURRENT
from dynamask_lab.studies.recurrent.mixer import GDN, recurrent_mixer
from dynamask_lab.studies.recurrent.study import forms, recurrent_name


def test_forms_differ_in_one_layer_and_need_the_package() -> None:
    configs = RECURRENT.configs("probe")
    assert [recurrent_name(config) for config in configs] == 3 * list(forms())
    for config in configs[1:4]:
        assert config["layer_attention"].count(GDN) == 5
    assert GDN not in MIXERS
    with pytest.raises(InvalidInputError, match="gdn"):
        LanguageConfig.of(configs[0])
    if importlib.util.find_spec("fla") is None or importlib.util.find_spec("fla.layers") is None:
        with recurrent_mixer(), pytest.raises(UsageError, match="flash-linear-attention"):
            build_model(LanguageConfig.of(configs[0]), 100)
