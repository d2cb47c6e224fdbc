"""The job that runs transformers' own tests: its files come together, and its reasons name tests."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "transformers_suite"


def _by_path(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "transformers-9.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("tests/test_modeling_common.py", "tests/deep/test_other.py", "src/transformers/models.py"):
            content = b"RELEASED = True\n"
            member = tarfile.TarInfo(f"transformers-9/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_release_stands_before_the_checkout(source: Path, tmp_path: Path) -> None:
    run = _by_path("run")
    checkout = tmp_path / "checkout" / "tests"
    (checkout / "generation").mkdir(parents=True)
    (checkout / "models").mkdir()
    (checkout / "test_modeling_common.py").write_text("RELEASED = False\n")
    (checkout / "generation" / "test_utils.py").write_text('CACHE = "dynamic_full"\n')
    (case,) = run.lay_out(source, checkout.parent, tmp_path / "both")
    tests = tmp_path / "both" / "tests"
    assert (tests / "test_modeling_common.py").read_text() == "RELEASED = True\n"
    assert "Mixin" not in (tests / "generation" / "test_utils.py").read_text()
    assert not (tests / "models").exists()
    assert (tmp_path / "both" / case).read_text() == (FOLDER / "cases.py").read_text()

    run.lay_out(source, None, tmp_path / "alone")
    stand_in = (tmp_path / "alone" / "tests" / "generation" / "test_utils.py").read_text()
    assert stand_in.startswith("class GenerationTesterMixin")
    assert not (tmp_path / "alone" / "tests" / "deep").exists()


def test_reasons_belong_to_cases() -> None:
    skipped = _by_path("skipped")
    cases = (FOLDER / "cases.py").read_text() + (FOLDER / "cache_cases.py").read_text()
    assert skipped.reason("TestMha", "test_greedy_generate") is None
    assert "flat pool" in skipped.reason("TestDma", "test_past_key_values_format")
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for pattern, why in skipped.REASONS.items():
        assert len(why) > 20
        assert f"| {pattern.replace('|', ' ').replace(chr(92), '')} | {why} |" in table
        for name in pattern.partition("(")[2].partition(")")[0].split("|"):
            if name and not name.startswith("?"):
                assert f"class Test{name}(" in cases, name
