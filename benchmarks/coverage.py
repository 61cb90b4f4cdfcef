"""Model x target: how far each model is taken for each target on this machine, and what stops it.

Every cell is a process of its own with a time limit: it builds a small learner, exports it for one target, as far as the target
goes here, and says which level was reached, which rewrites were used and how far the answers are from eager PyTorch; or which
operators were refused. Nothing is timed.
"""
import argparse
import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import RESULTS, child_env, facts, table, where, write

OUT = RESULTS / "coverage.json"
SIZE = 64 # pixels
PACKAGES = ("openvino", "executorch", "coremltools", "tensorrt", "torch_tensorrt", "torch_xla", "cerebras_pytorch")


# ---- models
def _classifier(arch, **kwargs):
    def make(path):
        from benchmarks.families_data import classifier
        return classifier(arch, path, size=SIZE, **kwargs)
    return make


def _family(name):
    def make(path):
        from benchmarks.families_data import FAMILIES
        return FAMILIES[name].make(path)
    return make


def _of_fastai(name):
    "A backbone that fastai exports: of torchvision or its own"
    def make(path):
        import fastai.vision.all
        return _classifier(getattr(fastai.vision.all, name))(path)
    return make


MODELS = { # the first six go to all targets first
    "resnet18": _of_fastai("resnet18"),
    "convnext_tiny": _classifier("convnext_tiny"),
    "vit_small": _classifier("vit_small_patch16_224", img_size=SIZE),
    "unet": _family("unet"),
    "tabular": _family("tabular_classification"),
    "text": _family("text_classifier"),
    "resnet50": _of_fastai("resnet50"),
    "xresnet18": _of_fastai("xresnet18"),
    "densenet121": _of_fastai("densenet121"),
    "efficientnet_b0": _classifier("efficientnet_b0"),
    "mobilenetv3_large_100": _classifier("mobilenetv3_large_100"),
    "mobilenetv2_100": _classifier("mobilenetv2_100"),
    "regnety_004": _classifier("regnety_004"),
    "resnext50_32x4d": _classifier("resnext50_32x4d"),
    "convnextv2_nano": _classifier("convnextv2_nano"),
    "tabular, a number": _family("tabular_regression"),
    "collab": _family("collab_nn"),
    "several labels": _family("multilabel"),
    "points": _family("points"),
    "two inputs": _family("several_inputs"),
}


def learner(model: str, path: Path):
    "An untrained learner with fixed weights"
    from fastai.torch_core import set_seed
    path.mkdir(parents=True, exist_ok=True)
    set_seed(42, reproducible=True)
    learn = MODELS[model](path)
    learn.logger = lambda *args: None
    return learn


# ---- targets
def targets() -> list:
    "All that are known: every module of `fastai_compile.backends` registers its own"
    import fastai_compile.backends as folder
    from fastai_compile.backends.base import backends
    for m in pkgutil.iter_modules(folder.__path__): importlib.import_module(f"{folder.__name__}.{m.name}")
    return sorted(backends(), key=lambda name: backends()[name].cost)


# ---- one cell
def _where_it_stops(learn, backend, config) -> dict:
    "{operator: why} that the target refuses, {rewrite: how often}"
    from fastai_compile.capture import capture
    from fastai_compile.choose import unwrap
    from fastai_compile.example import example_batch
    captured = capture(unwrap(learn.model)[0], example_batch(learn, bs=2), 8, backend.rewrites)
    try: return {"refused": backend.coverage(captured, config).elsewhere, "rewrites": captured.rewrites}
    except Exception as e: told = f"{type(e).__name__}: {str(e)[:300]}"
    return {"refused": {}, "coverage": told, "rewrites": captured.rewrites}


def _rewrites(learn, backend) -> dict:
    from fastai_compile.capture import capture
    from fastai_compile.choose import unwrap
    from fastai_compile.example import example_batch
    return capture(unwrap(learn.model)[0], example_batch(learn, bs=2), 8, backend.rewrites).rewrites


def run_cell(model: str, target: str, path: Path) -> dict:
    "One model for one target, as far as it goes here"
    targets()
    from fastai_compile.backends.base import get_backend
    from fastai_compile.config import make_config
    backend = get_backend(target)
    probe = backend.probe("cpu")
    level = "executed" if probe.usable else probe.level
    if not level: return {"result": "not here", "message": f"{probe.reason} {probe.mend}".strip()}
    learn, file = learner(model, path), path / ("model" + (Path(getattr(backend, "open_format", "")).suffix or ".pkl"))
    start = time.perf_counter()
    options = {"inductor": {"freezing": False}}.get(target, {})
    try:
        with learn.no_bar(), learn.no_logging():
            report = learn.export(file.resolve(), compile=target, level=level, max_bs=8, options=options)
    except Exception as e:
        cell = {"result": "refused", "message": f"{type(e).__name__}: {str(e)[:1500]}"}
        return cell | _where_it_stops(learn, backend, make_config(target))
    reached = re.search(r", (lowered|compiled|executed)\b", report.placement)
    row = next((r for r in report.candidates if r["backend"] == target), {})
    return {"result": reached[1] if reached else "unknown", "max_diff": report.max_diff if probe.usable else None,
            "measured": row.get("largest difference", ""),
            "placement": report.placement, "rewrites": _rewrites(learn, backend), "mb": report.size_mb,
            "export_s": round(time.perf_counter() - start, 1), "notes": report.notes[-1:] if not probe.usable else []}


