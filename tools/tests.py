"""Run every file of tests, each in a pytest of its own, some side by side: `python tools/tests.py --jobs 2`.

What a file compiles, its tests share; a crash or its memory stays in its process. What pytest prints is shown of files
that fail; of the others, their last line. The last lines name what was skipped, why, and what failed. Further arguments
go to pytest.
"""
import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = ["test_notebooks", "test_contract", "test_load", "test_choose", "test_untouched", "test_predict", "test_bench",
        "test_breaks"]
NO_TESTS = 5  # of pytest: every test of the file was left out


def files() -> list[Path]:
    "Every file of tests, those that take long first"
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return sorted(found, key=lambda p: LONG.index(p.stem) if p.stem in LONG else len(LONG))


def run(path: Path, args: list[str]) -> tuple[Path, int, str, float]:
    "(file, exit status, what pytest printed, seconds)"
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", str(path), *args]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return path, done.returncode, done.stdout, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="files side by side (default: %(default)s)")
    args, others = parser.parse_known_args()
    start, failed, skipped, todo = time.perf_counter(), {}, Counter(), files()
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        for done in as_completed([pool.submit(run, p, others) for p in todo]):
            path, status, said, seconds = done.result()
            lines = [line for line in said.splitlines() if line.strip()] or ["(nothing)"]
            for found in (re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line) for line in lines):
                if found: skipped[found[2]] += int(found[1])
            if status not in (0, NO_TESTS):
                failed[path.name] = [line for line in lines if re.match("FAILED |ERROR ", line)] or lines[-5:]
                print(*(line for line in lines if not line.startswith("SKIPPED ")), sep="\n")
            print(f"{path.name}: {lines[-1].strip('= ')} [{seconds:.0f} s]", flush=True)
    for reason, n in sorted(skipped.items()): print(f"skipped {n}: {reason}")
    for name, lines in failed.items(): print(f"FAILED in {name}", *lines, sep="\n  ")
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(todo)} files in {minutes:.1f} min: " + (f"{len(failed)} FAILED" if failed else "all passed"))
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
