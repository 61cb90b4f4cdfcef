"""Run every file of tests, each in a pytest of its own, some side by side: `python tools/tests.py --jobs 2`.

What a file compiles, its tests share; a crash or its memory stays in its process. Each process is forked from this one,
which has imported fastai. What pytest prints is shown of files that fail; of the others, their last line. The last lines
name what was skipped, why, and what failed. Further arguments go to pytest.
"""
import argparse
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.warm import ROOT, run_module, warm_up

LONG = ["test_notebooks", "test_contract", "test_load", "test_choose", "test_faults", "test_untouched", "test_targets_cpu",
        "test_freeze", "test_freeze_export", "test_breaks"]
NO_TESTS = 5  # of pytest: every test of the file was left out


def files() -> list[Path]:
    "Every file of tests, those that take long first"
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return sorted(found, key=lambda p: LONG.index(p.stem) if p.stem in LONG else len(LONG))


def start(path: Path, args: list[str], said: Path) -> int:
    "The id of a process that runs pytest on the file at `path` and prints into the file `said`"
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        for fd in (1, 2): os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background
        status = run_module("pytest", ["-q", "-rfEs", str(path), *args], ROOT)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_all(todo: list[Path], args: list[str], jobs: int):
    "(file, exit status, what pytest printed, seconds) of each file, as they end"
    todo, running = todo[::-1], {}
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            while todo and len(running) < jobs:
                path = todo.pop()
                said = Path(folder) / path.stem
                running[start(path, args, said)] = path, said, time.perf_counter()
            pid, status = os.wait()
            path, said, began = running.pop(pid)
            yield path, os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="files side by side (default: %(default)s)")
    args, others = parser.parse_known_args()
    began, failed, skipped, todo = time.perf_counter(), {}, Counter(), files()
    os.environ.setdefault("MPLBACKEND", "Agg")
    with warnings.catch_warnings(action="ignore"): warm_up()
    for path, status, said, seconds in run_all(todo, others, max(1, args.jobs)):
        lines = [line[:300] for line in said.splitlines() if line.strip()] or ["(nothing)"]
        for found in (re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line) for line in lines):
            if found: skipped[found[2]] += int(found[1])
        if status not in (0, NO_TESTS):
            failed[path.name] = [line for line in lines if re.match("FAILED |ERROR ", line)] or [f"exit {status}", *lines[-5:]]
            print(*(line for line in lines if not line.startswith("SKIPPED ")), sep="\n")
        print(f"{path.name}: {lines[-1].strip('= ')} [{seconds:.0f} s]", flush=True)
    for reason, n in sorted(skipped.items()): print(f"skipped {n}: {reason}")
    for name, lines in failed.items(): print(f"FAILED in {name}", *lines, sep="\n  ")
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(todo)} files in {minutes:.1f} min: " + (f"{len(failed)} FAILED" if failed else "all passed"))
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
