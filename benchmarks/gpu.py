"""On an NVIDIA GPU: eager, `torch.compile(mode='reduce-overhead')`, inductor ahead of time with and without CUDA graphs.

Every candidate takes a tensor of the host and gives one back, so the copies to the card and from it are in every figure. The
candidates of one model, batch and precision take turns in one process, and every call is timed. "fp32" is IEEE arithmetic for all
of them; "tf32" lets convolutions and matrix products round their inputs, which PyTorch does for convolutions unless told not to.
With `--device cpu` the script tests itself: that is no measurement, and nothing is written.
"""
import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn
from fastai_compile.backends.base import get_backend
from fastai_compile.backends.cuda import PRECISIONS, Cast, _tf32, no_gpu
from fastai_compile.capture import capture
from fastai_compile.config import make_config
from fastai_compile.errors import CompileError
from fastai_compile.example import Example
from benchmarks.common import RESULTS, facts, parse, table, where, write

OUT = RESULTS / "gpu.json"
EAGER, AOT, GRAPHS = "eager", "inductor AOT", "inductor AOT, CUDA graphs"
FOR_P99 = 459  # so many calls, none of them over, are needed to say with 99% that 99 of 100 are below


# ---- the models: random weights, since only time is measured
def _convnext_base():
    from torchvision.models import convnext_base
    return convnext_base(), 224


def _resnet50():
    from torchvision.models import resnet50
    return resnet50(), 224


def _tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 4)), 32


MODELS = {"convnext_base": _convnext_base, "resnet50": _resnet50, "tiny": _tiny}


# ---- the candidates: functions of a host tensor
def _on(device, module):
    def run(x):
        with torch.no_grad(): return module(x.to(device))[0].to("cpu")
    return run


def _ahead(captured, batch, device, options):
    backend = get_backend("inductor:cuda" if device == "cuda" else "inductor")
    payload = backend.compile(captured, make_config(backend.name, options=options, bs=batch))
    run = backend.load(payload, "cpu", torch.get_num_threads())
    return lambda x: run([x])[0]


def candidates(captured, batch, precision, device):
    "{name: function that makes it}"
    module = Cast(captured.module, PRECISIONS[precision], captured.outputs).to(device)
    res = {EAGER: lambda: _on(device, module)}
    mode = "reduce-overhead" if device == "cuda" else "default"
    res[f"torch.compile(mode={mode!r})"] = lambda: _on(device, torch.compile(copy.deepcopy(module), mode=mode, dynamic=False))
    if device == "cuda":
        for name, graphs in ((AOT, False), (GRAPHS, True)):
            opts = {"precision": precision, "cuda_graphs": graphs, "graph_up_to": batch}
            res[name] = lambda opts=opts: _ahead(captured, batch, device, opts)
    elif precision == "fp32":
        res[AOT] = lambda: _ahead(captured, batch, device, {"freezing": False, "one_thread_up_to": 0})
    return res


# ---- the measurement
def _taken_mb(device):
    if device != "cuda": return 0.
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


def make(makers, x, want, off, device):
    "({name: function}, {name: what making it took}, {name: why it is missing})"
    fns, made, missing = {}, {}, {}
    for name, maker in makers.items():
        before, start = _taken_mb(device), time.perf_counter()
        try:
            fn = maker()
            for _ in range(3): got = fn(x)
        except (CompileError, RuntimeError) as e:
            missing[name] = f"{type(e).__name__}: {str(e)[:300]}"
            continue
        diff = (got - want).abs().max().item()
        if not diff <= off:
            missing[name] = f"wrong by {diff:.3g}, allowed is {off:.3g}"
            continue
        fns[name] = fn
        made[name] = {"made_in_s": time.perf_counter() - start, "gpu_mb": _taken_mb(device) - before,
                      "largest_difference": diff}
    return fns, made, missing


