import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from queue_gpu import Claims, jobs_of, kinds_of, ready


def test_jobs_of_a_size_leave_out_known_runs_but_with_a_plus(tmp_path: Path) -> None:
    every = jobs_of(["mqar:smoke"], [])
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"key": every[0].key}) + "\n" + json.dumps({"study": "ceiling"}) + "\n")
    assert [job.key for job in jobs_of(["mqar:smoke"], [known])] == [job.key for job in every[1:]]
    assert [job.key for job in jobs_of(["mqar:smoke+:0:2@7"], [known])] == [job.key for job in every[:2]]
    assert {job.seconds for job in jobs_of(["mqar:smoke:1:2@7"], [])} == {7.0}


def test_jobs_of_repeats_a_cell_by_the_settings_of_its_line(tmp_path: Path) -> None:
    (job, *_) = jobs_of(["mqar:smoke"], [])
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"experiment": "mqar", "key": job.key, "config": job.config}) + "\n")
    (again,) = jobs_of([f"{lines}:{job.key[:8]}@9"], [lines])
    assert (again.key, again.config, again.seconds) == (job.key, job.config, 9.0)
    with pytest.raises(SystemExit, match="no line"):
        jobs_of([f"{lines}:ffffffff"], [])
    with pytest.raises(SystemExit, match="not a job"):
        jobs_of(["mqar"], [])


def test_runs_are_taken_once_in_their_order_if_they_fit_and_their_corpus_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMASK_CORPORA", str(tmp_path))
    jobs = jobs_of(["ablation:leak-decide:0:1@50~ab", "mqar:smoke:0:2@100", "mqar:smoke:2:1@10"], [])
    kinds = kinds_of(jobs)
    ours, others = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert not ready(jobs[0])
    assert ours.next(jobs, 200.0, kinds) == jobs[1]
    assert others.next(jobs, 200.0, kinds) == jobs[2]
    assert others.next(jobs[:3], 200.0, kinds) is None
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "index.json").write_text('{"content": "abcd"}')
    assert (
        ours.next(jobs_of(["ablation:leak-decide:1:1~ff"], []), 999.0, kinds_of(jobs_of(["ablation:leak"], []))) is None
    )
    assert ours.next(jobs, 45.0, kinds) == jobs[0]
    ours.note(jobs[3], kinds[jobs[3].key], 30.0)
    assert ours.expected(jobs[0], kinds[jobs[0].key]) == 3 * jobs[0].seconds
    ours.note(jobs[3], kinds[jobs[3].key], 300.0)
    assert others.next(jobs, 200.0, kinds) is None
    assert others.next(jobs, 256.0, kinds) == jobs[3]
