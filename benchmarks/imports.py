"""What `import fastai_compile` adds to `import fastai.vision.all`: `python -X importtime`, in fresh processes."""
import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import RESULTS, child_env, facts, parse, table, timed, write

OUT = RESULTS / "imports.json"
NAMES = "fastai.vision.all", "fastai_compile"


def seconds() -> dict:
    "{module: seconds, with all that it imports} of one fresh process"
    code = "; ".join(f"import {name}" for name in NAMES)
    said = subprocess.run([sys.executable, "-X", "importtime", "-c", code], env=child_env() | {"PYTHONDONTWRITEBYTECODE": ""},
                          capture_output=True, text=True, check=True).stderr
    found = {name: int(us) / 1e6 for us, name in re.findall(r"\| +(\d+) \| ([\w.]+)$", said, re.MULTILINE)}
    return {name: found[name] for name in NAMES}


def describe(data: dict) -> str:
    "The result as Markdown"
    def shown(values): return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    rows = [{"module": name, "s": shown([r[name] for r in data["results"]])} for name in NAMES]
    return f"{table(rows)}\n\n{timed(data['run'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11, help="fresh processes, after one that fills the caches")
    args = parse(parser, OUT, describe)
    if args is None: return
    run, _ = facts(), seconds()
    data = {"run": run, "results": [seconds() for _ in range(args.runs)]}
    print(describe(data))
    write(args.out, data)


if __name__ == "__main__": main()
