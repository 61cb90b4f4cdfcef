"""The long counts: kills while writing, flipped bits, cut files, predictions from many threads.

Writes benchmarks/results/soak.json. A part that is not run keeps its last result, with its own date and commit."""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from faults import damage, is_clean, kills, make_files
from benchmarks.common import facts, write
from fastai_compile.backends.base import backends
from threads import wrong_answers

PARTS = ["kills", "damage", "threads"]


def damages(folder: Path, flips: int, cuts: int) -> dict:
    "Each backend of this machine: files with one bit changed, and files cut short"
    probes = {name: b.probe("cpu") for name, b in backends().items() if name != "eager" and not getattr(b, "by_name", "")}
    res = {name: f"not run: {probe.reason}" for name, probe in probes.items() if not probe.usable}
    for name, path in make_files(folder, [name for name, probe in probes.items() if probe.usable]).items():
        for kind, n in (("bit flip", flips), ("truncation", cuts)):
            print(f"{name}, {path.stat().st_size / 1e6:.2f} MB: {n} times {kind} ...", flush=True)
            res[f"{name}, {kind}"] = damage(path, kind, n)
            print(f"  {res[f'{name}, {kind}']}", flush=True)
    return res


def is_good(part: str, res: dict) -> bool:
    "Whether nothing was silently wrong"
    if part == "kills": return res["BROKEN"] == 0 and res["whole"] == res["tried"]
    if part == "threads": return res["WRONG"] == 0
    return all(is_clean(v) for v in res.values() if isinstance(v, dict))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=100, help="processes killed while they write")
    p.add_argument("--flips", type=int, default=3000, help="flipped bits for each backend")
    p.add_argument("--cuts", type=int, default=2000, help="truncated files for each backend")
    p.add_argument("--calls", type=int, default=10_000, help="predictions from 8 threads")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    args = p.parse_args()
    torch.set_num_threads(1)
    parts = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}
    run, good = facts(), True
    for part in args.parts:
        print(f"{part} ...", flush=True)
        start = time.time()
        with tempfile.TemporaryDirectory() as tmp:
            if part == "kills": res = kills(Path(tmp), args.kills)
            elif part == "damage": res = damages(Path(tmp), args.flips, args.cuts)
            else: res = wrong_answers(Path(tmp), args.calls)
        print(f"  {res}", flush=True)
        good &= is_good(part, res)
        parts[part] = {"run": run, "seconds": round(time.time() - start), "results": res}
        write(args.out, {"parts": parts})
    print("clean" if good else "NOT CLEAN")
    return not good


if __name__ == "__main__": sys.exit(main())
