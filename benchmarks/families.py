"""Family x (with data, without data) x backend: does the export open in a fresh process and predict the same?

Every family of `families_data` is built, exported with each backend, once from the learner with its data and once from
one that came out of stock `load_learner`; each file is opened in a process of its own by stock `load_learner`, and what
it predicts is compared with eager PyTorch. Cells that were not run say so.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils import _pytree as pytree
from benchmarks.common import RESULTS, child_env, facts, table, timed, write
from benchmarks.families_data import FAMILIES, build, first, items, lacks

WAYS = ("with data", "without data")
BACKENDS = ("onnxruntime", "inductor")
OUT = RESULTS / "families.json"
NOT_RUN = "not run"
TOLERANCE = 1e-4 # of the largest number that eager gives; the gate of the export itself is stricter


# ---- what a learner answers
def _tensors(out) -> list:
    return [t.detach().as_subclass(torch.Tensor) for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def _by_get_preds(learn, rows) -> dict:
    preds, _, decoded = learn.get_preds(dl=learn.dls.test_dl(rows, num_workers=0), with_decoded=True)
    return {"preds": _tensors(preds), "decoded": _tensors(decoded)}


def _by_model(learn, rows) -> dict:
    "For outputs that `get_preds` of fastai cannot gather, such as a dict"
    learn.model.eval()
    with torch.no_grad(): outs = [learn.model(*b) for b in learn.dls.test_dl(rows, num_workers=0)]
    return {"preds": [torch.cat(ts) for ts in zip(*[_tensors(o) for o in outs], strict=True)], "decoded": []}


def _by_predict(learn, rows) -> dict:
    _, decoded, preds = learn.predict(first(rows))
    return {"preds": _tensors(preds), "decoded": _tensors(decoded)}


HOWS = {"get_preds": _by_get_preds, "model": _by_model, "predict": _by_predict}


def answers(learn, rows, hows=None) -> dict:
    "{how: answers} of each of `hows`; None: of each that works, which is for eager to say"
    found = {}
    with learn.no_bar(), learn.no_logging():
        for how in hows or HOWS:
            if hows is None and how == "model" and "get_preds" in found: continue
            try: found[how] = HOWS[how](learn, rows)
            except Exception:
                if hows: raise
    return found


def compare(got: dict, want: dict) -> tuple:
    "('same' or what differs, the largest difference of a prediction)"
    worst, faults = 0., []
    for how in want:
        for g, w in zip(got[how]["preds"], want[how]["preds"], strict=True):
            if g.shape != w.shape: return f"DIFFERENT: {how} gives {list(g.shape)} instead of {list(w.shape)}", None
            diff, scale = (g.double() - w.double()).abs().max().item(), w.double().abs().max().item()
            worst = max(worst, diff)
            if not diff <= TOLERANCE * max(1., scale): faults.append(f"{how} is off by {diff:.2g}")
        for g, w in zip(got[how]["decoded"], want[how]["decoded"], strict=True):
            if w.is_floating_point() or torch.equal(g, w): continue
            faults.append(f"{int((g != w).sum())} decoded answers of {how} differ")
    return ("DIFFERENT: " + "; ".join(faults) if faults else "same"), worst


# ---- the processes
def _export(learn, name, way, backend, path) -> dict:
    "Export once; a cell without the fresh process"
    family, start = FAMILIES[name], time.perf_counter()
    given = {} if way == "with data" or family.blocks else {"items": items(name, path)}
    file = path / f"{backend}-{way.replace(' ', '_')}.pkl"
    try:
        with learn.no_bar(), learn.no_logging(): report = learn.export(file.resolve(), compile=backend, **given)
    except Exception as e:
        expected = type(e).__name__ == family.refused
        result = f"refused, {type(e).__name__}" if expected else f"failed, {type(e).__name__}"
        return {"result": result, "message": str(e)[:1000], "export_s": time.perf_counter() - start}
    from fastai_compile import inspect_artifact
    ms = inspect_artifact(file)["timings_ms"]["1"]
    return {"result": "exported", "file": file.name, "items_given": bool(given), "export_s": time.perf_counter() - start,
            "mb": report.size_mb, "gate_max_diff": report.max_diff, "ms_eager": ms["eager"], "ms_compiled": ms.get(backend)}


def make(name: str, backends: list, path: Path) -> None:
    "In a process of its own: build, ask eager, export in every way; cells go to `cells.json` as they come"
    import fastai_compile # noqa: F401, gives `learn.export` the keyword
    from fastai.learner import load_learner
    learn = build(name, path)
    learn.export((path / "stock.pkl").resolve())
    rows = items(name, path)
    want = {} if FAMILIES[name].refused else answers(learn, rows)
    torch.save({"rows": rows, "want": want}, path / "want.pt")
    cells = {}
    for backend in backends:
        for way in WAYS:
            source = learn if way == "with data" else load_learner(path / "stock.pkl")
            cells[f"{way}/{backend}"] = _export(source, name, way, backend, path)
            write(path / "cells.json", cells)


def open_and_compare(file: str, path: Path) -> None:
    "In a process of its own: open one file with stock `load_learner` and compare; the outcome goes to `opened.json`"
    import fastai.collab, fastai.tabular.all, fastai.text.all, fastai.vision.all # noqa: F401, so that load_s holds the load alone
    from fastai.learner import load_learner
    kept = torch.load(path / "want.pt", weights_only=False)
    start = time.perf_counter()
    learn = load_learner(file)
    load_s = time.perf_counter() - start
    result, worst = compare(answers(learn, kept["rows"], list(kept["want"])), kept["want"])
    write(path / "opened.json", {"result": result, "max_diff": worst, "load_s": load_s, "compared": list(kept["want"])})


def _run(*args, timeout=1800) -> str:
    "Run this script in a fresh process; '' or what went wrong"
    try: run = subprocess.run([sys.executable, "-W", "ignore", __file__, *map(str, args)], env=child_env(), timeout=timeout,
                              capture_output=True, text=True)
    except subprocess.TimeoutExpired: return f"took more than {timeout} s"
    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
    return "" if run.returncode == 0 else f"exit code {run.returncode}: {last[:500]}"


def run_family(name: str, backends: list, path: Path) -> dict:
    "The cells of one family: {'way/backend': cell}"
    if lacks(name): return {f"{w}/{b}": {"result": f"{NOT_RUN}: {lacks(name)} is missing"} for w in WAYS for b in backends}
    path.mkdir(parents=True, exist_ok=True)
    error = _run("--make", name, "--work", path, "--backends", *backends)
    cells = json.loads((path / "cells.json").read_text()) if (path / "cells.json").exists() else {}
    for key in (f"{w}/{b}" for w in WAYS for b in backends):
        cell = cells.setdefault(key, {"result": f"failed, {error}"})
        if cell["result"] != "exported": continue
        (path / "opened.json").unlink(missing_ok=True)
        wrong = _run("--open", path / cell.pop("file"), "--work", path)
        cell.update({"result": f"failed to open, {wrong}"} if wrong else json.loads((path / "opened.json").read_text()))
    return cells


def without_old_runs(data: dict) -> dict:
    "Without the runs of which no cell is left"
    used = sorted({c["run"] for c in data["cells"].values()})
    cells = {k: {**c, "run": used.index(c["run"])} for k, c in data["cells"].items()}
    return {"runs": [data["runs"][i] for i in used], "cells": cells}


# ---- tables
def load(out: Path = OUT) -> dict:
    "What was measured so far"
    return json.loads(Path(out).read_text()) if Path(out).exists() else {"runs": [], "cells": {}}


def _number(v, form): return NOT_RUN if v is None else format(v, form)


def full_table(out: Path = OUT) -> str:
    "Every cell, as Markdown"
    cells, rows = load(out)["cells"], []
    for name, family in FAMILIES.items():
        for way in WAYS:
            for backend in BACKENDS:
                c = cells.get(f"{name}/{way}/{backend}", {"result": NOT_RUN})
                rows.append({"family": family.title, "learner": way + (", `items=` given" if c.get("items_given") else ""),
                    "backend": backend, "result": c["result"], "largest difference": _number(c.get("max_diff"), ".1e"),
                    "export s": _number(c.get("export_s"), ".1f"), "MB": _number(c.get("mb"), ".1f"),
                    "load s": _number(c.get("load_s"), ".2f"), "ms eager": _number(c.get("ms_eager"), ".2f"),
                    "ms compiled": _number(c.get("ms_compiled"), ".2f")})
    return table(rows)


def short_table(out: Path = OUT) -> str:
    "One row for each family: with data / without data, for each backend, as Markdown"
    cells, rows = load(out)["cells"], []
    for name, family in FAMILIES.items():
        results = {b: [cells.get(f"{name}/{w}/{b}", {"result": NOT_RUN})["result"] for w in WAYS] for b in BACKENDS}
        rows.append({"learner": family.title, **{b: " / ".join(dict.fromkeys(r)) for b, r in results.items()}})
    return table(rows)


def describe(out: Path = OUT) -> str:
    "The tables, and where they were measured"
    runs = load(out)["runs"]
    return "\n\n".join([full_table(out), *[f"Run {i}: {timed(r)}" for i, r in enumerate(runs)]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME",
                        help=f"default: all of {', '.join(FAMILIES)}")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT, help="cells are added to what is there; default: %(default)s")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of --out")
    for name in ("--make", "--open"): parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="load_learner")
    if args.make: make(args.make, args.backends, args.work)
    elif args.open: open_and_compare(args.open, args.work)
    elif args.table: print(describe(args.out))
    else: return run_all(args)
    return 0


def run_all(args) -> int:
    "Run the families one after the other, and write after each"
    bad, run = 0, facts()
    for name in args.families:
        with tempfile.TemporaryDirectory() as tmp: cells = run_family(name, args.backends, Path(tmp) / name)
        data = load(args.out)
        if run not in data["runs"]: data["runs"].append(run)
        for key, cell in cells.items():
            bad += not cell["result"].startswith(("same", "refused", NOT_RUN))
            data["cells"][f"{name}/{key}"] = {**cell, "run": data["runs"].index(run)}
            print(f"{name:24} {key:28} {cell['result']}  {cell.get('message', '')[:160]}", flush=True)
        write(args.out, without_old_runs(data))
    return min(bad, 1)


if __name__ == "__main__": sys.exit(main())