def cell_apart(model: str, target: str, limit_s: float) -> dict:
    "The cell in a process of its own, which is ended with all its children after `limit_s`"
    with tempfile.TemporaryDirectory() as tmp:
        out, log = Path(tmp) / "cell.json", Path(tmp) / "log"
        command = [sys.executable, "-W", "ignore", __file__, "--cell", model, target, "--work", tmp]
        with open(log, "wb") as f:
            child = subprocess.Popen(command, env=child_env(), stdout=f, stderr=f, start_new_session=True)
            try: code = child.wait(limit_s)
            except subprocess.TimeoutExpired: code = None
            finally: _end(child)
        if out.exists(): return json.loads(out.read_text())
        if code is None: return {"result": "no end", "message": f"ended after {limit_s:g} s"}
        return {"result": "crashed", "message": f"exit {code}: {log.read_text(errors='replace')[-600:]}"}


def _end(child) -> None:
    try: os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    child.wait()


# ---- the table
def _short(cell: dict) -> str:
    if cell is None: return "not run"
    if cell["result"] == "refused": return "refused: " + (", ".join(list(cell.get("refused", {}))[:3]) or cell["message"][:60])
    if cell.get("max_diff") is not None: return f"{cell['result']} {cell['max_diff']:.0e}"
    return f"{cell['result']} {cell.get('measured', '')}".strip()


def _rewritten(cells) -> list[str]:
    "A line for each model: which rewrites its targets used"
    res = {}
    for at, cell in cells.items():
        model, target = at.split("/")
        if used := ", ".join(f"{k} ({n})" for k, n in cell.get("rewrites", {}).items()):
            res.setdefault(model, {}).setdefault(used, []).append(target)
    def told(by): # what most targets use, and what others use instead
        most, *others = sorted(by, key=lambda used: -len(by[used]))
        return "; ".join([most, *[f"for {', '.join(by[used])}: {used}" for used in others]])
    return [f"- {m}: {told(by)}" for m, by in res.items()]


def _refusals(cells) -> list[str]:
    "A line for each refusal, with what the target said"
    def told(cell): return "; ".join(f"{k}: {v}" for k, v in cell.get("refused", {}).items()) or cell["message"]
    return [f"- {at.replace('/', ' for ')}: {' '.join(told(c).split())[:400]}" for at, c in cells.items()
            if c["result"] in ("refused", "crashed", "no end")]


def _runs(data) -> list[str]:
    "A line for each run that cells come from"
    count = Counter(c.get("run", 0) for c in data["cells"].values())
    return [f"- {n} cells: {where(data['runs'][i])}" for i, n in sorted(count.items())]


def describe(path: Path) -> str:
    "The results as Markdown"
    data = json.loads(Path(path).read_text())
    cells = data["cells"]
    models = list(dict.fromkeys(k.split("/")[0] for k in cells))
    names = list(dict.fromkeys(k.split("/")[1] for k in cells))
    here = [t for t in names if any(cells.get(f"{m}/{t}", {}).get("result", "not here") != "not here" for m in models)]
    rows = [{"target": t, **{m: _short(cells.get(f"{m}/{t}")) for m in models}} for t in here]
    absent = {t: cells[f"{models[0]}/{t}"]["message"] for t in names if t not in here}
    lines = [table(rows), "", f"Images of {SIZE} pixels; the number is the largest difference to eager.", ""]
    if refused := _refusals(cells): lines += ["Refused:", "", *refused, ""]
    if used := _rewritten(cells): lines += ["Rewritten into equal forms:", "", *used, ""]
    if absent: lines += ["Not here:", "", *[f"- `{t}`: {why}" for t, why in absent.items()], ""]
    return "\n".join([*lines, *_runs(data)])


def run_all(args) -> None:
    data = json.loads(args.out.read_text()) if args.out.exists() else {"runs": [], "cells": {}}
    names, run = args.targets or targets(), facts()
    import importlib.metadata as im
    for p in PACKAGES:
        try: run["versions"][p] = im.version(p)
        except im.PackageNotFoundError: run["versions"][p] = "not installed"
    data["runs"].append(run)
    for model in args.models:
        for target in names:
            data["cells"][f"{model}/{target}"] = cell = {**cell_apart(model, target, args.limit_s), "run": len(data["runs"])-1}
            print(f"{model:14} {target:22} {_short(cell)}", flush=True)
            write(args.out, data)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--targets", nargs="*", help="all that are known, by default")
    p.add_argument("--limit_s", type=float, default=400, help="seconds for one cell")
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--table", action="store_true", help="only print what is stored")
    p.add_argument("--cell", nargs=2, metavar=("MODEL", "TARGET"), help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.cell:
        import torch
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        write(args.work / "cell.json", run_cell(*args.cell, args.work))
        return
    if not args.table: run_all(args)
    print(describe(args.out))


if __name__ == "__main__": main()
