"""What `find_random`, `FreezeTransforms` and `find_breaks` find, case by case, and what they and `explain` cost.

The cases are those of the tests: mistakes that people make in a validation set, pipelines that look like mistakes and are
harmless, and what makes dynamo leave a graph.
"""
import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import random
import numpy as np
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, resnet18, vision_learner
from torch.utils.data import TensorDataset
from fastai_compile import (CompileError, GraphBreakCallback, RandomTransformError, find_breaks, find_random, frozen)
from fastai_compile.reach import difference
from fastai_compile.timing import interleave, ratio
from benchmarks.common import RESULTS, facts, parse, table, where, write
from benchmarks.photographs import photographs

OUT = RESULTS / "diagnose.json"
PARTS = ["costs", "breaks", "harmless", "mistakes"]
POLICIES = ("auto", "valid", "skip", "seed")
OPEN = """
import json, random, sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
sys.path.insert(0, {tests!r})
import numpy as np, torch
from fastai.learner import load_learner
import fastai.callback.progress
from fastai_compile.reach import difference
res = {{}}
for f in sorted(Path({folder!r}).glob('*.pkl')):
    out, items = [], torch.load(f.with_suffix('.items'), weights_only=False)
    wanted = torch.load(f.with_suffix('.wanted'))
    try:
        learn = load_learner(f)
        for seed in (7, 8):
            random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
            with learn.no_bar(): out.append(learn.get_preds(dl=learn.dls.test_dl(items, num_workers=0))[0])
        res[f.stem] = 'yes' if all(difference(o, wanted) is None for o in out) else 'other answers'
    except Exception as e: res[f.stem] = f'{{type(e).__name__}}: {{e}}'[:200]
print('ANSWER' + json.dumps(res))
"""


# ---- what varies
def _preds(learn, seed, **kwargs):
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    return learn.get_preds(**kwargs)[0]


def _frozen(learn, policy, folder):
    "What a policy makes of it: for the validation set, and for items that come later"
    from random_mistakes import items_of
    try:
        with frozen(learn, policy) as rows:
            def later(seed): return _preds(learn, seed, dl=learn.dls.test_dl(items_of(learn, folder), num_workers=0))
            same = all(difference(f(1), f(2)) is None for f in (lambda seed: _preds(learn, seed), later))
            return "; ".join(r["frozen"] for r in rows) if same else "STILL VARIES"
    except RandomTransformError: return "error"


def _fresh(learn, row, folder, out):
    "Freeze, export, and keep the answers for the process that opens the file"
    from random_mistakes import items_of
    policy = next((p for p in ("seed", "skip", "auto") if row[p] not in ("error", "in order", "STILL VARIES")), None)
    if policy is None: return "nothing to freeze"
    try: learn.export(out / f"{row['name']}.pkl", compile="eager", freeze=policy, verify="numbers")
    except CompileError as e: return f"not exported, {type(e).__name__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, items = load_learner(out / f"{row['name']}.pkl"), items_of(learn, folder)
    try: torch.save(_preds(again, 1, dl=again.dls.test_dl(items, num_workers=0)), out / f"{row['name']}.wanted")
    except CompileError as e:
        (out / f"{row['name']}.pkl").unlink()
        return f"not predicted, {type(e).__name__}" # these models of text take one length
    torch.save(items, out / f"{row['name']}.items")
    return policy


def mistakes(folder: Path, out: Path) -> list:
    "One row for each planted mistake"
    import random_mistakes as cases
    rows = []
    for case in cases.MISTAKES:
        learn = case.make(folder)
        found = find_random(learn).random
        row = {"name": case.name, "found": len(found), "as": found[0].name.split(" --")[0] if found else "",
               "named right": len(found) == 1 and case.finds in found[0].name and case.source in found[0].source
               and case.where in found[0].step.where}
        row |= {p: _frozen(learn, p, folder) for p in POLICIES}
        row["fresh process"] = _fresh(learn, row, folder, out)
        rows.append(row)
        print(row, flush=True)
    code = OPEN.format(tests=str(Path(__file__).resolve().parent.parent / "tests"), folder=str(out))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = json.loads(ran.stdout.partition("ANSWER")[2] or "{}")
    for row in rows:
        if row["fresh process"] in POLICIES:
            row["fresh process"] = f"{row['fresh process']}: {said.get(row['name'], 'no answer: ' + ran.stderr[-200:])}"
    return rows


def harmless(folder: Path) -> list:
    "One row for each pipeline in which nothing varies"
    import random_mistakes as cases
    return [{"name": c.name, "false alarms": [f.name for f in find_random(c.make(folder)).random]} for c in cases.HARMLESS]


# ---- graph breaks
def breaks() -> list:
    "One row for each cause of a graph break"
    from break_causes import CAUSES, PATH, Model, line_of
    rows, x = [], torch.linspace(-1, 2, 12).reshape(3, 4)
    for name, cls in CAUSES.items():
        torch._dynamo.reset()
        with contextlib.redirect_stdout(io.StringIO()): found = find_breaks(Model(cls()), x, recompiles=False)
        at = [r for r in found if (r.file, r.line) == line_of(cls)]
        layer = bool(at) and at[0].layer.startswith(PATH)
        rows.append({"name": name, "breaks": len(found), "line right": bool(at), "layer right": layer,
                     "code": at[0].code if at else "", "reason": at[0].reason if at else ""})
    return rows


