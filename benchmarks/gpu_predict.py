"""A ConvNeXt-Base on photographs on an NVIDIA GPU, one picture at a time, from the file on disk to the decoded answer.

`stock` is fastai's own `learn.predict` around PyTorch's model on the GPU; `ours` is a file that
`learn.export(compile='inductor:cuda')` wrote, opened by `load_learner`. They take turns at each photograph, in changing order,
and every call is timed: decoding, transforms, both copies, the model and the decoding of the answer. How many labels are the
same stands beside the times.
With `--device cpu` the script tests itself, with ONNX Runtime: that is no measurement, and nothing is written.
"""
import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from fastai.learner import load_learner
from fastai.vision.all import ProgressCallback
from fastai_compile.backends.cuda import PRECISIONS, no_gpu
from benchmarks.common import RESULTS, facts, parse, table, timed, write
from benchmarks.gpu import FOR_P99, _ms, gpu_facts
from benchmarks.photographs import photographs, vision_model
from benchmarks.predict import by_fastai

OUT = RESULTS / "gpu_predict.json"
WARM_UP = 10 # pictures


def stock_on(learn, device: str):
    "The learner with its own model and loaders on `device`"
    learn = copy.deepcopy(learn)
    learn.dls.to(torch.device(device))
    learn.model.to(device)
    return learn


def exported(learn, device: str, precision: str, work: Path):
    "The learner as its compiled file opens"
    more = {"compile": "inductor:cuda", "options": {"precision": precision}} if device == "cuda" else {"compile": "onnxruntime"}
    learn.export((work / f"{precision}.pkl").resolve(), max_bs=2, **more)
    res = load_learner(work / f"{precision}.pkl")
    res.remove_cb(ProgressCallback)
    return res


def in_turn(ways: dict, files: list) -> tuple[dict, dict]:
    "({way: milliseconds of each call}, {way: labels}); a way is a function of a file"
    ms, labels, names = {k: [] for k in ways}, {k: [] for k in ways}, list(ways)
    for i, file in enumerate([*files[:WARM_UP], *files]):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = time.perf_counter()
            label = ways[name](file)[0]
            if i >= len(files[:WARM_UP]):
                ms[name].append((time.perf_counter() - start) * 1e3)
                labels[name].append(str(label))
    return ms, labels


def summary(ms: list, stock_ms: list, same: float) -> dict:
    "Percentiles of one way; `same`: the share of labels that are those of stock"
    every = sorted(ms)
    p99 = every[min(len(every) - 1, int(len(every) * .99))] if len(every) >= FOR_P99 else None
    return {"calls": len(every), "p50_ms": statistics.median(every), "p99_ms": p99, "worst_ms": every[-1],
            "times_stock": statistics.median(s / m for s, m in zip(stock_ms, ms)), "same_labels": same}


def describe(data: dict) -> str:
    "The result as Markdown"
    rows = [{"way": k, "calls": c["calls"], **{f"{p} ms": _ms(c[f"{p}_ms"]) for p in ("p50", "p99", "worst")},
             "times as fast as stock": f"{c['times_stock']:.2f}", "same labels": f"{c['same_labels']:.2%}"}
            for k, c in data["results"].items()]
    card = f"{data['gpu']['name']}, CUDA {data['gpu']['cuda']}" if data["gpu"] else "no GPU"
    return f"{table(rows)}\n\n{data['model']}, {card}; {timed(data['run'])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_base")
    parser.add_argument("--pictures", type=int, default=5000, help=f"a p99 needs {FOR_P99}")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    reason, mend = no_gpu()
    if args.device == "cuda" and reason: return print(f"Nothing was measured: {reason}. {mend}", file=sys.stderr) or 1
    if args.device == "cpu": args.precisions = ["fp32"]
    warnings.simplefilter("ignore")
    run = facts()
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        learn, _, _ = vision_model(args.model, work)
        files = photographs(work / "many", args.pictures)
        stock = stock_on(learn, args.device)
        ways = {"stock": lambda f: by_fastai(stock, "picture", f)}
        for p in args.precisions: ways[f"ours, {p}"] = exported(learn, args.device, p, work).predict
        ms, labels = in_turn(ways, files)
    def same(k): return statistics.mean(a == b for a, b in zip(labels[k], labels["stock"]))
    data = {"run": run, "gpu": gpu_facts() if args.device == "cuda" else None, "model": args.model,
            "results": {k: summary(v, ms["stock"], same(k)) for k, v in ms.items()}}
    print(describe(data))
    if args.device == "cuda": write(args.out, data)
    else: print("\nThis is no GPU measurement: it ran on the CPU, to test the script. Nothing was written.")
    return 0


if __name__ == "__main__": sys.exit(main())