def in_turn(fns, x, calls, rounds):
    "{name: milliseconds of each call}"
    res, names = {k: [] for k in fns}, list(fns)
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            fn, ts = fns[name], []
            for _ in range(3): fn(x)
            for _ in range(-(-calls // rounds)):
                start = time.perf_counter()
                fn(x)
                ts.append((time.perf_counter() - start) * 1e3)
            res[name].append(ts)
    return res


def summary(rounds_ms, eager_ms):
    "p50, p99 where there are enough calls, and how many times as fast as eager, round by round"
    every = sorted(t for ts in rounds_ms for t in ts)
    faster = sorted(statistics.median(e) / statistics.median(t) for e, t in zip(eager_ms, rounds_ms))
    p99 = every[min(len(every) - 1, int(len(every) * 0.99))] if len(every) >= FOR_P99 else None
    return {"calls": len(every), "p50_ms": statistics.median(every), "p99_ms": p99, "times_eager": statistics.median(faster),
            "low": faster[0], "high": faster[-1], "rounds_p50_ms": [statistics.median(ts) for ts in rounds_ms]}


def measure(name, batch, precision, args):
    "One model at one batch in one precision"
    print(f"{name}, batch {batch}, {precision}", flush=True)
    torch.manual_seed(0)
    net, size = MODELS[name]()
    captured = capture(net.eval(), Example((torch.randn(2, 3, size, size),), (), (torch.Tensor,), "random pixels", [0, 1]),
                       max(2, batch))
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad(): want = captured.module(x)[0]
    off = (1e-3 if precision == "fp32" else 0.1) * max(1., want.abs().max().item())
    with _tf32(precision == "tf32"):
        fns, made, missing = make(candidates(captured, batch, precision, args.device), x, want, off, args.device)
        if EAGER not in fns: raise SystemExit(f"eager itself failed: {missing[EAGER]}")
        times = in_turn(fns, x, args.calls, args.rounds)
    rows = {k: {**summary(times[k], times[EAGER]), **made[k]} for k in fns}
    return {"model": name, "batch": batch, "precision": precision, "input": list(x.shape), "candidates": rows, "missing": missing}


def gpu_facts():
    "The card, its driver and its software"
    p = torch.cuda.get_device_properties(0)
    return {"name": p.name, "memory_gb": round(p.total_memory / 1e9, 1), "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _ms(v): return f"{v:.3g}" if v is not None else f"fewer than {FOR_P99} calls"


def describe(data):
    "The result as Markdown"
    rows = []
    for m in data["results"]:
        what = f"{m['model']}, batch {m['batch']}, {m['precision']}"
        for k, c in m["candidates"].items():
            rows.append({"model": what, "candidate": k, "p50 ms": _ms(c["p50_ms"]), "p99 ms": _ms(c["p99_ms"]),
                         "times as fast as eager": f"{c['times_eager']:.2f} ({c['low']:.2f} to {c['high']:.2f})",
                         "MB on the card": f"{c['gpu_mb']:.0f}", "made in s": f"{c['made_in_s']:.0f}",
                         "largest difference": f"{c['largest_difference']:.2g}"})
        rows += [{**dict.fromkeys(rows[0], ""), "model": what, "candidate": f"{k}: {why}"} for k, why in m["missing"].items()]
    g = data["gpu"]
    card = f"{g['name']}, {g['memory_gb']} GB, compute capability {g['capability']}, CUDA {g['cuda']}" if g else "no GPU"
    return f"{table(rows)}\n\n{card}; {where(data['run'])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["convnext_base", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--calls", type=int, default=1000, help=f"of each candidate; a p99 needs {FOR_P99}")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few calls, to test this script")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    if args.tiny: vars(args).update(models=["tiny"], batches=[2], calls=20, rounds=4, precisions=["fp32"])
    reason, mend = no_gpu()
    if args.device == "cuda" and reason: return print(f"Nothing was measured: {reason}. {mend}", file=sys.stderr) or 1
    warnings.simplefilter("ignore")
    data = {"run": facts(), "gpu": gpu_facts() if args.device == "cuda" else None, "results": []}
    for name in args.models:
        for batch in args.batches:
            for precision in args.precisions:
                data["results"].append(measure(name, batch, precision, args))
                if args.device == "cuda": write(args.out, data)
    print(describe(data))
    if args.device == "cpu": print("\nThis is no GPU measurement: it ran on the CPU, to test the script. Nothing was written.")
    return 0


if __name__ == "__main__": sys.exit(main())
