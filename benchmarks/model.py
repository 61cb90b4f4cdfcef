"""The model alone: eager, channels_last, `torch.compile`, inductor, ONNX Runtime by hand, and what `compile=True` chose.

All candidates of one model and batch are timed in turn in one process, round by round, and compared round by round. A
second copy of the chosen file runs along: what it differs from the first is the spread of the run itself.
"""
import argparse
import copy
import sys
import tempfile
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import pandas as pd
import torch
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.torch_core import set_seed
from fastai.vision.all import resnet18
from fastai_compile import BackendUnavailable, open_learner
from fastai_compile.timing import interleave, ratio
from benchmarks.common import RESULTS, SPIN_S, facts, kept, parse, table, timed, write
from benchmarks.families_data import classifier

OUT = RESULTS / "model.json"
CHOSEN, AGAIN = "compile=True", "compile=True, a second copy"


# ---- the models
def _table_learner(path, size):
    rng, n = np.random.default_rng(0), 256
    df = pd.DataFrame({**{f"cat{i}": rng.integers(0, 20, n).astype(str) for i in range(8)},
                       **{f"cont{i}": rng.normal(size=n) for i in range(8)}, "y": rng.choice(["yes", "no"], n)})
    dls = TabularDataLoaders.from_df(df, path, [Categorify, Normalize], [f"cat{i}" for i in range(8)],
                                     [f"cont{i}" for i in range(8)], "y", valid_idx=list(range(192, n)), bs=32)
    return tabular_learner(dls, layers=[200, 100], path=path)


MODELS = {"resnet18": lambda path, size: classifier(resnet18, path, size),
          "convnext_tiny": lambda path, size: classifier("convnext_tiny", path, size), "tabular": _table_learner}


# ---- the candidates: functions without arguments
def _eager(model, xs):
    def run():
        with torch.no_grad(): return model(*xs)
    return run


def _channels_last(model, xs):
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    def run():
        with torch.no_grad(): return model(*[x.to(memory_format=torch.channels_last) for x in xs])
    return run


def _torch_compile(model, xs):
    compiled = torch.compile(copy.deepcopy(model), dynamic=False)
    def run():
        with torch.no_grad(): return compiled(*xs)
    return run


def _onnx_by_hand(model, xs, path):
    import onnxruntime
    batch = torch.export.Dim("batch", min=1, max=64)
    two = tuple(torch.cat([x, x])[:2].contiguous() for x in xs)
    file = path / "hand.onnx"
    torch.onnx.export(model, two, dynamo=True, verbose=False, dynamic_shapes=tuple({0: batch} for _ in xs)).save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda: [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in zip(names, xs)})]


def _compiled(file, xs):
    model = open_learner(file).model
    return lambda: model(*xs)


def candidates(learn, xs, batch: int, path: Path) -> tuple:
    "({name: function}, backend that `compile=True` chose, seconds to make each, what is missing and why)"
    model, fns, seconds, missing = copy.deepcopy(learn.model).eval(), {}, {}, {}
    chosen, named = path / f"chosen{batch}.pkl", path / f"inductor{batch}.pkl"
    def export(file, backend):
        with learn.no_bar(): return learn.export(file.resolve(), compile=backend, bs=batch)
    def add(name, make):
        start = time.perf_counter()
        try:
            fns[name] = make()
            fns[name]()
            seconds[name] = time.perf_counter() - start
        except Exception as e:
            fns.pop(name, None)
            missing[name] = f"{type(e).__name__}: {str(e)[:300]}"
        print(f"  {name}: {missing.get(name) or f'{seconds[name]:.0f} s to make'}", flush=True)
    backend = export(chosen, True).backend
    def inductor():
        if backend == "inductor": return _compiled(chosen, xs)
        try: export(named, "inductor")
        except BackendUnavailable as e: raise e from None
        return _compiled(named, xs)
    add("eager", lambda: _eager(model, xs))
    if xs[0].ndim == 4: add("channels_last", lambda: _channels_last(model, xs))
    add("torch.compile", lambda: _torch_compile(model, xs))
    add("inductor", inductor)
    add("onnxruntime by hand", lambda: _onnx_by_hand(model, xs, path))
    add(CHOSEN, lambda: _compiled(chosen, xs))
    add(AGAIN, lambda: _compiled(chosen, xs))
    return fns, backend, seconds, missing


