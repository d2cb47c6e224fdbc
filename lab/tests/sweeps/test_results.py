"""The results file: what a kill can leave behind reads, what is not ours stays untouched."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from dynamask.errors import InvalidInputError, UsageError
from dynamask_lab.sweeps.results import Record, ResultsFile, read_results, run_key


def record(number: int, **result: object) -> Record:
    config = {"number": number, "seed": 0}
    return Record("toy", run_key("toy", config), config, 0, {"x": 1.0, **result}, 0.5, "cpu", {"torch": "2"}, None)


def written(path: Path, *records: Record) -> bytes:
    with ResultsFile(path) as file:
        for each in records:
            file.append(each)
    return path.read_bytes()


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    content = written(path, record(1), record(2))
    assert read_results(path) == [record(1), record(2)]
    assert content.count(b"\n") == 2
    with ResultsFile(path) as file:
        assert (file.records, file.dropped) == ([record(1), record(2)], 0)
    assert path.read_bytes() == content


def test_a_line_cut_anywhere_is_dropped_and_the_next_goes_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = written(path, record(1))
    whole = written(path, record(2))
    for cut in [*range(len(first) + 1, len(first) + 25), *range(len(first) + 25, len(whole), 17), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert read_results(path) == [record(1)]
        assert path.read_bytes() == whole[:cut], "reading alone changes nothing"
        with ResultsFile(path) as file:
            assert file.dropped == cut - len(first)
            file.append(record(2))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("zeros", [1, 40])
def test_blocks_that_a_power_cut_left_as_zeros_are_dropped(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "r.jsonl"
    first = written(path, record(1))
    whole = written(path, record(2))
    path.write_bytes(whole[:-zeros] + b"\0" * zeros)
    with ResultsFile(path) as file:
        assert file.records == [record(1)]
    assert path.read_bytes() == first
    path.write_bytes(first + b"\0" * 100)
    assert read_results(path) == [record(1)]


@pytest.mark.parametrize("text", ["# Notes", "# Notes\n", "{}\n", '{"experiment": "toy"}\n', "\n", '{"a": 1}\n{"exper'])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"line 1 of .*notes\.md is not a run's record"):
        ResultsFile(path)
    assert path.read_text() == text


def test_damage_before_the_last_line_is_named_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written(path, record(1), record(2), record(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(UsageError, match="line 2"):
        ResultsFile(path)


def test_two_sweeps_cannot_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "r.jsonl"
    with ResultsFile(path), pytest.raises(UsageError, match="another sweep"):
        ResultsFile(path)
    written(path, record(1))


def test_numbers_that_json_cannot_hold_are_none(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written(path, record(1, loss=float("nan"), parts=[{"a": float("inf")}, (1, 2)]))
    assert read_results(path)[0].result == {"x": 1.0, "loss": None, "parts": [{"a": None}, [1, 2]]}
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    before = written(path, record(1))
    really_write = os.write

    def full(descriptor: int, line: bytes) -> int:
        if len(line) < 100:
            raise OSError(28, "No space left on device")
        return really_write(descriptor, line[: len(line) - 50])

    with ResultsFile(path) as file:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UsageError, match="No space left"):
            file.append(record(2))
        assert file.records == [record(1)]
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write results to"):
        ResultsFile(tmp_path / "none" / "r.jsonl")
    assert read_results(tmp_path / "r.jsonl") == []


def test_the_key_is_the_settings_and_nothing_else() -> None:
    config = {"a": 1, "b": [0.1, None], "seed": 0}
    assert run_key("toy", config) == "853877ed3b288a5e"
    assert run_key("toy", dict(reversed(config.items()))) == run_key("toy", config)
    others = [{**config, "seed": 1}, {**config, "a": 2}, {**config, "b": [0.1, 0]}]
    assert len({run_key("toy", config), run_key("other", config), *(run_key("toy", o) for o in others)}) == 5


@pytest.mark.parametrize(
    "config",
    [{"a": (1, 2), "seed": 0}, {1: 2, "seed": 0}, {"a": float("nan"), "seed": 0}, {"a": {1}, "seed": 0}, {"a": 1},
     {"seed": True}, {"seed": 0.0}],
)  # fmt: skip
def test_a_config_that_is_not_plain_json_or_has_no_seed_is_refused(config: dict) -> None:
    with pytest.raises(InvalidInputError, match="a run's config"):
        run_key("toy", config)


def test_a_record_s_line_starts_as_the_torn_line_s_check_expects(tmp_path: Path) -> None:
    assert next(iter(dataclasses.asdict(record(1)))) == "experiment"
    assert written(tmp_path / "r.jsonl", record(1)).startswith(b'{"experiment": "toy"')
