"""Faults in numbers: kills while writing, flipped bits, cut files. `test_faults.py` runs a few, `soak.py` many."""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent
MAKE = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
from helpers import table_learner
import torch
from pathlib import Path
folder = Path({folder!r})
learn = table_learner(folder, epochs=1)
for backend in {backends!r}:
    options = dict(freezing=False) if backend == 'inductor' else {{}}
    learn.export(folder/f'{{backend}}.pkl', compile=backend, options=options)
"""


def make_files(folder, backends):
    "{backend: small exported file}, made by a process of its own so that this one stays free of OpenMP threads"
    code = MAKE.format(tests=str(TESTS), root=str(TESTS.parent), folder=str(folder), backends=list(backends))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return {backend: Path(folder) / f"{backend}.pkl" for backend in backends}


def _answer(learn):
    import torch
    x = [torch.full([3, *s.shape[1:]], 0.5, dtype=s.dtype) if s.dtype.is_floating_point else
         torch.ones([3, *s.shape[1:]], dtype=s.dtype) for s in learn.model.input_specs]
    return learn.model(*x)


def in_child(f, *args):
    "Run `f(*args)` in a forked child: (its JSON answer, 0), or (None, how the child died)"
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            out = json.dumps(f(*args)).encode()
            while out: out = out[os.write(w, out):]
        finally: os._exit(0)
    os.close(w)
    with os.fdopen(r, "rb") as got: data = got.read()
    status = os.waitpid(pid, 0)[1]
    return (json.loads(data), 0) if data else (None, status or -1)


def damaged(data, kind, rng):
    "`data` with one bit flipped, or cut short"
    if kind == "truncation": return data[:rng.randrange(len(data))]
    # a third each: anywhere, in the first 4 kB (zip header, outer pickle, manifest), in the last 1 kB (the zip's directory)
    n = len(data)
    at = rng.choice([rng.randrange(n), rng.randrange(min(4096, n)), n - 1 - rng.randrange(min(1024, n))])
    res = bytearray(data)
    res[at] ^= 1 << rng.randrange(8)
    return bytes(res)


def _try_some(path, kind, seed, count):
    "Outcomes of `count` damaged copies, through `open_learner` and through stock `load_learner`"
    import torch
    from fastai.learner import load_learner
    from fastai_compile import CompileError, open_learner
    warnings.filterwarnings("ignore")
    rng, data = random.Random(seed), Path(path).read_bytes()
    good, res = _answer(open_learner(path)), {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            bad = Path(folder) / f"{i}.pkl"
            bad.write_bytes(damaged(data, kind, rng))
            for name, load in (("open_learner", open_learner), ("load_learner", load_learner)):
                try: outcome = "identical" if torch.equal(_answer(load(bad)), good) else "SILENTLY WRONG"
                except CompileError: outcome = "typed error"
                except Exception as e:
                    untyped = f"NOT TYPED {type(e).__name__}: {e}"[:300]
                    outcome = "other error" if name == "load_learner" else untyped
                res[f"{name}: {outcome}"] = res.get(f"{name}: {outcome}", 0) + 1
            bad.unlink()
    return res


def damage(path, kind, count, seed=0, batch=50):
    "Outcomes of `count` damaged copies of the file at `path`; `kind` is 'bit flip' or 'truncation'"
    res = {"tried": count, "CRASHED": 0}
    for start in range(0, count, batch):
        got, died = in_child(_try_some, str(path), kind, f"{seed}-{start}", min(batch, count - start))
        if got is None: res["CRASHED"] += 1; res.setdefault("died of", []).append(died)
        for k, v in (got or {}).items(): res[k] = res.get(k, 0) + v
    return res


def is_clean(res): return res["CRASHED"] == 0 and not any("WRONG" in k or "NOT TYPED" in k for k in res)


def kills(folder, count, seed=0, mb=4):
    "SIGKILL a process that rewrites a file, until `count` kills met it in the middle of a write; the file must always be whole"
    from fastai_compile.artifact import inspect_artifact, read_blob, write_artifact, _blob_of
    folder, rng = Path(folder), random.Random(seed)
    path = folder / "model.pkl"
    inner = {name: bytes([i]) * int(mb * 1e6) for i, name in enumerate("AB")}
    facts = {"python": "any", "needs": {}, "definitions": []}
    write_artifact(path, {**facts, "name": "A"}, inner["A"])
    res = {"tried": 0, "in the middle of a write": 0, "whole": 0, "BROKEN": 0}
    while res["in the middle of a write"] < count and res["tried"] < 20*count:
        res["tried"] += 1
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    for name in "BA": write_artifact(path, {**facts, "name": name}, inner[name])
            finally: os._exit(1)
        time.sleep(rng.uniform(0.005, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        res["in the middle of a write"] += any(p.name.endswith("-tmp") for p in folder.iterdir())
        try:
            manifest, got = read_blob(_blob_of(path))
            res["whole" if bytes(got) == inner[manifest["name"]] else "BROKEN"] += 1
        except Exception: res["BROKEN"] += 1
    write_artifact(path, {**facts, "name": "A"}, inner["A"])
    assert inspect_artifact(path)["name"] == "A"
    res["left over after the next export"] = sorted(p.name for p in folder.iterdir() if p.name != "model.pkl")
    return res
