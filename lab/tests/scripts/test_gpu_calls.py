"""The scripts that a lent machine is called by run in a fresh shell, as they lie in the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from queue_gpu import jobs_of

SCRIPTS = Path(__file__).parents[2] / "scripts"
_NOTED = """#!/bin/sh
echo "$CUDA_VISIBLE_DEVICES|$DYNAMASK_CORPORA|$PWD|$*" >>"$(dirname "$0")/calls"
case "$*" in *--name\\ long*) mkdir -p corpora/long; echo '{}' >corpora/long/index.json ;; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of the scripts alone, a folder of tables, and a python3 that writes down how it is called."""
    tree = tmp_path / "tree"
    (tree / "dynamask").mkdir(parents=True)
    (tree / "lab" / "results").mkdir(parents=True)
    shutil.copytree(SCRIPTS, tree / "lab" / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "lab" / "results" / "mqar-none.jsonl").touch()
    (tree / "pyproject.toml").touch()
    (tree / ".tables").mkdir()
    (tree / ".tables" / "linux.jsonl.xz").touch()
    (tmp_path / "bin").mkdir()
    for name in ("python3", "nvidia-smi"):
        (tmp_path / "bin" / name).write_text(_NOTED)
        (tmp_path / "bin" / name).chmod(0o755)
    return tree


def _called(tree: Path, command: str, calls: int, **environment: str) -> list[str]:
    """Run a command in the tree in a fresh environment; the calls of python3 that follow, in order of their text."""
    place = tree.parent
    fresh = {"PATH": f"{place / 'bin'}:{os.defpath}:/usr/bin:/bin", "HOME": str(place), **environment}
    done = subprocess.run(["bash", "-c", command], cwd=tree, env=fresh, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    noted = place / "bin" / "calls"
    for _ in range(100):
        lines = noted.read_text().splitlines() if noted.exists() else []
        if len(lines) >= calls:
            break
        time.sleep(0.1)
    for log in [*place.rglob("log-*.txt"), *place.rglob("jobs-*.txt")]:
        assert not re.search(r"unbound variable|command not found|syntax error|No such file", log.read_text()), log
    return sorted(lines)


def test_queues_start_on_every_card_with_their_corpora(tree: Path) -> None:
    work, out = tree.parent / "work", tree.parent / "out"
    lines = _called(
        tree,
        "bash lab/scripts/evidence_call.sh queues .tables 9 2 3:5",
        4,
        EVIDENCE_WORK=str(work),
        EVIDENCE_OUT=str(out),
        EVIDENCE_AFTER=str(work / "free"),
    )
    assert [line.split("|")[:3] for line in lines] == [
        ["2", f"{work}/corpora", str(work)],
        ["3", f"{work}/corpora", str(work)],
        *[["", f"{work}/corpora", str(work)]] * 2,
    ]
    first, second = (line.split("|")[3] for line in lines[:2])
    shared = f"--claims {work}/claims --seconds 9"
    assert (
        f"--out {out} --name 2 {shared} --wait 0 --after {work}/free-2 --workers 7 --known lab/results/mqar-none.jsonl"
        in first
    )
    assert f"--out {out} --name 3 {shared} --wait 5 --after {work}/free-3 " in second
    assert "--prepare 6 -- mqar:patient" in first
    assert "--prepare 0 -- mqar:patient" in second
    assert jobs_of(first.partition(" -- ")[2].split(), []) == jobs_of(second.partition(" -- ")[2].split(), [])


def test_queues_without_tables_take_the_jobs_that_are_given(tree: Path) -> None:
    command, work = "bash lab/scripts/evidence_call.sh queues - 9 0", str(tree.parent / "work")
    (line,) = _called(tree, command, 1, EVIDENCE_JOBS="mqar:smoke needle:smoke", EVIDENCE_WORK=work)
    assert line.endswith("-- mqar:smoke needle:smoke")


def test_jobs_start_side_by_side_and_one_after_the_other(tree: Path) -> None:
    lines = _called(
        tree,
        "bash lab/scripts/evidence_call.sh start .tables 40 mqar:patient:2:0:9,needle:levers:3 ablation:leak-decide:2",
        4,
        EVIDENCE_WORK=str(tree.parent / "work"),
    )
    told = [line.split("|")[3] for line in lines]
    assert [" ".join(each.split()[:3]) for each in sorted(told)] == [
        "lab/scripts/local_corpus.py corpora --more",
        "lab/scripts/sweep_gpu.py ablation leak-decide",
        "lab/scripts/sweep_gpu.py mqar patient",
        "lab/scripts/sweep_gpu.py needle levers",
    ]


def test_a_sweep_from_scratch_starts_from_a_copy_with_its_tables(tree: Path) -> None:
    work = tree.parent / "work"
    command = "bash lab/scripts/scratch_call.sh start .tables 90 --size 10M-tables --parts 56"
    (line,) = _called(tree, command, 1, SCRATCH_WORK=str(work))
    given = "--corpora corpora --more ./linux.jsonl.xz --state state --out scratch.jsonl --seconds 90"
    assert line == f"||{work}|lab/scripts/scratch_gpu.py {given} --size 10M-tables --parts 56"
    assert (work / "dynamask").is_dir()


@pytest.mark.parametrize(("size", "processes"), [("20m", 28), ("60m", 24)])
def test_a_folder_becomes_a_part_of_a_large_corpus(tree: Path, size: str, processes: int) -> None:
    work = tree.parent / "work"
    command = f"bash lab/scripts/scratch_{size}.sh add .tables b"
    (line,) = _called(tree, command, 1, SCRATCH_WORK=str(work))
    expected = (
        f"part chunks b --tokenizer tokenizer --processes {processes} --archives --tables {work}/in-b/linux.jsonl.xz"
    )
    assert line == f"||{work}|lab/scripts/parallel_corpus.py {expected}"


_TRAINED = """#!/bin/bash
echo "$CUDA_VISIBLE_DEVICES|$DYNAMASK_PROCESSES|$*" >>"$(dirname "$0")/calls"
[ "$1" = -c ] && echo 1198000000 && exit
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then echo '{}' >"$2"; fi
    shift
