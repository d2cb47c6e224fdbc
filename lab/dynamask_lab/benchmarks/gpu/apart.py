"""Work in processes of its own: checks side by side, rehearsals of peers, and what may hang.

Most of the checks' time is compilation, which processes share. A kernel that reads where it may not takes the whole
process's GPU context with it, so a peer is run once here before it is timed in the benchmark's own process. What both
compile stays in Triton's cache on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask_lab.benchmarks.gpu.measure import whole


@dataclass(frozen=True)
class Task:
    """Something to do apart.

    Attributes:
        kind: "check" (arguments of `check_case`), "peer" (a name, and fields of `Shape`) or "backward" (those fields).
        arguments: its arguments, as JSON knows them.
    """

    kind: str
    arguments: dict[str, Any]


def run_apart(
    tasks: list[Task],
    *,
    workers: int = 16,
    timeout: float = 100.0,
    deadline: float = float("inf"),
    command: tuple[str, ...] = (sys.executable, "-m", "dynamask_lab.benchmarks.gpu.apart"),
) -> list[dict[str, Any]]:
    """Do the tasks, `workers` at a time, the first ones first.

    Args:
        tasks: what to do.
        workers: processes at a time.
        timeout: seconds a process may take.
        deadline: seconds all of them may take; what is not done then is given up, or not begun.
        command: what is started, with the task and the file of its result behind it.

    Returns:
        One dictionary per task, in their order: "result", or "error", and "seconds".
    """
    results: list[dict[str, Any]] = [{} for _ in tasks]
    waiting = list(enumerate(tasks))
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            while waiting or running:
                left = deadline - (time.perf_counter() - began)
                while waiting and left > 0 and len(running) < workers:
                    number, task = waiting.pop(0)
                    log = (folder / f"{number}.log").open("wb")
                    arguments = (task.kind, json.dumps(task.arguments), str(folder / f"{number}.json"))
                    # fla would keep the choices of its autotuners, made while other work shares the GPU.
                    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLA_CACHE_RESULTS": "0"}
                    process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=environment)
                    log.close()
                    running[number] = (process, time.perf_counter())
                for number, (process, started) in list(running.items()):
                    seconds = time.perf_counter() - started
                    if process.poll() is not None:
                        results[number] = {**_result(folder, number, process.returncode), "seconds": seconds}
                        del running[number]
                    elif seconds > timeout or left <= 0:
                        _kill(process)
                        results[number] = {"error": f"not done after {seconds:.0f} s", "seconds": seconds}
                        del running[number]
                if left <= 0:
                    for number, _ in waiting:
                        results[number] = {"error": f"not begun within {deadline:g} s", "seconds": 0.0}
                    break
                time.sleep(0.05)
        finally:
            for process, _ in running.values():
                _kill(process)
    return results


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, without waiting for ever: one whose kernel hangs may not die before the driver lets it."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def _result(folder: Path, number: int, code: int) -> dict[str, Any]:
    try:
        return json.loads((folder / f"{number}.json").read_text())
    except (OSError, ValueError):
        log = (folder / f"{number}.log").read_text(errors="replace")
        return {"error": f"the process ended with code {code}:\n{log[-4000:]}"}


def main(kind: str, arguments: str, path: str) -> None:
    """Do one task and write its result."""
    given = json.loads(arguments)
    actions: dict[str, Callable[..., Any]] = {"check": _check, "peer": _rehearse, "backward": _backward}
    try:
        result = {"result": actions[kind](given)}
    except Exception as error:
        result = {"error": whole(error)}
    Path(path).write_text(json.dumps(result))


def _check(given: dict[str, Any]) -> list[dict[str, Any]]:
    from dynamask_lab.benchmarks.gpu.check import check_case

    return check_case(**given)


def _backward(given: dict[str, Any]) -> dict[str, Any]:
    from dynamask_lab.benchmarks.gpu.measure import time_backward
    from dynamask_lab.benchmarks.gpu.problem import Shape

    return time_backward(Shape(**given))


def _rehearse(given: dict[str, Any]) -> None:
    """Forward and backward once; a crash shows at the synchronisation."""
    import torch

    from dynamask_lab.benchmarks.gpu.peers import PEERS
    from dynamask_lab.benchmarks.gpu.problem import Problem, Shape

    call = PEERS[given.pop("peer")].prepare(Problem(Shape(**given)))
    output = call.forward()
    if call.inputs:
        torch.autograd.grad(output, call.inputs, call.grad)
    torch.cuda.synchronize()
    if not bool(output.isfinite().all()):
        raise ValueError("the output is not finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
