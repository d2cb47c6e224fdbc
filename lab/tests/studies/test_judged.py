"""Windows and pairs beside a verdict: those that a run's training found, where it found some."""

from __future__ import annotations

from typing import Any

from dynamask_lab.studies import MQAR, Record, run_key
from dynamask_lab.studies.judged import found_windows, pairs_of, widest_of, window_share
from dynamask_lab.studies.mqar.report import report_mqar

FOUND = [[64, 64], [896, 1024]]


def _record(config: dict[str, Any], **result: Any) -> Record:
    return Record("mqar", run_key("mqar", config), config, config["seed"], result, 1.0, "a GPU", {}, None)


def test_windows_that_training_found_replace_the_configured_one() -> None:
    config = {"attention": "dma", "layers": 2, "window": 512, "length": 8192, "seed": 0}
    even, found = _record(config), _record(config, head_windows=FOUND)
    assert window_share(found_windows(even)) == "1/16"
    assert window_share(found_windows(found)).startswith("1/16 (widest head 1024 of 8192 keys: 23% of dense pairs")
    wider = _record(config, head_windows=[[64, 64], [320, 1600]])
    for runs in ([found, wider], [wider, found]):
        assert window_share(widest_of(runs)).startswith("1/16 (widest head 1600 of 8192 keys")
    assert pairs_of([even]) == "12%"
    assert pairs_of([even, found]) == "12%"
    assert pairs_of([_record({**config, "length": 2048}, head_windows=FOUND)]) == "39%"


def test_recall_names_pairs_at_the_shortest_texts_as_well(tmp_path: Any) -> None:
    config = next(config for config in MQAR.configs("published") if config["attention"] == "dma")
    config |= {"test": [[2048, 512, 100], [8192, 512, 100]]}
    slices = [{"length": length, "pairs": pairs, "accuracy": 0.5} for length, pairs, _ in config["test"]]
    result = {"accuracy": 0.5, "slices": slices, "epochs": 1, "head_windows": FOUND}
    setting = next(iter(report_mqar([_record(config, **result)], tmp_path).findings)).setting
    assert setting["task"] == "512 pairs in 8192 tokens"
    assert setting["pairs"] == "12% (39% at 2048 tokens)"
    assert "widest head 1024 of 8192" in setting["w/N"]
