"""Run every file of tests, some side by side: `python tools/tests.py --jobs 2`.

Files that need the same compiled files share a pytest, each other file has its own: a crash or its memory stays in its
process. Each process is forked from this one, which has imported fastai. What pytest prints is shown of processes that
fail; of the others, the last line. The last lines name what was skipped, why, and what failed. Further arguments go to pytest.
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

SHARING = ["test_contract", "test_load", "test_predict", "test_absent", "test_apart", "test_targets_cpu"] # what they compile
FIRST = ["test_notebooks", SHARING[0], "test_freeze", "test_untouched", "test_choose", "test_worker",
         "test_faults", "test_bench"] # long ones
NO_TESTS = 5  # of pytest: every test of the file was left out
CUT_OFF = -1  # ended without pytest's last line, whatever the exit status says


def groups() -> list[list[Path]]:
    "Every file of tests, in groups that share a process, those that take long first"
    found = sorted((ROOT / "tests").glob("test_*.py"))
    alone = [[p] for p in found if p.stem not in SHARING]
    sharing = sorted((p for p in found if p.stem in SHARING), key=lambda p: SHARING.index(p.stem))
    return sorted([*alone, sharing], key=lambda g: FIRST.index(g[0].stem) if g[0].stem in FIRST else len(FIRST))


def start(paths: list[Path], args: list[str], said: Path) -> int:
    "The id of a process that runs pytest on the files at `paths` and prints into the file `said`"
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        for fd in (1, 2): os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background
        status = run_module("pytest", ["-q", "-rfEs", *map(str, paths), *args], ROOT)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_all(todo: list[list[Path]], args: list[str], jobs: int):
    "(files, exit status, what pytest printed, seconds) of each group, as they end"
    todo, running = todo[::-1], {}
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            while todo and len(running) < jobs:
                paths = todo.pop()
                said = Path(folder) / paths[0].stem
                running[start(paths, args, said)] = paths, said, time.perf_counter()
            pid, status = os.wait()
            paths, said, began = running.pop(pid)
            yield paths, os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="files side by side (default: %(default)s)")
    args, others = parser.parse_known_args()
    began, failed, skipped, todo = time.perf_counter(), {}, Counter(), groups()
    os.environ.setdefault("MPLBACKEND", "Agg")
    with warnings.catch_warnings(action="ignore"): warm_up()
    for paths, status, said, seconds in run_all(todo, others, max(1, args.jobs)):
        name = ", ".join(p.name for p in paths)
        lines = [line[:300] for line in said.splitlines() if line.strip()] or ["(nothing)"]
        for found in (re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line) for line in lines):
            if found: skipped[found[2]] += int(found[1])
        if not re.search(r" in [\d.]+s", lines[-1]): status = status or CUT_OFF
        if status not in (0, NO_TESTS):
            failed[name] = [line for line in lines if re.match("FAILED |ERROR ", line)] or [f"exit {status}", *lines[-5:]]
            print(*(line for line in lines if not line.startswith("SKIPPED ")), sep="\n")
        print(f"{name}: {lines[-1].strip('= ')} [{seconds:.0f} s]", flush=True)
    for reason, n in sorted(skipped.items()): print(f"skipped {n}: {reason}")
    for name, lines in failed.items(): print(f"FAILED in {name}", *lines, sep="\n  ")
    minutes, result = (time.perf_counter() - began) / 60, f"{len(failed)} processes FAILED" if failed else "all passed"
    print(f"{sum(map(len, todo))} files in {minutes:.1f} min: {result}")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
