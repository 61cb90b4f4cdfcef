"""Many items: fastai's `get_preds` with 0, 1 and 2 workers, ours and `predict_many`, around the same compiled model.

Photographs are files of many sizes; the table is one frame. The answers are compared before anything is timed: they are
equal bit for bit, but for larger batches than fastai's, in which the runtime sums in another order, and `fast_images`. Each
side runs over everything once a round, one after the other. The floor runs along: decoding and resizing alone by as many
threads, the model alone on batches that are ready. Both keep all CPUs busy, so nothing can take less than their sum.
"""
import argparse
import sys
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from benchmarks import by_hand
from benchmarks.common import RESULTS, facts, kept, parse, table, timed, write
from benchmarks.photographs import SIZE, frame, photographs, table_rows, vision_model

OUT = RESULTS / "bulk.json"
GOALS = {"tabular": 20, "mobilenetv3_small_100": 4}
BEST = "the fastest of fastai"
LARGE = 4096
OTHER = f"predict_many, {LARGE} rows a batch"
NEAR = "predict_many, fast_images (approximate)"


def opened(learn, work: Path, threads: int, **choices) -> tuple:
    "The learner as its compiled file opens, and once more for fastai, whose loop asks for weights: they are watched then"
    from fastai.learner import load_learner
    from fastai_compile.lean import patch_lean
    patch_lean()
    learn.export((work / "m.pkl").resolve(), compile="onnxruntime", threads=threads, **choices)
    return load_learner(work / "m.pkl"), load_learner(work / "m.pkl")


def model_alone(learn, work: Path, n: int, bs: int, threads: int):
    "The model by hand on `n` rows that are ready, `bs` at a time"
    xb = tuple(x.as_subclass(torch.Tensor).contiguous() for x in learn.dls.valid.one_batch()[:learn.dls.n_inp])
    engine = by_hand.onnxruntime_engine(by_hand.onnx_file(learn.model.eval(), xb, work / "hand.onnx"), threads)
    rows = [torch.cat([x[:1]] * bs).numpy() for x in xb]
    def run():
        for i in range(0, n, bs): engine(*[x[:n - i] for x in rows])
    return run


class Stream:
    "A stream of answers: looked at one by one where it is timed, put together where it is compared"
    def __init__(self, read): self.read = read # read: calls the function it gets with the stream
    def __call__(self): self.read(lambda rows: deque(rows, maxlen=0))
    def answers(self): return self.read(lambda rows: torch.stack([p for *_, p in rows]))


def pictures(model: str, work: Path, n: int, threads: int) -> tuple:
    "({name: function}, the floor: {name: function})"
    learn, *_ = vision_model(model, work)
    files, model_only = photographs(work / "many", n), model_alone(learn, work, n, 32, threads)
    def decoded():
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(lambda f: by_hand.resize(by_hand.decode(f), SIZE), files), maxlen=0)
    learn, again = opened(learn, work, threads)
    def loader(workers): return learn.dls.test_dl(files, bs=32, num_workers=workers)
    def stock(workers): return lambda: type(learn).get_preds.stock(again, dl=loader(workers))[0]
    fns = {f"fastai, {w} workers": stock(w) for w in (0, 1, 2)}
    fns["get_preds"] = lambda: learn.get_preds(dl=loader(0))[0]
    def near(use):
        with learn.fast_images(files[:8]): return use(learn.predict_many(files, bs=32))
    fns |= {"predict_many": Stream(lambda use: use(learn.predict_many(files, bs=32))), NEAR: Stream(near)}
    return fns, {"decode and resize": decoded, "model alone": model_only}


def rows(model: str, work: Path, n: int, threads: int) -> tuple:
    "({name: function}, the floor: {name: function})"
    learn, *_ = table_rows(work)
    model_only = model_alone(learn, work, n, 64, threads)
    (learn, again), df = opened(learn, work, threads, max_bs=LARGE), frame(n, seed=1).drop(columns="y")
    def loader(): return learn.dls.test_dl(df, bs=64)
    def many(bs): return Stream(lambda use: use(learn.predict_many(df, bs=bs)))
    return {"fastai": lambda: type(learn).get_preds.stock(again, dl=loader())[0],
            "get_preds": lambda: learn.get_preds(dl=loader())[0], "predict_many": many(64),
            OTHER: many(LARGE)}, {"model alone, 64 rows a batch": model_only}


def in_turn(fns: dict, rounds: int) -> dict:
    "{name: milliseconds of each round}; every round begins with another one"
    ms, names = {k: [] for k in fns}, list(fns)
    for i in range(rounds):
        for k in names[i % len(names):] + names[:i % len(names)]:
            start = time.perf_counter()
            fns[k]()
            ms[k].append((time.perf_counter() - start) * 1e3)
    return ms


def measure(model: str, n: int, threads: int, rounds: int) -> dict:
    from fastai_compile.timing import Timing, ratio
    with tempfile.TemporaryDirectory() as tmp:
        fns, floor = (rows if model == "tabular" else pictures)(model, Path(tmp), n, threads)
        answers = {k: f.answers() if isinstance(f, Stream) else f() for k, f in fns.items()} # and the warm-up of each
        first = next(iter(answers.values()))
        off = {k: (first - a).abs().max().item() for k, a in answers.items()}
        assert all(v < 1e-5 if k == OTHER else v == 0 for k, v in off.items() if k != NEAR), f"{model}: the answers differ: {off}"
        agree = {k: (first.argmax(1) == a.argmax(1)).float().mean().item() for k, a in answers.items()}
        times = {k: Timing(tuple(ms), 1) for k, ms in in_turn(fns | floor, rounds).items()}
    best = min((k for k in fns if k.startswith("fastai")), key=lambda k: times[k].median_ms)
    def ratios(k):
        r = ratio(times[best], times[k])
        return [r.median, r.low, r.high]
    return {"items": n, "largest difference": off, "same class": agree, "best of fastai": best, "floor": list(floor),
            "s": {k: t.median_ms / 1e3 for k, t in times.items()},
            "times faster": {k: ratios(k) for k in fns if not k.startswith("fastai")}}


def describe(data: dict) -> str:
    "The result as Markdown"
    lines = []
    for m in data["results"]:
        for k, (med, low, high) in m["times faster"].items():
            lines.append({"model": m["model"], "items": m["items"], "": k, "s": f"{m['s'][k]:.3g}",
                          BEST: f"{m['s'][m['best of fastai']]:.3g} s ({m['best of fastai']})",
                          "times faster": f"{med:.3g} ({low:.3g} to {high:.3g})", "goal": GOALS.get(m["model"], ""),
                          "floor s": " + ".join(f"{m['s'][p]:.3g} ({p})" for p in m["floor"]),
                          "largest difference": f"{m['largest difference'][k]:.2g}", "same class": f"{m['same class'][k]:.2%}"})
    runs = [f"{m['model']}: {timed(m['run'])}" for m in data["results"]]
    return "\n\n".join([table(lines), *runs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenetv3_small_100", "tabular"])
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    run, data = facts(), {"results": kept(args.out, args.models)}
    for model in args.models:
        n = args.rows if model == "tabular" else args.pictures
        data["results"].append({"model": model, **measure(model, n, args.threads, args.rounds), "run": run})
        write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
