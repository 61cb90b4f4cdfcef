"""One item end to end: fastai's `learn.predict`, ours, and ONNX Runtime by hand, in one interleaved run.

The item is a file on disk (a photograph that comes with scikit-learn) or a row of a table. `stock` is fastai's own method
around the same compiled model, so that what differs is what stands around the model; `eager` is fastai with PyTorch's model;
`by hand` is what a tutorial of ONNX Runtime does with PIL and numpy, for the answer alone. Ours equals `stock` bit for bit:
that is checked before anything is timed.
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
from benchmarks.common import RESULTS, facts, table, where, write
from benchmarks.photographs import table_rows, vision_model

OUT = RESULTS / "predict.json"
MODELS = ("resnet18", "mobilenetv3_small_100", "tabular")
GOALS = {"tabular": 60, "mobilenetv3_small_100": 8, "resnet18": 3}


def softmax(x):
    "Rows of scores to probabilities"
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def session_of(model, xb: tuple, path: Path, threads: int):
    "ONNX Runtime as its tutorials open a model"
    import onnxruntime
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, xb, dynamic_shapes=tuple({0: batch} for _ in xb), strict=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def picture_by_hand(session, file: Path, size: int):
    "Decode, shorter side to `size`, centre, normalize, run"
    from PIL import Image
    name, vocab = session.get_inputs()[0].name, ["china", "flower"]
    mean, std = np.array([.485, .456, .406], np.float32), np.array([.229, .224, .225], np.float32)
    def run():
        im = Image.open(file).convert("RGB")
        w, h = im.size
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        im = im.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        x = ((np.asarray(im, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
        probs = softmax(session.run(None, {name: np.ascontiguousarray(x)})[0])
        return vocab[int(probs[0].argmax())], probs[0]
    return run


def row_by_hand(session, learn, row):
    "Look up the codes, normalize the numbers, run"
    from fastai.tabular.all import Categorify, FillMissing, Normalize
    procs = {type(p): p for p in learn.dls.train_ds.procs.fs}
    codes = {c: {v: i for i, v in enumerate(vs)} for c, vs in procs[Categorify].classes.items()}
    gaps, norm, names = procs[FillMissing].na_dict, procs[Normalize], [i.name for i in session.get_inputs()]
    cats, conts = list(learn.dls.train_ds.cat_names), list(learn.dls.train_ds.cont_names)
    def run():
        flags = {f"{c}_na": row[c] != row[c] for c in gaps}
        x = np.array([[codes[c].get(flags[c] if c in flags else row[c], 0) for c in cats]], np.int64)
        nums = [((gaps[c] if row[c] != row[c] else row[c]) - norm.means[c]) / norm.stds[c] for c in conts]
        probs = softmax(session.run(None, dict(zip(names, (x, np.array([nums], np.float32)))))[0])
        return int(probs[0].argmax()), probs[0]
    return run


def same(a, b) -> bool:
    "Whether two answers of `predict` have the same tensors"
    return all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True)) and str(a[0]) == str(b[0])


def contenders(model: str, work: Path, threads: int) -> dict:
    "{name: function without arguments}; checked to agree"
    from fastai.learner import Learner, load_learner
    from fastai_compile.lean import patch_lean
    patch_lean()
    tab = model == "tabular"
    learn, item, size = table_rows(work) if tab else vision_model(model, work)
    get_preds = Learner.get_preds
    by_fastai = type(learn).predict.stock
    learn.export((work / "m.pkl").resolve(), compile="onnxruntime", threads=threads)
    ours, eager = load_learner(work / "m.pkl"), learn
    xb = tuple(x.as_subclass(torch.Tensor).contiguous() for x in learn.dls.valid.one_batch()[:-1])
    session = session_of(learn.model.eval(), xb, work / "hand.onnx", threads)
    hand = row_by_hand(session, learn, item) if tab else picture_by_hand(session, item, size)
    def stock(o):
        Learner.get_preds = get_preds.stock
        try: return by_fastai(o, item)
        finally: Learner.get_preds = get_preds
    assert same(ours.predict(item), stock(ours)), f"{model}: ours is not what fastai answers"
    off = np.abs(hand()[1] - ours.predict(item)[2].numpy()).max()
    assert off < 1e-3, f"{model}: the script by hand answers something else ({off:.2g})"
    return {"ours": lambda: ours.predict(item), "stock": lambda: stock(ours), "eager": lambda: stock(eager), "by hand": hand}


def measure(model: str, threads: int, rounds: int) -> dict:
    from fastai_compile.timing import interleave, ratio
    with tempfile.TemporaryDirectory() as tmp:
        fns = contenders(model, Path(tmp), threads)
        times = interleave(fns, rounds=rounds)
    res = {"ms": {k: [t.median_ms, min(t.rounds_ms), max(t.rounds_ms)] for k, t in times.items()}}
    for k in fns:
        r = ratio(times[k], times["ours"])
        res[f"{k} / ours"] = [r.median, r.low, r.high]
    return res


def describe(data: dict) -> str:
    "The result as Markdown"
    rows = []
    for model, m in data["models"].items():
        row = {"model": model, "ours ms": f"{m['ms']['ours'][0]:.3g}"}
        for k in ("stock", "eager", "by hand"):
            med, low, high = m[f"{k} / ours"]
            row[f"{k} takes, times ours"] = f"{med:.3g} ({low:.3g} to {high:.3g})"
        rows.append({**row, "goal, against eager": GOALS.get(model, "")})
    note = "" if data["run"]["load_at_start"] < .5 else \
        f"Load {data['run']['load_at_start']} at the start: other programs ran, these figures are not final."
    return "\n\n".join(filter(None, [table(rows), note, where(data["run"])]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm or torchvision names, or `tabular`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of --out")
    args = parser.parse_args()
    if args.table: return print(describe(json.loads(args.out.read_text()))) or 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    data = {"run": facts(), "models": {}}
    for model in args.models:
        data["models"][model] = measure(model, args.threads, args.rounds)
        write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