# ---- what it costs
def _seconds(f, n=3):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        res = f()
        times.append(time.perf_counter() - start)
    return sorted(times)[n//2], res


def _stock(path):
    "What `vision_learner` gives for photographs, with `Resize` and `aug_transforms`"
    files = photographs(path, 20)
    dls = ImageDataLoaders.from_lists(path, files, [i % 2 for i in range(20)], bs=8, num_workers=0, seed=0,
                                      item_tfms=Resize(224), batch_tfms=aug_transforms())
    return vision_learner(dls, resnet18, pretrained=False)


def costs(path: Path) -> dict:
    "Seconds of each look at a stock resnet18 at 224 pixels, and what the callback adds to a training step"
    path.mkdir(parents=True)
    learn, res = _stock(path), {}
    seconds, found = _seconds(lambda: find_random(learn))
    res["find_random, s"], res["of these calls of the model, s"] = seconds, found.model_seconds
    res["find_breaks without recompiles, s"] = _seconds(lambda: find_breaks(learn, recompiles=False), 1)[0]
    res["find_breaks, s"] = _seconds(lambda: find_breaks(learn), 1)[0]
    res["explain, s"] = _seconds(learn.explain, 1)[0]
    with contextlib.redirect_stdout(io.StringIO()): res["callback"] = _callback()
    return res


class _NoValid(Callback):
    def before_validate(self): raise CancelValidException


def _callback():
    "A training step of a tiny compiled model, where any cost would show, with the callback and without"
    ds = TensorDataset(torch.randn(6400, 8), torch.randn(6400, 1))
    def fit(*cbs):
        dls = DataLoaders.from_dsets(ds, ds, bs=64, num_workers=0)
        net = torch.compile(torch.nn.Linear(8, 1), backend="eager")
        learn = Learner(dls, net, loss_func=MSELossFlat(), cbs=[_NoValid(), *cbs])
        def run():
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return run
    fns = {"bare": fit(), "watched": fit(GraphBreakCallback(show=False)), "again": fit()}
    t = interleave(fns, rounds=9, most=31, more_s=30)
    cb, n = GraphBreakCallback(show=False), 2000
    net = torch.compile(torch.nn.Linear(8, 1), backend="eager")
    Learner(DataLoaders.from_dsets(ds, ds, bs=64), net, loss_func=MSELossFlat(), cbs=cb)
    cb._begin()
    start = time.perf_counter()
    for _ in range(n):
        for event in ("before_batch", "after_pred", "after_batch"): cb(event)
    own = (time.perf_counter() - start)/n
    cb._end()
    r, control = ratio(t["watched"], t["bare"]), ratio(t["again"], t["bare"])
    return {"us a step": t["bare"].median_ms*1e3/100, "us of its events": own*1e6, "times with": [r.median, r.low, r.high],
            "times of a second without": [control.median, control.low, control.high]}


def describe(data: dict) -> str:
    "The result as Markdown"
    m, h, b, c = data["mistakes"], data["harmless"], data["breaks"], data["costs"]
    fresh = [r for r in m if ": yes" in r["fresh process"]]
    tried = [r for r in m if r["fresh process"].partition(":")[0] in POLICIES]
    broke = [r for r in b if r["breaks"]]
    cb = c["callback"]
    def spread(x): return f"{x[0]:.2f} ({x[1]:.2f} to {x[2]:.2f})"
    def count(rows, test): return sum(bool(test(r)) for r in rows)
    lines = [
        f"- {len(m)} mistakes: {count(m, lambda r: r['found'] == 1)} found once, {count(m, lambda r: r['named right'])} named "
        f"right; {count(m, lambda r: 'STILL VARIES' in r.values())} vary under a policy that froze them; {len(fresh)} of the "
        f"{len(tried)} that were exported give the same answers in a fresh process.",
        f"- {len(h)} harmless pipelines: {count(h, lambda r: r['false alarms'])} false alarms.",
        f"- {len(b)} causes of graph breaks, of which {len(broke)} break in this PyTorch: line right "
        f"{count(broke, lambda r: r['line right'])}, layer right {count(broke, lambda r: r['layer right'])}.",
        f"- Costs on a stock resnet18 at 224 pixels with `aug_transforms()`: `find_random` {c['find_random, s']:.2f} s, of these "
        f"{c['of these calls of the model, s']:.2f} s calls of the model; `find_breaks` {c['find_breaks, s']:.1f} s, without "
        f"recompiles {c['find_breaks without recompiles, s']:.1f} s; `explain` {c['explain, s']:.1f} s.",
        f"- `GraphBreakCallback` adds {cb['us of its events']:.0f} us to a step: its three events, called by themselves. On "
        f"a step of a tiny compiled model ({cb['us a step']:.0f} us): {spread(cb['times with'])} times the time; a second "
        f"learner without it: {spread(cb['times of a second without'])}."]
    said = {}
    for part, run in data["runs"].items(): said.setdefault(where(run), []).append(part)
    runs = [f"{', '.join(parts)}: {run}" for run, parts in said.items()]
    yes = lambda r: {k: "yes" if v is True else "no" if v is False else v for k, v in r.items()}
    return "\n\n".join(["\n".join(lines), table([yes(r) for r in m]), table([yes(r) for r in b]), *runs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is not run keeps its last result")
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    from helpers import make_images
    run, data = facts(), json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    data["runs"] |= dict.fromkeys(args.parts, run)
    with tempfile.TemporaryDirectory() as tmp:
        folder, out = make_images(Path(tmp) / "pixels", n=20), Path(tmp) / "files"
        out.mkdir()
        make = {"costs": lambda: costs(Path(tmp) / "cost"), "breaks": breaks, "harmless": lambda: harmless(folder),
                "mistakes": lambda: mistakes(folder, out)}
        for part in args.parts: data[part] = make[part]()
        write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
