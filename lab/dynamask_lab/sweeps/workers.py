"""Worker processes of a sweep, spread over the GPUs: each does one run at a time; one that dies costs that run alone.

The parent decides everything and writes everything. To a worker it sends a config to run, and to one that runs "stop";
a worker answers with how far it is and how the run ended. A worker whose parent is gone stops as if told to.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from dynamask.errors import InvalidInputError, UsageError
from dynamask_lab.language.data_parallel import processes
from dynamask_lab.sweeps import provenance
from dynamask_lab.sweeps.registry import Config, Progress
from dynamask_lab.sweeps.schedule import OutOfBudget, Run, Schedule

RunFunction = Any
"""`Experiment.run`."""

_STOP = "stop"
_PATIENCE = 60.0
"""Seconds a run gets to save its state when the sweep is broken off."""
_TELL_EVERY = 0.2
"""Seconds between two messages about a run's progress, at least."""
_LOOK_EVERY = 1.0
"""Seconds after which the parent looks for the dead, should no message have told it."""


class WorkerDied(RuntimeError):
    """The process of a run came to its end before the run did."""


def visible_gpus() -> list[str]:
    """The visible GPUs, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    return names[:count]


def places(workers: int) -> list[str | None]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES names it: the visible ones in turn; None where there is none.

    Where processes share a run (`language.data_parallel`), a worker has as many GPUs as they are.
    """
    visible, shared = visible_gpus(), processes()
    groups = [visible[start : start + shared] for start in range(0, len(visible) - shared + 1, shared)]
    gpus: list[str | None] = [",".join(group) for group in groups] or [None]
    return [gpus[place % len(gpus)] for place in range(workers)]


def check_portable(run: RunFunction) -> None:
    """Raise InvalidInputError for a run that another process could not be given: a lambda, a nested function."""
    try:
        pickle.dumps(run)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InvalidInputError(
            f"with several workers an experiment's run must be a function of a module, to be found by other processes; "
            f"got {run!r}"
        ) from error


def run_in_workers(schedule: Schedule, workers: int) -> None:
    """Do the runs of a schedule in so many processes, the visible GPUs in turn, until none is left that may start.

    Args:
        schedule: whose runs; `check_portable` lets their function through.
        workers: processes, at most; no more are started than there are runs for.

    Raises:
        UsageError: no process could be started.
    """
    pool = _Pool(schedule, workers)
    with _termination_as_interrupt():
        try:
            pool.work()
        finally:
            pool.close()


@dataclass
class _Worker:
    """A process as the parent knows it: starting without a device, idle without a run.

    Attributes:
        place: its number, which decides its GPU.
        told: it has been told to stop.
    """

    place: int
    process: BaseProcess
    connection: Connection
    device: str | None = None
    run: Run | None = None
    told: bool = False

    @property
    def idle(self) -> bool:
        return self.device is not None and self.run is None

    def send(self, message: Any) -> None:
        """That it is gone already, the next look finds out."""
        with contextlib.suppress(OSError):
            self.connection.send(message)