# ---- the comparison
def verdict(times: dict) -> dict:
    "Is the chosen one slower than the best by more than the run's own spread?"
    best = min((k for k in times if k != AGAIN), key=lambda k: times[k].median_ms)
    control, r = ratio(times[AGAIN], times[CHOSEN]), ratio(times[CHOSEN], times[best])
    spread = max(abs(control.low - 1), abs(control.high - 1))
    return {"best": best, "ratio_to_best": r.median, "low": r.low, "high": r.high, "spread": spread,
            "holds": r.median - 1 <= spread}


def measure(name: str, batch: int, size: int, rounds: int, round_s: float, path: Path) -> dict:
    "One model at one batch"
    print(f"{name}, batch {batch}", flush=True)
    set_seed(0)
    path.mkdir(parents=True, exist_ok=True)
    learn = MODELS[name](path, size)
    *xb, _ = learn.dls.valid.one_batch()
    xs = [torch.cat([x.as_subclass(torch.Tensor)] * -(-batch // len(x)))[:batch].contiguous() for x in xb]
    fns, backend, seconds, missing = candidates(learn, xs, batch, path)
    times = interleave(fns, rounds=rounds, most=101, more_s=30, round_s=round_s, budget_s=1e9, pause_s=SPIN_S)
    rows = {}
    for k, t in times.items():
        r = ratio(times["eager"], t)
        rows[k] = {"median_ms": t.median_ms, "rounds_ms": t.rounds_ms, "calls": t.calls, "made_in_s": seconds[k],
                   "times_eager": r.median, "low": r.low, "high": r.high}
    return {"model": name, "batch": batch, "input": [list(x.shape) for x in xs], "chosen": backend,
            "rounds": len(times["eager"].rounds_ms),
            "candidates": rows, "missing": missing, "verdict": verdict(times)}


def _row(model, candidate, ms, faster):
    return {"model": model, "candidate": candidate, "ms": ms, "times as fast as eager": faster}


def describe(data: dict) -> str:
    "The result as Markdown: times as fast as eager, with the smallest and largest round"
    rows, lines = [], []
    for m in data["results"]:
        what = f"{m['model']}, batch {m['batch']}"
        for k, c in m["candidates"].items():
            faster = f"{c['times_eager']:.2f} ({c['low']:.2f} to {c['high']:.2f})"
            rows.append(_row(what, f"{k} ({m['chosen']})" if k == CHOSEN else k, f"{c['median_ms']:.3g}", faster))
        rows += [_row(what, k, "failed", why) for k, why in m["missing"].items()]
        v = m["verdict"]
        lines.append(f"- {what}: `compile=True` chose {m['chosen']}; {v['ratio_to_best']:.2f} times the time of the best, "
                     f"{v['best']} ({v['low']:.2f} to {v['high']:.2f}); the run's own spread is {v['spread']:.0%}: "
                     f"{'not slower by more' if v['holds'] else 'SLOWER BY MORE'}")
    holds = all(m["verdict"]["holds"] for m in data["results"])
    lines.append(f"- Never slower than the best by more than the run's own spread: {'holds' if holds else 'DOES NOT HOLD'}")
    runs = {}
    for m in data["results"]: runs.setdefault(timed(m["run"]), []).append(f"{m['model']} {m['batch']}")
    return "\n\n".join([table(rows), "\n".join(lines), *[f"{', '.join(what)}: {run}" for run, what in runs.items()]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--size", type=int, default=224, help="pixels, default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s; at least 7 give an interval of 98%%")
    parser.add_argument("--round-s", type=float, default=0.3, help="aim at so many seconds a candidate and round")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    run, data = facts(), {"results": kept(args.out, args.models, args.batches)}
    with tempfile.TemporaryDirectory() as tmp:
        for name in args.models:
            for batch in args.batches:
                path = Path(tmp) / f"{name}{batch}"
                res = measure(name, batch, args.size, args.rounds, args.round_s, path)
                data["results"].append({**res, "size": args.size, "run": run})
                data["results"].sort(key=lambda m: (list(MODELS).index(m["model"]), m["batch"]))
                write(args.out, data)
    print(describe(data))
    return 0 if all(m["verdict"]["holds"] for m in data["results"]) else 1


if __name__ == "__main__": sys.exit(main())
