"""How far the model alone is from what this machine could do at best: arithmetic and memory.

Counted are the multiplications and additions of one picture (`torch.utils.flop_counter`) and the bytes of the weights, each of
which has to be read once. Measured, in turn with the model, are the fastest square matrix product and the fastest copy. The
floor is the longer of the two times that follow; no kernel reaches it for every layer.
"""
import argparse
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils.flop_counter import FlopCounterMode
from fastai.learner import load_learner
from fastai_compile.timing import interleave
from benchmarks.common import RESULTS, facts, parse, table, timed, write
from benchmarks.photographs import SIZE, vision_model

OUT = RESULTS / "limits.json"
MODELS = ["mobilenetv3_small_100", "resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224"]
SIDE, COPY = 1536, 2**25 # of the matrices; numbers that are copied


def machine() -> dict:
    "{name: function} of a product of matrices, and of a copy that no cache holds"
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    x, y = torch.randn(COPY), torch.empty(COPY)
    return {"product": lambda: a @ b, "copy": lambda: y.copy_(x)}


def measure(name: str, work: Path, backend: str) -> dict:
    "Counts and times of one model at batch 1"
    learn, _, _ = vision_model(name, work)
    x = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: learn.model.eval()(x)
    learn.export((work / "m.pkl").resolve(), compile=backend, verify="numbers", max_bs=2)
    model = load_learner(work / "m.pkl").model
    def run():
        with torch.no_grad(): return model(x)
    times = interleave(machine() | {"model": run}, most=61, more_s=30, round_s=.3, budget_s=60)
    ms = {k: statistics.median(t.rounds_ms) for k, t in times.items()}
    fastest = {k: min(t.rounds_ms) for k, t in times.items()}
    return {"model": name, "backend": backend, "flop": counter.get_total_flops(),
            "weight_bytes": sum(p.numel() * p.element_size() for p in learn.model.parameters()), "ms": ms, "fastest_ms": fastest}


def floors(m: dict) -> tuple[float, float, float, float]:
    "(GFLOP/s and GB/s of the machine, ms of the arithmetic, ms of the weights)"
    flops, bandwidth = 2 * SIDE**3 / m["fastest_ms"]["product"] * 1e3, 2 * 4 * COPY / m["fastest_ms"]["copy"] * 1e3
    return flops / 1e9, bandwidth / 1e9, m["flop"] / flops * 1e3, m["weight_bytes"] / bandwidth * 1e3


def describe(data: dict) -> str:
    "The result as Markdown"
    rows = []
    for m in data["results"]:
        gflops, gbs, compute, memory = floors(m)
        floor, got = max(compute, memory), m["ms"]["model"]
        rows.append({"model": m["model"], "by": m["backend"], "GFLOP": f"{m['flop'] / 1e9:.2f}",
                     "MB of weights": f"{m['weight_bytes'] / 1e6:.1f}", "GFLOP/s of a product": f"{gflops:.0f}",
                     "GB/s of a copy": f"{gbs:.1f}", "arithmetic ms": f"{compute:.2f}", "weights ms": f"{memory:.2f}",
                     "ours ms": f"{got:.2f}", "ours, times the floor": f"{got / floor:.2f}"})
    return f"{table(rows)}\n\n{timed(data['run'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--backend", default="onnxruntime")
    args = parse(parser, OUT, describe)
    if args is None: return
    warnings.simplefilter("ignore")
    data = {"run": facts(), "results": []}
    for name in args.models:
        with tempfile.TemporaryDirectory() as tmp: data["results"].append(measure(name, Path(tmp), args.backend))
        print(data["results"][-1], flush=True)
        write(args.out, data)
    print(describe(data))


if __name__ == "__main__": main()
