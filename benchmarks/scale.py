"""How time and memory grow with batch, rows, image size, threads, model and the number of images: eager and compiled.

Times are of the model alone, both candidates in turn in one process; those of many images are of files to answers, in a
fresh process for each. Memory is the high-water mark of a fresh process that opens the file and answers three batches, or
all the images, above that of one that only imports fastai.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from fastai.torch_core import set_seed
from fastai.vision.all import resnet18, resnet34, resnet50
from fastai_compile import open_learner
from fastai_compile.contenders import write_stock
from fastai_compile.timing import interleave, ratio
from benchmarks.common import RESULTS, child_env, facts, parse, table, timed, write
from benchmarks.families_data import classifier
from benchmarks.model import _table_learner
from benchmarks.photographs import photographs

OUT = RESULTS / "scale.json"
ARCHS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
EAGER = "eager"

CHILD = '''
import json, sys, warnings
warnings.simplefilter("ignore")
from fastai.learner import load_learner
import torch
file, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
if batch:
    learn = load_learner(file)
    shapes = json.loads(sys.argv[4])
    xs = [torch.zeros([batch, *s], dtype=getattr(torch, d)) for s, d in shapes]
    learn.model.eval()
    with torch.no_grad():
        for _ in range(3): learn.model(*xs)
found = [l for l in open("/proc/self/status").read().splitlines() if l.startswith("VmHWM")]
print("PEAK", int(found[0].split()[1]) / 1024)
'''


STREAM = '''
import sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from fastai.learner import load_learner
import torch
file, folder, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
learn, files = load_learner(file), sorted(Path(folder).rglob("*.jpg"))[:n]
with learn.no_bar():
    learn.predict(files[0])
    start = time.perf_counter()
    if hasattr(learn.model, "payload"): done = sum(1 for _ in learn.predict_many(files))
    else: done = len(learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0])
    seconds = time.perf_counter() - start
assert done == n
found = [l for l in open("/proc/self/status").read().splitlines() if l.startswith("VmHWM")]
print("FOUND", seconds, int(found[0].split()[1]) / 1024)
'''


def stream(file, folder, n: int, threads: int) -> dict:
    "Seconds from `n` files of photographs to all answers, and the high-water mark, in a fresh process"
    command = [sys.executable, "-c", STREAM, str(file), str(folder), str(n), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env(), timeout=1800)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    s, mb = map(float, next(line for line in done.stdout.splitlines() if line.startswith("FOUND")).split()[1:])
    return {"s": s, "peak_mb": mb}


def streams(args, files, folder, empty_mb: float):
    "A row for each number of images: stock fastai's `get_preds`, and `predict_many` of the compiled file"
    photographs(folder, max(args.images))
    threads = torch.get_num_threads()
    _, paths = files("resnet18", args.size, threads)
    for n in args.images:
        print(f"images: {n}", flush=True)
        row = {k: stream(path, folder, n, threads) for k, path in paths.items()}
        for found in row.values(): found["peak_mb"] -= empty_mb
        yield {"images": n, "size": args.size, **row}


def peak_mb(file, batch: int, threads: int, shapes: list) -> float:
    "High-water mark of a fresh process; with batch 0 of one that only imports"
    command = [sys.executable, "-c", CHILD, str(file), str(batch), str(threads), json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env(), timeout=600)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return float(next(line for line in done.stdout.splitlines() if line.startswith("PEAK")).split()[1])


def points(args) -> list:
    "(axis, model, image size, batch, threads)"
    cores = torch.get_num_threads()
    res = [("batch", "resnet18", args.size, b, cores) for b in args.batches]
    res += [("rows", "tabular", 0, b, cores) for b in args.rows]
    res += [("image size", "resnet18", s, 1, cores) for s in args.sizes]
    res += [("threads", "resnet18", args.size, 8, t) for t in dict.fromkeys([1, cores])]
    return res + [("model", m, args.size, 1, cores) for m in args.models]


class Files:
    "A stock and a compiled file of each model and size, made once"
    def __init__(self, folder, backend): self.folder, self.backend, self.made = folder, backend, {}
    def __call__(self, model, size, threads):
        key = model, size, threads
        if key in self.made: return self.made[key]
        path = (self.folder / f"{model}{size}-{threads}").resolve()
        path.mkdir(parents=True)
        set_seed(0)
        learn = _table_learner(path, size) if model == "tabular" else classifier(ARCHS[model], path, size)
        write_stock(learn, path / "stock.pkl")
        choices = {"compile": self.backend, "threads": threads, "verify": "numbers", "max_bs": 4096}
        with learn.no_bar(): learn.export(path / "compiled.pkl", **choices)
        self.made[key] = learn.model.eval(), {EAGER: path / "stock.pkl", self.backend: path / "compiled.pkl"}
        return self.made[key]


def _inputs(specs, batch):
    "Random inputs for a compiled model"
    def one(s):
        shape = [batch, *s.shape[1:]]
        return torch.randn(shape, dtype=s.dtype) if s.dtype.is_floating_point else torch.zeros(shape, dtype=s.dtype)
    return [one(s) for s in specs]


def measure(point, files: Files, seconds: float, empty_mb: float) -> dict:
    "Times and memory at one point"
    axis, name, size, batch, threads = point
    print(f"{axis}: {name}, size {size}, batch {batch}, {threads} threads", flush=True)
    eager, paths = files(name, size, threads)
    compiled = open_learner(paths[files.backend]).model
    xs, old = _inputs(compiled.input_specs, batch), torch.get_num_threads()
    shapes = [(list(x.shape[1:]), str(x.dtype)[6:]) for x in xs]
    def run_eager():
        with torch.no_grad(): return eager(*xs)
    torch.set_num_threads(threads)
    calls = {EAGER: run_eager, files.backend: lambda: compiled(*xs)}
    try: times = interleave(calls, round_s=seconds / 20, more_s=seconds)
    finally: torch.set_num_threads(old)
    r = ratio(times[EAGER], times[files.backend])
    found = {k: {"median_ms": t.median_ms, "rounds_ms": t.rounds_ms, "file_mb": paths[k].stat().st_size / 1e6,
                 "peak_mb": peak_mb(paths[k], batch, threads, shapes) - empty_mb} for k, t in times.items()}
    return {"axis": axis, "model": name, "size": size, "batch": batch, "threads": threads, "candidates": found,
            "times_eager": r.median, "low": r.low, "high": r.high}


def describe(data: dict) -> str:
    rows = []
    for m in data["results"]:
        what = m["model"] + (f", {m['size']} px" if m["size"] else "")
        row = {"axis": m["axis"], "model": what, "batch": m["batch"], "threads": m["threads"]}
        for k, c in m["candidates"].items():
            row |= {f"{k} ms": f"{c['median_ms']:.3g}", f"{k} us an item": f"{1e3 * c['median_ms'] / m['batch']:,.0f}",
                    f"{k} MB": f"{c['peak_mb']:.0f}"}
        rows.append({**row, "times eager": f"{m['times_eager']:.2f} ({m['low']:.2f} to {m['high']:.2f})"})
    lines = []
    for m in data["images"]:
        (old, a), (new, b) = ((k, m[k]) for k in (EAGER, data["backend"]))
        line = {"images": f"{m['images']:,}"}
        for k, found, how in ((old, a, "get_preds"), (new, b, "predict_many")):
            line |= {f"{k}: {how} s": f"{found['s']:.3g}", f"{k} ms an image": f"{1e3 * found['s'] / m['images']:.3g}",
                     f"{k} MB": f"{found['peak_mb']:.0f}"}
        lines.append(line)
    what = ("Model alone. MB: the high-water mark of a fresh process that opens the file and answers, over that of one "
            f"that only imports fastai ({data['empty_mb']:.0f} MB).")
    many = "From JPEG files of 400 to 1600 pixels to all answers of a resnet18, one fresh process each, one run:"
    return "\n\n".join([table(rows), what, many, table(lines), timed(data["run"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="onnxruntime", help="default: %(default)s")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 64, 4096], help="of the table")
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 128, 224, 320], help="pixels")
    parser.add_argument("--models", nargs="*", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument("--size", type=int, default=128, help="pixels on the other axes, default: %(default)s")
    parser.add_argument("--images", nargs="+", type=int, default=[50, 200, 800, 3200], help="files, from disk to answers")
    parser.add_argument("--seconds", type=float, default=5, help="of timing for each point, default: %(default)s")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    empty = peak_mb("", 0, torch.get_num_threads(), [])
    data = {"run": facts(), "empty_mb": empty, "backend": args.backend, "results": [], "images": []}
    with tempfile.TemporaryDirectory() as tmp:
        files = Files(Path(tmp), args.backend)
        for p in points(args):
            data["results"].append(measure(p, files, args.seconds, empty))
            write(args.out, data)
        for row in streams(args, files, Path(tmp) / "photographs", empty):
            data["images"].append(row)
            write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
