"""Run a function in several processes that form a group (gloo), and a program in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_processes(function: str, size: int, *arguments: str, timeout: float = 300.0) -> None:
    """Call `function` ("module:name") with the arguments in `size` processes; fail with the output of those that fail.

    The processes are forks of this one, which saves them the imports; where a GPU forbids that, new interpreters.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with tempfile.TemporaryDirectory() as folder:
        members: list[Any] = [
            context.Process(target=_member, args=(function, rank, size, folder, arguments)) for rank in range(size)
        ]
        for member in members:
            member.start()
        deadline = time.monotonic() + timeout
        while any(member.exitcode is None for member in members):
            failed = any(member.exitcode for member in members)  # the others would wait for it
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        codes = [member.exitcode for member in members]
        for member in members:
            member.kill()
            member.join()
        told = "\n".join(file.read_text() for file in sorted(Path(folder).glob("error-*")))
    assert codes == [0] * size, f"exit codes {codes}\n{told}"


def _member(function: str, rank: int, size: int, folder: str, arguments: tuple[str, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        module, name = function.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"process {rank}\n{traceback.format_exc()}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(code: str, folder: Path, *, file: str = "program") -> subprocess.CompletedProcess[str]:
    """Run `code` as a program in `folder`; `file` names it in tracebacks.

    The process is a fork of this one, which saves it the imports; where a GPU forbids that, a new interpreter.
    """
    if torch.cuda.is_available():
        return subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
    with tempfile.TemporaryDirectory() as place:
        texts = [Path(place, name) for name in ("output", "errors")]
        process = multiprocessing.get_context("fork").Process(target=_program, args=(code, folder, file, *texts))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
        output, errors = (text.read_text() if text.exists() else "" for text in texts)
    assert process.exitcode is not None
    return subprocess.CompletedProcess([file], process.exitcode, output, errors)


def _program(code: str, folder: Path, file: str, output: Path, errors: Path) -> None:
    exit_code = 0
    with output.open("w") as sys.stdout, errors.open("w") as sys.stderr:
        try:
            os.chdir(folder)
            sys.argv = [file]
            exec(compile(code, file, "exec"), {"__name__": "__main__", "__file__": file})
        except SystemExit as error:
            exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
            exit_code = 1
    os._exit(exit_code)
