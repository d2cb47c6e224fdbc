"""Run transformers' own tests of models, generation and caches against dynamask's models.

    python lab/transformers_suite/run.py [--checkout FOLDER] [PYTEST_ARGUMENTS]

The tests of models come with the source distribution of the installed release, which pip downloads. The tests of
generation and of caches are in its repository alone: `--checkout`, or the variable TRANSFORMERS_CHECKOUT, names a copy
of it, as near to the installed release as there is. Without it the job runs the tests of models.

Tests that cannot hold are skipped with the reason that `skipped.py` gives, and listed at the end.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NEEDS = ("parameterized", "pytest", "accelerate")

_ABSENT = {
    "generation/test_utils.py": "GenerationTesterMixin",
    "exporters/test_export.py": "ExportTesterMixin",
}
"""Files of the repository that the tests of models import, and the class they take from each."""


def installed() -> str:
    """Return the version of transformers."""
    return importlib.metadata.version("transformers")


def fetch_source(version: str, folder: Path) -> Path:
    """Download the source distribution of a release.

    Args:
        version: of transformers.
        folder: where the archive is kept; an archive that is there is not downloaded again.

    Raises:
        SystemExit: pip finds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"transformers-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"], check=False)
    if not archive.exists():
        raise SystemExit(f"pip has no source distribution of transformers {version}: give --checkout")
    return archive


def lay_out(source: Path | None, checkout: Path | None, folder: Path) -> list[str]:
    """Put the tests into `folder/tests`, and dynamask's cases beside them.

    Args:
        source: archive of the source distribution, or None: the checkout's tests of models.
        checkout: a copy of the repository, or None: no tests of generation and caches.
        folder: an empty folder.

    Returns:
        The files that pytest is to run, relative to the folder.
    """
    tests = folder / "tests"
    tests.mkdir(parents=True)
    if checkout is not None:
        shutil.copytree(checkout / "tests", tests, dirs_exist_ok=True, ignore=shutil.ignore_patterns("models"))
    if source is not None:
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                name = Path(member.name)
                if member.isfile() and len(name.parts) == 3 and name.parts[1] == "tests" and name.suffix == ".py":
                    content = archive.extractfile(member)
                    if content is not None:
                        (tests / name.name).write_bytes(content.read())
    _follow_release(tests / "generation" / "test_utils.py")
    for name, mixin in _ABSENT.items():
        path = tests / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
    for package in (tests, *(tests / Path(name).parent for name in _ABSENT)):
        (package / "__init__.py").touch()
    own = tests / "dynamask_cases"
    own.mkdir()
    (own / "__init__.py").touch()
    shutil.copy(HERE / "cases.py", own / "test_dynamask.py")
    shutil.copy(HERE / "skipped.py", own / "skipped.py")
    files = ["tests/dynamask_cases/test_dynamask.py"]
    if (tests / "utils" / "test_cache_utils.py").exists():
        (tests / "utils" / "__init__.py").touch()
        shutil.copy(HERE / "cache_cases.py", own / "test_dynamask_caches.py")
        files.append("tests/dynamask_cases/test_dynamask_caches.py")
    return files


def _follow_release(path: Path) -> None:
    """Leave the kind of cache open where the checkout names one that the installed release does not have."""
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    if path.exists() and "dynamic_full" not in ALL_CACHE_IMPLEMENTATIONS:
        path.write_text(path.read_text(encoding="utf-8").replace('"dynamic_full"', "None"), encoding="utf-8")


def main() -> int:
    """Run the job; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=os.environ.get("TRANSFORMERS_CHECKOUT"))
    parser.add_argument("--downloads", type=Path, default=Path(tempfile.gettempdir()) / "transformers-sources")
    options, rest = parser.parse_known_args()
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"transformers' tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    checkout: Path | None = None if options.checkout is None else Path(options.checkout).resolve()
    if checkout is not None and not (checkout / "tests" / "generation").is_dir():
        raise SystemExit(f"{checkout} is no copy of transformers' repository: it has no tests/generation")
    with tempfile.TemporaryDirectory(prefix="transformers-suite-") as name:
        folder = Path(name)
        files = lay_out(fetch_source(installed(), options.downloads.resolve()), checkout, folder)
        what = "models alone" if checkout is None else f"models, generation and caches, with {checkout.name}"
        print(f"transformers {installed()}: tests of {what}", flush=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files, *rest]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
