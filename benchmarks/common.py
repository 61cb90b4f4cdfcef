"""What every benchmark writes beside its figures: the machine, the versions, the date, the commit, the command."""
import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tools.outputs import scrub

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPIN_S = .1 # Longer than the threads of ONNX Runtime's sessions spin after a run (45 ms): the next contender has the CPUs
PACKAGES = ("torch", "torchvision", "fastai", "fastcore", "timm", "transformers", "onnx", "onnxscript", "onnxruntime",
            "numpy")


def _version(package: str) -> str:
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return "not installed"


def _cpu() -> str:
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float:
    try: return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError): return float("nan")


def _git(*args: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def _commit() -> str:
    changed = _git("status", "--porcelain", "fastai_compile", "benchmarks/*.py")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def facts() -> dict:
    "Hardware, versions, date, commit and command of this run"
    import torch
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(),
            "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
            "cpu": _cpu(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "memory_gb": _memory_gb(),
            "load_at_start": round(os.getloadavg()[0], 2), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "os": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
            "versions": {p: _version(p) for p in PACKAGES}}


def where(run: dict) -> str:
    "One sentence about the machine of a run"
    v = run["versions"]
    return (f"{run['date'][:10]}, commit {run['commit']}, {run['cpu']}, {run['cores']} cores, {run['torch_threads']} "
            f"threads, Python {run['python']}, torch {v['torch']}, fastai {v['fastai']}, onnxruntime {v['onnxruntime']}; "
            f"`{run['command']}`")


def _scrubbed(o):
    "Without paths of this machine, which errors carry"
    if isinstance(o, dict): return {k: _scrubbed(v) for k, v in o.items()}
    if isinstance(o, list | tuple): return [_scrubbed(v) for v in o]
    return scrub(o) if isinstance(o, str) else o


def write(path: Path, data: dict) -> None:
    "`data` as JSON at `path`, replaced as a whole"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(_scrubbed(data), indent=1) + "\n")
    tmp.replace(path)


def table(rows: list[dict]) -> str:
    "Rows (dicts of the same keys) as a Markdown table"
    def line(cells): return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
    return "\n".join([line(rows[0]), line("---" for _ in rows[0]), *[line(r.values()) for r in rows]])


def timed(run: dict) -> str:
    "`where` for times, with a warning where other programs ran when the run began"
    load = run["load_at_start"] # The imports of the run itself add about .15
    return where(run) + ("" if load < .65 else f". Load {load} at the start: other programs ran, these figures are not final")


def parse(parser: argparse.ArgumentParser, out: Path, describe):
    "The arguments, with `--out`; None where only the table of it was asked for (`--table`): it is printed"
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of --out")
    args = parser.parse_args()
    if not args.table: return args
    print(describe(json.loads(args.out.read_text())))
    return None


def kept(out: Path, models: list, batches: list | None = None) -> list:
    "The results of `out` for other models, or other batches of them: what is not measured again keeps its own run"
    old = json.loads(out.read_text())["results"] if out.exists() else []
    return [r for r in old if r["model"] not in models or batches is not None and r["batch"] not in batches]


def child_env() -> dict:
    "The environment of a fresh process that finds this repository"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}