done
"""


@pytest.mark.parametrize("cards", [2, 4])
def test_large_models_train_then_give_their_cards_to_others(tree: Path, cards: int) -> None:
    work, out = tree.parent / "work", tree.parent / "out"
    (tree.parent / "bin" / "python3").write_text(_TRAINED)
    (tree / ".tables" / "tokenizer").mkdir()
    (tree / ".tables" / "warm.jsonl.xz").touch()
    begin = f'bash lab/scripts/scratch_60m.sh begin .tables p 90 {out} "p"'
    lines = _called(tree, begin, 12 + cards // 2, SCRATCH_WORK=str(work), SCRATCH_CARDS=str(cards))
    trained = [line.split(" --state")[0] for line in lines if "--corpora corpora " in line]
    at = "|lab/scripts/scratch_gpu.py --corpora corpora --size"
    dense, scored, size = ("0,1|2", "2,3|2", "60M-tables") if cards == 4 else ("0|1", "1|1", "45M-tables")
    expected = [
        f"{dense}{at} {size} --only =dense, half rate=",
        f"0|{at} 10M-choice --only =scored, half rate, one wide",
        f"1|{at} 10M-choice --only =scored, no choice, half rate, one wide",
        f"{scored}{at} {size} --only =scored, half rate, one wide",
    ]
    assert trained == sorted(expected)
    for _ in range(50):
        free = sorted(file.name for file in work.glob("free-*"))
        if len(free) == cards:
            break
        time.sleep(0.1)
    assert free == [f"free-{card}" for card in range(cards)]


def test_the_ceiling_starts_when_the_last_part_has_come(tree: Path) -> None:
    for number in (0, 1, 2):
        (tree / f".part{number}").mkdir()
        (tree / f".part{number}" / f"smollm2.part{number}").write_text(str(number))
    for name in ("config.json", "chat_template.jinja"):
        (tree / ".part2" / name).touch()
    subprocess.run(["tar", "-cf", tree / ".part2" / "data.tar.xz", "-C", tree, "pyproject.toml"], check=True)
    work, out = tree.parent / "work", tree.parent / "out"
    keep = "bash lab/scripts/ceiling_call.sh keep"
    run = f"bash lab/scripts/ceiling_call.sh run .part2 2 90 {out}"
    lines = _called(tree, f"{keep} .part0 && {keep} .part1 && {run}", 2, CEILING_WORK=str(work))
    joined, study = (line.split("|")[3] for line in sorted(lines, key=lambda line: "join.py" not in line))
    assert joined == f"{work}/.part2/join.py model.gguf model"
    assert study.startswith("-m dynamask_lab.studies.ceiling.study --model model --data data")
    assert (work / "model.gguf").read_text() == "012"
    assert (work / "data" / "pyproject.toml").exists()


@pytest.mark.slow
def test_a_queue_ends_its_runs_on_a_cpu(tmp_path: Path) -> None:
    root, out = SCRIPTS.parents[1], tmp_path / "out"
    fresh = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}:/usr/bin:/bin", "HOME": str(tmp_path)}
    fresh |= {"EVIDENCE_WORK": str(tmp_path / "work"), "EVIDENCE_OUT": str(out), "EVIDENCE_WORKERS": "1"}
    fresh |= {"EVIDENCE_PREPARE": "0", "EVIDENCE_JOBS": "mqar:smoke:0:2", "DYNAMASK_COMMIT": "test"}
    command = ["bash", "lab/scripts/evidence_call.sh", "queues", "-", "150", "0"]
    done = subprocess.run(command, cwd=root, env=fresh, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    lines = out / "queue-0-0.jsonl"
    for _ in range(150):
        if lines.exists() and len(lines.read_text().splitlines()) == 2:
            break
        time.sleep(1)
    assert len(lines.read_text().splitlines()) == 2
