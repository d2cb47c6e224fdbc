"""The launch commands of the documentation: several machines by torchrun, and the batch file for Slurm."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynamask.training.plan import launch_command
from tests.training.test_distributed import history, run_settings
from tests.training.test_training import losses, text, train  # noqa: F401 -- a fixture

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"

SRUN = """#!/bin/bash
# Runs the command once for each machine, as Slurm does; all of them are this one.
while [[ $1 == --* ]]; do case $1 in *=*) shift;; *) shift 2;; esac; done
echo "$@" >> {calls}
for node in $(seq "$SLURM_NNODES"); do "$@" & done
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit $failed
"""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def commands(folder: Path) -> Path:
    """Stand-ins for srun and scontrol, and torchrun and python of this environment, in a folder for PATH."""
    folder.mkdir()
    scripts = {
        "srun": SRUN.format(calls=shlex.quote(str(folder / "calls"))),
        "scontrol": "#!/bin/bash\n[[ $* == 'show hostnames' ]] && echo localhost && echo other\n",
        "torchrun": f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n',
    }
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def environment(path: Path) -> dict[str, str]:
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "OMP_NUM_THREADS": "1"}
    return os.environ | slurm | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}


def smaller(command: str, config: Path) -> str:
    """The same command with one process per machine, a free port, and the settings of a small model."""
    command = re.sub(r"--nproc-per-node 8\b", "--nproc-per-node 1", command)
    assert "--nproc-per-node 1" in command
    command = command.replace(":29500", f":{free_port()}")
    found = re.sub(r"preset=1\.7b.*", f"-c {shlex.quote(str(config))}", command)
    assert found != command
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", ["docs", "plan"])
def test_a_batch_file_trains_over_machines(text: Path, tmp_path: Path, source: str) -> None:  # noqa: F811
    alone = train(run_settings(text, tmp_path / "alone", gradient_accumulation=2, steps=4), quiet=True)
    output, config = tmp_path / "run", tmp_path / "config.toml"
    run_settings(text, output, steps=4).save(config)
    if source == "docs":
        script = next(block for block in re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.S) if "#SBATCH" in block)
        script = smaller(script, config)
    else:
        script = smaller(launch_command("preset=1.7b data=corpus/ output=run", 64), config)
        assert "--nodes 8 " in script
        script = re.sub(r"nodes 8\b|nnodes 8\b", lambda found: found[0].replace("8", "2"), script)
    (tmp_path / "train.sh").write_text(script)
    path = commands(tmp_path / "bin")
    done = subprocess.run(
        ["bash", str(tmp_path / "train.sh")], env=environment(path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--nnodes 2" in (path / "calls").read_text()
    expected, found = losses(alone.history), history(output)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step
