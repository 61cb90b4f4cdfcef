"""Workers for real: install each stack, test it, and take two models through it.

`python benchmarks/workers.py` installs what is missing (several GB, some minutes) and runs `pytest -m workers`. It writes
versions, sizes, seconds and the largest differences to results/workers.json. Seconds are those of one run beside whatever
else ran.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tempfile

import torch
from fastai.vision.all import resnet18

import fastai_compile  # noqa: F401 - registers its targets
from benchmarks.common import RESULTS, ROOT, facts, write
from fastai_compile import CompileConfig, CompileError
from fastai_compile.backends.base import get_backend
from fastai_compile.capture import capture
from fastai_compile.example import Example, example_batch
from fastai_compile.model import CompiledModel
from fastai_compile.worker_env import install_worker, stacks, why_no_worker, worker_info

OUT = RESULTS / "workers.json"


def models():
    "{name: (model, example)}: resnet18 at 64 pixels, and a tabular learner's model"
    from helpers import table_learner
    torch.manual_seed(0)
    x = torch.randn(3, 3, 64, 64)
    yield "resnet18, 64 px", resnet18(weights=None).eval(), Example((x,), (), (torch.Tensor,), "made up", [0, 1, 2], True)
    learn = table_learner(Path(tempfile.mkdtemp()))
    yield "tabular", learn.model.eval(), example_batch(learn)


def seconds(f):
    start = time.perf_counter()
    return f(), round(time.perf_counter() - start, 1)


def through(target, captured):
    "How far one model comes on one target"
    backend = get_backend(target)
    probe = backend.probe("cpu")
    if not probe.reaches: return {"level": "", "why": probe.reason}
    config = CompileConfig(backends=target, level=probe.reaches)
    try: payload, compile_s = seconds(lambda: backend.compile(captured, config))
    except CompileError as e: return {"level": "", "why": str(e)}
    row = {"level": payload.placement.level, "compile_s": compile_s, "mb": round(payload.size_mb, 2), "batches": payload.buckets,
           "operators": payload.placement.operators, "choices": payload.choices}
    if not probe.usable: return {**row, "why": f"not run: {probe.reason}"}
    model = CompiledModel(payload, captured.inputs, captured.outputs, captured.structure, captured.max_bs, captured.eager)
    diffs = {}
    for n in (1, 3, captured.max_bs):
        xs = [x.repeat(n, *[1] * (x.ndim - 1))[:n].contiguous() for x in captured.example.xb]
        with torch.no_grad(): got, want = model(*xs), captured.eager(*xs)
        diffs[n] = (got - want).abs().max().item()
    return {**row, "level": model.placement.level, "largest_difference": diffs}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--no-tests", action="store_true", help="leave out `pytest -m workers`")
    p.add_argument("--out", type=Path, default=OUT)
    args = p.parse_args()
    res = {"run": facts(), "workers": {}, "models": {}}
    for name in stacks:
        there = not why_no_worker(name)
        try: info, took = seconds(lambda n=name: install_worker(n))
        except CompileError as e:
            res["workers"][name] = {"why": str(e)}
            continue
        res["workers"][name] = {**{k: worker_info(name)[k] for k in ("python", "requirements", "versions", "size_mb", "made")},
                                "install_s": None if there else took}
    if not args.no_tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "-m", "workers", "-q", "-p", "no:logging"], cwd=ROOT,
                              capture_output=True, text=True)
        res["tests"] = {"returncode": done.returncode, "summary": done.stdout.strip().splitlines()[-1]}
        print(res["tests"])
    for name, model, example in models():
        captures = {t: capture(model, example, 8, get_backend(t).rewrites) for t in ("xla", "tpu", "cerebras")}
        res["models"][name] = {t: through(t, captured) for t, captured in captures.items()}
        print(name, res["models"][name])
    write(args.out, res)
    return res.get("tests", {}).get("returncode", 0)


if __name__ == "__main__": sys.exit(main())