class _Pool:
    def __init__(self, schedule: Schedule, workers: int) -> None:
        self.schedule = schedule
        self.gpus = places(workers)
        self.workers: dict[int, _Worker] = {}
        self.unusable: dict[int, str] = {}  # places whose process ended before it was ready, and how

    def work(self) -> None:
        while True:
            self._hand_out()
            self._start_missing()
            busy = any(worker.run for worker in self.workers.values())
            starting = any(worker.device is None for worker in self.workers.values())
            if not busy and not (starting and self.schedule.waiting):
                break
            for worker in self._wait():
                self._receive(worker)
            if self.schedule.stop_at is not None and time.monotonic() >= self.schedule.stop_at:
                self._stop_all()
        if self.schedule.waiting and len(self.unusable) == len(self.gpus):
            raise UsageError(
                f"no worker could be started: the process {next(iter(self.unusable.values()))} before it was ready; "
                "see what it printed, or try --workers 1"
            )

    def _hand_out(self) -> None:
        """Give runs to idle workers, those on the emptiest GPU first."""
        idle = [worker for worker in self.workers.values() if worker.idle]
        while idle:
            worker = min(idle, key=lambda each: (self._busy_on(self.gpus[each.place]), each.place))
            idle.remove(worker)
            assert worker.device is not None
            worker.run = self.schedule.next(worker.device)
            if worker.run is not None:
                worker.told = False
                worker.send(worker.run.config)

    def _busy_on(self, gpu: str | None) -> int:
        return sum(self.gpus[worker.place] == gpu for worker in self.workers.values() if worker.run)

    def _start_missing(self) -> None:
        if any(worker.idle for worker in self.workers.values()):
            return  # there is nothing for it to do, nor for another one
        wanting = self.schedule.waiting - sum(worker.device is None for worker in self.workers.values())
        for place in range(len(self.gpus)):
            if wanting > 0 and place not in self.workers and place not in self.unusable:
                self.workers[place] = self._start(place)
                wanting -= 1

    def _start(self, place: int) -> _Worker:
        gpu = self.gpus[place]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // len(self.gpus)))
        # Read when torch is imported and CUDA begins: too early for the new process to set them itself.
        settings = {name: share for name in _THREADS if name not in os.environ}
        if gpu is not None:
            settings["CUDA_VISIBLE_DEVICES"] = gpu
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        # Not a daemon: such a process could have none of its own, and a run may load its data in some.
        process = spawn.Process(
            target=_serve,
            args=(theirs, self.schedule.experiment.run, self.gpus.count(gpu)),
            name=f"dynamask worker {place}",
        )
        with _environment(settings):
            process.start()
        theirs.close()  # or the end of the process would not close it
        return _Worker(place, process, ours)

    def _wait(self) -> list[_Worker]:
        """The workers that have something to tell, or have died."""
        timeout, stop_at = _LOOK_EVERY, self.schedule.stop_at
        if stop_at is not None and any(worker.run and not worker.told for worker in self.workers.values()):
            timeout = min(timeout, max(0.0, stop_at - time.monotonic()))
        handles: list[Any] = [worker.connection for worker in self.workers.values()]
        ready = wait([*handles, *(worker.process.sentinel for worker in self.workers.values())], timeout)
        return [
            worker
            for worker in self.workers.values()
            if worker.connection in ready or worker.process.sentinel in ready or not worker.process.is_alive()
        ]

    def _receive(self, worker: _Worker) -> None:
        """Take what the worker has told; bury it if it is dead."""
        try:
            while worker.connection.poll():
                kind, *content = worker.connection.recv()
                if kind == "ready":
                    (worker.device,) = content
                elif worker.run is not None:
                    self._note(worker, worker.run, kind, content)
                if worker.place not in self.workers:
                    return
            if worker.process.is_alive():
                return
        except (EOFError, OSError):
            pass
        self._end(worker)
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if worker.run is not None:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            self.schedule.failed_with(worker.run, WorkerDied(f"the process of this run {how}{hint}"))
        elif worker.device is None:
            self.unusable[worker.place] = how

    def _note(self, worker: _Worker, run: Run, kind: str, content: list[Any]) -> None:
        if kind == "advanced":
            self.schedule.advanced(run, *content)
            return
        worker.run = None
        if kind == "finished":
            self.schedule.finished(run, *content)
        elif kind == "interrupted":
            self.schedule.interrupted(run)
        else:
            (error,) = content
            if not isinstance(error, (InvalidInputError, UsageError)):
                self._end(worker)  # after an error on a GPU, whatever else that process did there might fail
            self.schedule.failed_with(run, error)

    def _stop_all(self) -> None:
        for worker in self.workers.values():
            if worker.run is not None and not worker.told:
                worker.told = True
                worker.send(_STOP)

    def _end(self, worker: _Worker) -> None:
        """End its process at once; another one may take its place."""
        self.workers.pop(worker.place, None)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()

    def close(self) -> None:
        """End all processes; busy ones, if the sweep was broken off, once they have saved their state."""
        try:
            if self.schedule.experiment.interruptible:
                self._stop_all()
                deadline = time.monotonic() + _PATIENCE
                while any(worker.run for worker in self.workers.values()) and time.monotonic() < deadline:
                    for worker in self._wait():
                        self._receive(worker)
        finally:
            for worker in [*self.workers.values()]:
                self._end(worker)


_THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Each worker would start a thread per core, and compile in a process per core."""


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """This process's environment with some variables set, for a child to inherit."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, for workers to be ended in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal ever arrives
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Termination:
    """The worker's handler of SIGTERM: a run in progress is stopped as by the parent, to save its state."""

    def __init__(self) -> None:
        self.running = self.requested = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *signal_and_frame: Any) -> None:
        self.requested = True
        if not self.running:
            raise SystemExit(0)


def _serve(connection: Connection, run: RunFunction, runs_at_a_time: int) -> None:
    """The worker's process.

    Args:
        connection: to the parent.
        run: `Experiment.run`.
        runs_at_a_time: of the sweep, on this worker's device.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process: the parent decides
    termination = _Termination()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone, or has no more
        connection.send(("ready", provenance.device_name(runs_at_a_time)))
        while not termination.requested:
            message = connection.recv()
            if message != _STOP:  # which may come too late, when the run has just ended
                termination.running = True
                connection.send(_done(connection, run, message, termination))
                termination.running = False


def _done(connection: Connection, run: RunFunction, config: Config, termination: _Termination) -> tuple[Any, ...]:
    """Do a run; how it ended, as the parent is told."""
    start = time.perf_counter()
    try:
        result = run(config, _progress(connection, termination))
    except OutOfBudget:
        return ("interrupted",)
    except Exception as error:
        return ("failed", _portable(error))
    return ("finished", result, time.perf_counter() - start)


def _progress(connection: Connection, termination: _Termination) -> Progress:
    """Tells the parent, and raises `OutOfBudget` once it says stop or is gone, or the process is to end."""
    told = -_TELL_EVERY

    def progress(share: float, note: str) -> None:
        nonlocal told
        if share < 1 and (termination.requested or connection.poll()):
            raise OutOfBudget  # what was polled waits for the loop around the runs
        if time.monotonic() - told >= _TELL_EVERY:
            told = time.monotonic()
            with contextlib.suppress(OSError):  # the next look finds that the parent is gone
                connection.send(("advanced", share, note))

    return progress


def _portable(error: Exception) -> Exception:
    """The error if it survives the way to another process, else one that says the same."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error.with_traceback(None)
    except Exception:  # whatever a class of errors does when it is rebuilt
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """A run that goes on long after its parent has ended would hold a GPU for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        time.sleep(_PATIENCE)
        os._exit(1)
