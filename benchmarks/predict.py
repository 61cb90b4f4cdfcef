"""One item end to end: fastai's `learn.predict`, ours, and scripts by hand, in one interleaved run.

The item is a file on disk (a photograph that comes with scikit-learn), a row of a table, two users with their films
(fastai fails on one), or a text. `stock` is fastai's own method around the same compiled model, so that what differs is
what stands around the model; `eager` is fastai with PyTorch's model; `by hand` are scripts for the answer alone, as the
tutorials of ONNX Runtime and OpenVINO write them; `fastinference` is the way of that package. Ours equals `stock` bit for
bit: that is checked before anything is timed, and the scripts by hand must agree within 1e-3. Decoding, resizing and the
model, one after another and nothing else, run along as the floor: what ours takes beyond it is its overhead. Scripts by hand
leave ONNX Runtime's threads as they are: they spin between calls and keep the CPUs busy. Ours stop; `SPIN` is ours with
threads that spin.
"""
import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from benchmarks import by_hand
from benchmarks.common import RESULTS, SPIN_S, facts, parse, table, timed, write
from benchmarks.photographs import ITEMS

OUT = RESULTS / "predict.json"
GOALS = {"tabular": 60, "mobilenetv3_small_100": 8, "resnet18": 3, "convnext_tiny": 2, "text, 20 words": 2,
         "text, 200 words": 2}
HANDS = ("ONNX Runtime by hand", "OpenVINO by hand", "fastinference")
SPIN, FLOOR = "ours, threads spin", "floor"
PARTS = ("decode", "resize", "model alone", FLOOR)
SPINNING = {"session": {"session.force_spinning_stop": "0"}}


def same(a, b) -> bool:
    "Whether two answers of `predict` have the same tensors"
    return all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)) and str(a[0]) == str(b[0])


def answer(learn, kind: str, item) -> tuple:
    "(decoded, prediction, probabilities). fastai's `predict` takes no pairs of a collab learner: its `get_preds` answers"
    if kind != "pairs": return learn.predict(item)
    preds = learn.get_preds(dl=learn.dls.test_dl(item))[0]
    return "", preds, preds


def by_fastai(learn, kind: str, item) -> tuple:
    "The same by fastai's own methods, whatever stands in their places now"
    from fastai.learner import Learner
    cls, names = type(learn), ("predict", "get_preds")
    lean = [(c, n, vars(c)[n]) for c in {cls, Learner} for n in names if n in vars(c)]
    for c, n, f in lean: setattr(c, n, f.stock)
    try: return answer(learn, kind, item)
    finally:
        for c, n, f in lean: setattr(c, n, f)


def scripts(kind: str, learn, item, size: int, work: Path, threads: int) -> tuple:
    "({name: function, or why there is none}, the parts of ours that cannot be saved)"
    if kind == "text": return {}, {}
    xb = tuple(x.as_subclass(torch.Tensor).contiguous() for x in learn.dls.valid.one_batch()[:learn.dls.n_inp])
    try: file = by_hand.onnx_file(learn.model.eval(), xb, work / "hand.onnx")
    except Exception as e: return dict.fromkeys(HANDS, f"no ONNX file by hand: {type(e).__name__}"), {}
    one = [x[:1].numpy() for x in xb]
    ort = by_hand.onnxruntime_engine(file, threads)
    def script(engine):
        return by_hand.picture(engine, item, size) if kind == "picture" else getattr(by_hand, kind)(engine, learn, item)
    hands = {HANDS[0]: script(ort), HANDS[2]: by_hand.as_fastinference(ort, learn, kind, item)}
    try:
        hands[HANDS[1]] = script(by_hand.openvino_engine(file, threads))
        hands[HANDS[1]]()
    except RuntimeError as e: hands[HANDS[1]] = f"failed: {str(e).strip().splitlines()[-1]}"
    parts = {"model alone": lambda: ort(*one)}
    if kind == "picture":
        im = by_hand.decode(item)
        parts |= {"decode": lambda: by_hand.decode(item), "resize": lambda: by_hand.resize(im, size)}
        parts[FLOOR] = lambda: (by_hand.resize(by_hand.decode(item), size), ort(*one))
    return hands, parts


def ready(learn, item):
    "The compiled model on a batch that is ready"
    from fastai_compile.predict import batch_of, plan_of
    _, b = batch_of(plan_of(learn), item)
    xs = [x.as_subclass(torch.Tensor).contiguous() for x in b[:learn.dls.n_inp]]
    def run():
        with torch.no_grad(): return learn.model(*xs)
    return run


