"""The recipe of the corpora, on packages made here: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).parents[2] / "scripts" / "corpora.py"


@pytest.fixture(scope="module")
def corpora() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpora", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["corpora"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def prose(seed: int, words: int = 300) -> str:
    chooser = random.Random(seed)
    made = ("".join(chooser.choice("abcdefghij") for _ in range(5)) for _ in range(words))
    return "".join(word + ("\n" if place % 12 == 11 else " ") for place, word in enumerate(made))


def wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_builds_what_the_experiments_read(corpora: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "out" / "build" / "packages"
    first = {f"first/{i}.py": prose(i) for i in range(40)}
    wheel(packages, "first", first | {"first/copy.py": first["first/3.py"], "first/data.csv": prose(99)})
    wheel(packages, "second", {f"second/{i}.py": prose(100 + i) for i in range(3)})
    wheel(packages, "manual", {f"manual/{i}.html": f"<pre>{prose(200 + i)}</pre>" for i in range(30)})
    monkeypatch.setattr(
        corpora,
        "CORPORA",
        {
            "code": [corpora._pip("first", 0.5), corpora._pip("second", 0.5)],
            "text": [corpora._pip("manual", 1.0, ".html")],
        },
    )
    monkeypatch.setattr(corpora, "VOCAB_SIZE", 400)
    monkeypatch.setattr(corpora, "VALIDATION", 0.2)
    corpora.build(["code", "text"], 10_000, tmp_path / "out")
    corpora.pack(tmp_path / "out", tmp_path / "packed.tar.xz")

    report = json.loads((tmp_path / "out" / "code-composition.json").read_text())
    taken = {name.split("-")[0]: entry["documents"] for name, entry in report["packages"].items()}
    # The second package's half is more than it has; what it lacks comes from the first.
    assert taken["second"] == 3
    assert taken["first"] >= 15
    assert report["characters"] >= 10_000 * corpora.BYTES_PER_TOKEN["code"]
    assert report["splits"]["train"]["documents"] > report["splits"]["validation"]["documents"] > 0
    monkeypatch.setenv("DYNAMASK_CORPORA", str(tmp_path / "out"))
    from dynamask_lab.language.data import token_streams

    both = token_streams("code+text")
    assert len(both.train) == sum(
        json.loads((tmp_path / "out" / f"{name}-composition.json").read_text())["splits"]["train"]["tokens"]
        for name in ("code", "text")
    )


def test_a_copy_under_another_name_is_left_out(corpora: ModuleType, tmp_path: Path, monkeypatch) -> None:
    files = {f"x/{i}.py": prose(i) for i in range(5)}
    wheel(tmp_path / "packages", "x", files | {"x/again.py": prose(2) + " and a few words more"})
    monkeypatch.setattr(corpora, "CORPORA", {"code": [corpora._pip("x", 1.0)]})
    report = corpora.gather("code", 10**6, tmp_path / "packages", tmp_path / "code.jsonl")
    assert report["near_duplicates"] == 1
    assert report["packages"]["x-1.0-py3-none-any.whl"]["documents"] == 5


def test_pages_become_their_words(corpora: ModuleType) -> None:
    page = (
        "<html><head><title>no</title><style>p {}</style></head><body><nav>menu</nav><h1>Title</h1>"
        "<p>One   <b>bold</b>\nline &amp; more.</p><pre>a\n  b</pre><script>no()</script></body></html>"
    )
    assert corpora.html_text(page) == "Title\n\nOne bold line & more.\n\na\n  b"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (prose(0), True),
        ("too short", False),
        ("0x1f, 0x2e, 77, " * 200, False),
        ("a" * 5000, False),
        ("the same line\n" * 300, False),
    ],
)
def test_tables_and_repetition_are_not_language(corpora: ModuleType, text: str, wanted: bool) -> None:
    assert corpora.reads_like_language(text) is wanted
