"""From process start to first answer: the stock file and compiled ones, in turn, each time in a fresh process."""
import argparse
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastai.vision.all import PILImage, resnet18
from fastai_compile.bench import next_item
from fastai_compile.cold import PARTS, cold_start
from fastai_compile.contenders import write_stock
from fastai_compile.stages import bench_items
from benchmarks.common import RESULTS, facts, kept, parse, table, timed, write
from benchmarks.families_data import classifier
from benchmarks.model import _table_learner

OUT = RESULTS / "cold.json"
MODELS = {"resnet18": lambda path, size: classifier(resnet18, path, size),
          "convnext_tiny": lambda path, size: classifier("convnext_tiny", path, size), "tabular": _table_learner}


def _item(learn, path):
    "One raw input; a photograph as a file"
    item = next_item(bench_items(learn)[0])
    if not hasattr(item, "shape") or getattr(item, "ndim", 1) < 2: return item
    PILImage.create(item).save(path / "item.png")
    return path / "item.png"


def measure(name: str, backends: list, size: int, runs: int, path: Path) -> dict:
    "Cold starts of the stock file and of one compiled file for each backend"
    path.mkdir(parents=True, exist_ok=True)
    learn, files = MODELS[name](path, size), {"stock file": path.resolve() / "stock.pkl"}
    write_stock(learn, files["stock file"])
    for b in backends:
        files[b] = path.resolve() / f"{b}.pkl"
        with learn.no_bar(): learn.export(files[b], compile=b)
    found = cold_start(files, _item(learn, path.resolve()), runs)
    def facts_of(k): return {"size_mb": files[k].stat().st_size / 1e6, "failed": found[k].failed, "runs": found[k].runs}
    return {"model": name, "size": size, "files": {k: facts_of(k) for k in found}}


def _shown(runs, part):
    "Median and range of one part"
    values = [r[part] for r in runs if r[part] is not None]
    if not values: return ""
    digits = 0 if part == "peak_mb" else 2
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def describe(data: dict) -> str:
    rows = []
    for m in data["results"]:
        for k, f in m["files"].items():
            parts = {p.replace("_", " "): _shown(f["runs"], p) for p in PARTS}
            rows.append({"model": m["model"], "file": k, "MB": f"{f['size_mb']:.1f}", **parts, "failed": f["failed"]})
    runs = {}
    for m in data["results"]: runs.setdefault(timed(m["run"]), []).append(m["model"])
    what = ("Seconds, median and range of fresh processes; `start`: until Python runs, `import`: fastai and torch, "
            "`load`: `load_learner` with what the file imports, `first`: the first `predict`. Files are cached.")
    return "\n\n".join([table(rows), what, *[f"{', '.join(names)}: {run}" for run, names in runs.items()]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    backends = ["eager", "onnxruntime", "inductor"]
    parser.add_argument("--backends", nargs="+", default=backends, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="pixels, default: %(default)s")
    parser.add_argument("--runs", type=int, default=7, help="fresh processes for each file, default: %(default)s")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    run, data = facts(), {"results": kept(args.out, args.models)}
    with tempfile.TemporaryDirectory() as tmp:
        for name in args.models:
            data["results"].append({**measure(name, args.backends, args.size, args.runs, Path(tmp) / name), "run": run})
            write(args.out, data)
    print(describe(data))
    return int(any(f["failed"] for m in data["results"] for f in m["files"].values()))


if __name__ == "__main__": sys.exit(main())