def contenders(model: str, work: Path, threads: int) -> tuple:
    "({name: function without arguments}, names of parts, {name: why it is missing}); checked to agree"
    from fastai.learner import load_learner
    from fastai_compile.lean import patch_lean
    patch_lean()
    kind, make = ITEMS[model]
    learn, item, size = make(work)
    learn.export((work / "m.pkl").resolve(), compile="onnxruntime", threads=threads)
    learn.export((work / "spin.pkl").resolve(), compile="onnxruntime", threads=threads, options=SPINNING)
    ours, again = (load_learner(work / "m.pkl") for _ in range(2)) # fastai's loop asks for weights: these are watched then
    spin = load_learner(work / "spin.pkl")
    hands, parts = scripts(kind, learn, item, size, work, threads)
    assert ours.why_not_lean() == "", ours.why_not_lean()
    assert same(answer(ours, kind, item), by_fastai(again, kind, item)), f"{model}: ours is not what fastai answers"
    failed = {k: f for k, f in hands.items() if isinstance(f, str)}
    hands = {k: f for k, f in hands.items() if k not in failed}
    for k, f in hands.items():
        off = np.abs(f() - answer(ours, kind, item)[2].numpy()).max()
        assert off < 1e-3, f"{model}, {k}: it answers something else ({off:.2g})"
    if not parts: parts = {"model alone": ready(ours, item)}
    fns = {"ours": lambda: answer(ours, kind, item), SPIN: lambda: answer(spin, kind, item),
           "stock": lambda: by_fastai(again, kind, item), "eager": lambda: by_fastai(learn, kind, item)}
    return fns | hands | parts, list(parts), failed


def measure(model: str, threads: int, rounds: int) -> dict:
    from fastai_compile.timing import interleave, ratio
    with tempfile.TemporaryDirectory() as tmp:
        fns, parts, failed = contenders(model, Path(tmp), threads)
        times = interleave(fns, rounds=rounds, more_s=30, budget_s=60, pause_s=SPIN_S)
    res = {"ms": {k: [t.median_ms, min(t.rounds_ms), max(t.rounds_ms)] for k, t in times.items()}, "parts": parts,
           "failed": failed}
    for k in fns:
        for own in ("ours", SPIN):
            if k in parts or k in ("ours", SPIN): continue
            r = ratio(times[k], times[own])
            res[f"{k} / {own}"] = [r.median, r.low, r.high]
    return res


def _ratio(r, missing: str) -> str: return "{:.3g} ({:.3g} to {:.3g})".format(*r) if r else missing


def describe(data: dict) -> str:
    "The result as Markdown"
    rows, limits = [], []
    for model, m in data["models"].items():
        row = {"model": model, "ours ms": f"{m['ms']['ours'][0]:.3g}"}
        for k in ("stock", "eager", *HANDS):
            row[f"{k} takes, times ours"] = _ratio(m.get(f"{k} / ours"), m["failed"].get(k, "not written"))
        parts = {k: m["ms"][k][0] for k in m["parts"]}
        floor = parts.get(FLOOR, parts.get("model alone"))
        row["goal, against eager"] = GOALS.get(model, "")
        beyond = f"{m['ms']['ours'][0] - floor:.3g}" if floor else ""
        limits.append({"model": model, **{f"{k} ms": f"{parts[k]:.3g}" if k in parts else "" for k in PARTS},
                       "ours ms": row["ours ms"], "ours beyond the floor, ms": beyond,
                       f"{SPIN}, ms": f"{m['ms'][SPIN][0]:.3g}",
                       f"{HANDS[0]} takes, times that": _ratio(m.get(f"{HANDS[0]} / {SPIN}"), ""),
                       "eager takes, times the floor": f"{m['ms']['eager'][0] / floor:.3g}" if floor else ""})
        rows.append(row)
    runs = {timed(m["run"]): [] for m in data["models"].values()}
    for model, m in data["models"].items(): runs[timed(m["run"])].append(model)
    return "\n\n".join([table(rows), table(limits), *[f"{'; '.join(models)}: {run}" for run, models in runs.items()]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(ITEMS), default=list(ITEMS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    run, data = facts(), {"models": json.loads(args.out.read_text())["models"] if args.out.exists() else {}}
    for model in args.models:
        data["models"][model] = {"run": run, **measure(model, args.threads, args.rounds)}
        data["models"] = {k: data["models"][k] for k in ITEMS if k in data["models"]}
        write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
