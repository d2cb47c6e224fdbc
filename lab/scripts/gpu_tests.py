"""The tests that need a GPU, in several processes, since most of their time is compilation.

    python lab/scripts/gpu_tests.py --processes 8 --seconds 300

Exit code 0 only if every test of every process ran and passed. Needs pytest alone beside the package; fla's tests are
skipped where fla is not installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = [
    "tests/ops/test_triton_kernels.py",
    "tests/ops/test_future_attention_kernels.py",
    "tests/ops/test_ragged_decode_kernels.py",
    "tests/ops/test_cache_insert_kernels.py",
    "tests/ops/test_cache_keep_kernels.py",
    "tests/ops/test_predict_ranks_kernels.py",
    "tests/ops/hopper/test_walk_tiles.py",
    "tests/test_cache.py",
    "tests/ops/nsa/test_selected.py",
    "tests/mixers/test_gpu.py",
    "tests/mixers/test_launch_sequence.py",
    "tests/models/test_cuda_graph.py",
    "tests/convert/test_decode_by_graph.py",
    "tests/convert/test_decode_step.py",
    "tests/convert/test_recorded_prompts.py",
    "tests/convert/test_recorded_step.py",
    "tests/training/test_recorded_gradients.py",
    "tests/training/test_recorded_steps.py",
    "lab/tests/language/test_replayed.py",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="at a time, on the one GPU")
    parser.add_argument("--seconds", type=float, default=600.0, help="what is not done by then counts as failed")
    parser.add_argument("--keyword", help="only tests whose name it fits, as pytest's -k")
    parser.add_argument("--logs", type=Path, help="a folder that keeps what each process prints")
    parser.add_argument("--all", action="store_true", help="slow tests, too")
    parser.add_argument("tests", nargs="*", default=FILES, help="files or tests; default: all that need a GPU")
    arguments = parser.parse_args()
    began = time.perf_counter()
    # Results are compared with float64 on the CPU: each process would take every core for that.
    threads = str(max(1, (os.cpu_count() or 1) // arguments.processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        running = []
        for shard in range(arguments.processes):
            log = folder / f"{shard}.txt"
            command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=short", "--durations=3"]
            command += ["-k", arguments.keyword] if arguments.keyword else []
            command += ["-m", "slow or not slow"] if arguments.all else []
            command += ["--shard", f"{shard}/{arguments.processes}", *arguments.tests]
            with log.open("w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                running.append((process, log))
        failed = False
        for process, log in running:
            try:
                code = process.wait(max(1.0, arguments.seconds - (time.perf_counter() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            text = log.read_text()
            # 5: a shard without tests.
            if code not in (0, 5):
                failed = True
                print(text, flush=True)
            last = text.strip().splitlines()[-1] if text.strip() else "nothing"
            print(f"{time.perf_counter() - began:6.1f} s  exit {code}: {last}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
