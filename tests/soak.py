"The long counts of the fault tests: kills while writing, flipped bits, cut files. Writes benchmarks/results/soak.json"
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from faults import damage, is_clean, kills, make_file
from fastai_compile.backends.base import backends, get_backend


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--kills", type=int, default=100, help="processes killed while they write")
    p.add_argument("--flips", type=int, default=3000, help="flipped bits for each backend")
    p.add_argument("--cuts", type=int, default=2000, help="truncated files for each backend")
    p.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "soak.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    start, res = time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"kills: {args.kills} ...", flush=True)
        (Path(folder) / "kills").mkdir()
        res["kills"] = kills(Path(folder) / "kills", args.kills)
        print(f"  {res['kills']}", flush=True)
        for name in [b for b in backends() if b != "eager"]:
            probe = get_backend(name).probe("cpu")
            if not probe.usable: res[name] = f"not run: {probe.reason}"; continue
            (Path(folder) / name).mkdir()
            path = make_file(Path(folder) / name, name)
            for kind, n in (("bit flip", args.flips), ("truncation", args.cuts)):
                print(f"{name}, {path.stat().st_size / 1e6:.2f} MB: {n} times {kind} ...", flush=True)
                res[f"{name}, {kind}"] = damage(path, kind, n)
                print(f"  {res[f'{name}, {kind}']}", flush=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True).stdout)
    out = {"date": str(date.today()), "commit": commit + (" with changes" if dirty else ""),
           "command": " ".join(["python", "tests/soak.py", *sys.argv[1:]]),
           "torch": torch.__version__, "seconds": round(time.time() - start), "results": res}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {args.out}")
    clean = res["kills"]["BROKEN"] == 0 and all(is_clean(v) for k, v in res.items() if k != "kills" and isinstance(v, dict))
    print("clean" if clean else "NOT CLEAN")
    sys.exit(not clean)


if __name__ == "__main__": main()
