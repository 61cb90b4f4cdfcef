"""Small learners with made-up data, shared by the tests: quick to train, quick to export, the same on every run."""
import io
import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.tabular.all import *
from fastai.vision.all import *

import copy  # after fastai, which has a function of that name
import dataclasses

import fastai_compile  # noqa: F401 - patches Learner
from fastai_compile.backends.base import backends, register_backend

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = list(backends())
PROBES = {n: b.probe("cpu") for n, b in backends().items()}
LACKS = {n: f"{n}: {p.reason}. {p.mend}" for n, p in PROBES.items() if not p.usable}
RUNS = [n for n, b in backends().items() if n not in LACKS and not getattr(b, "by_name", "")]  # on this machine
BY_NAME = {n: f"{n}: {why}; tests/test_worker.py runs it" for n, b in backends().items()
           if n not in LACKS and (why := getattr(b, "by_name", ""))}
COLOURS = ["blue", "green", "grey", "red"]


def needs_backend(backend):
    "Skips a test where this backend cannot run, and says what the machine lacks"
    return pytest.mark.skipif(backend in LACKS, reason=LACKS.get(backend, ""))


def make_images(folder, n=64, size=(36, 40), seed=0):
    "`n` noisy PNG files in one folder for each colour"
    rng, folder = np.random.default_rng(seed), Path(folder)
    for i in range(n):
        name = COLOURS[i % len(COLOURS)]
        pixels = rng.integers(0, 150, (*size, 3), dtype=np.uint8)
        if name != "grey": pixels[..., ["red", "green", "blue"].index(name)] += 60
        (folder / name).mkdir(parents=True, exist_ok=True)
        PILImage.create(pixels).save(folder / name / f"scan_{name}_{i:03d}.png")
    return folder


def make_frame(n=203, seed=0):
    "A table whose answer depends on two numbers and a category; some numbers are missing"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame({"kind": rng.choice(["ash", "beech", "cedar"], n), "width": rng.normal(size=n),
                       "height": rng.normal(1, 3, n)})
    score = df.width + df.height / 3 + (df.kind == "ash")
    df["label"] = np.where(score > 0.7, "tall", "short")
    df.loc[::17, "height"] = np.nan
    return df


def _quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def small_cnn(n_in=3, n_out=4):
    return nn.Sequential(ConvLayer(n_in, 8, stride=2), ConvLayer(8, 16, stride=2), AdaptiveConcatPool2d(1), Flatten(),
                         nn.Linear(32, n_out))


def image_learner(folder, epochs=2, seed=1, **kwargs):
    "A tiny CNN on the files of `make_images`, with random augmentation in training"
    set_seed(seed)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.3, seed=1, item_tfms=Resize(32), bs=8, num_workers=0,
        batch_tfms=[*aug_transforms(size=32), Normalize.from_stats(*imagenet_stats)])
    kwargs.setdefault("metrics", accuracy)
    learn = _quiet(Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat(), path=folder, **kwargs))
    if epochs: learn.fit_one_cycle(epochs, 1e-2)
    return learn


def table_learner(path, epochs=2, seed=1, df=None, **kwargs):
    "A tabular model on `make_frame`: one categorical and two continuous columns, one of them with missing values"
    set_seed(seed)
    df = make_frame() if df is None else df
    dls = TabularDataLoaders.from_df(df, path=path, y_names="label", y_block=CategoryBlock(), cat_names=["kind"],
        cont_names=["width", "height"], procs=[Categorify, FillMissing, Normalize],
        valid_idx=list(range(0, len(df), 4)), bs=16, num_workers=0)
    kwargs.setdefault("metrics", accuracy)
    learn = _quiet(tabular_learner(dls, layers=[32, 16], **kwargs))
    if epochs: learn.fit(epochs, 1e-2)
    return learn


KINDS = {"image": image_learner, "table": table_learner}


def make_learner(kind, folder, **kwargs):
    folder = Path(folder)
    if kind == "image" and not (folder / "red").exists(): make_images(folder)
    return KINDS[kind](folder, **kwargs)


def items_of(kind, folder, n=11):
    "Unlabelled items as `test_dl` takes them"
    if kind == "image": return get_image_files(folder).sorted()[:n]
    return make_frame(n, seed=5).drop(columns="label")


def random_inputs(model, n, seed=0):
    "A batch of `n` rows that fits the inputs of a `CompiledModel`"
    rng = torch.Generator().manual_seed(seed)
    def one(spec):
        shape = [n, *spec.shape[1:]]
        if spec.dtype.is_floating_point: return torch.randn(shape, generator=rng, dtype=spec.dtype)
        return torch.randint(0, 2, shape, generator=rng, dtype=spec.dtype)
    return [one(s) for s in model.input_specs]


def eager_of(learn, double=False):
    "A copy of the PyTorch model of a learner, ready to run"
    model = copy.deepcopy(learn.model).eval()
    return model.double() if double else model


@torch.no_grad()
def run(model, xs): return model(*xs)


@torch.no_grad()
def run_double(model, xs): return model(*[x.double() if x.is_floating_point() else x for x in xs])


def assert_close(got, want, times=1e-5):
    "Equal up to fp32: within `times` the largest number"
    assert got.shape == want.shape and got.dtype == want.dtype, (got.shape, got.dtype, want.shape, want.dtype)
    if not want.numel(): return
    off, scale = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    assert off <= times * max(scale, 1e-3), f"off by {off:.3g}, the largest number is {scale:.3g}"


# ---- backends made for a test

@contextmanager
def registered(*new):
    "Backends that are known inside the `with` only"
    known = backends()
    before = dict(known)
    try:
        for b in new: register_backend(b)
        yield new[0] if len(new) == 1 else new
    finally:
        known.clear()
        known.update(before)


@contextmanager
def only(*names):
    "Without the backends that are not named here"
    known = backends()
    before = dict(known)
    try:
        for k in [k for k in known if k not in names]: known.pop(k)
        yield
    finally:
        known.clear()
        known.update(before)


class Wrapped:
    "Another backend under a name of its own; subclasses change what they want to"
    rewrites, shapes, cost = (), "dynamic", 0
    payloads = {}  # {(backend, key): Payload}: what was compiled once serves every test

    def __init__(self, inner="eager", name=None, key=None):
        self.inner, self.name, self.key = backends()[inner], name or type(self).__name__.lower(), key
        self.rewrites = self.inner.rewrites
        self.compiled = 0
    def probe(self, device): return self.inner.probe(device)
    def coverage(self, captured, config): return self.inner.coverage(captured, config)
    def compile(self, captured, config):
        self.compiled += 1
        at = (self.inner.name, self.key)
        if self.key is None: payload = self.inner.compile(captured, config)
        else:
            if at not in Wrapped.payloads: Wrapped.payloads[at] = self.inner.compile(captured, config)
            payload = Wrapped.payloads[at]
            if payload.module is not None: payload = dataclasses.replace(payload, module=captured.module)
        self.captured = captured
        return dataclasses.replace(payload, backend=self.name)
    def load(self, payload, device, threads): return Runner(self.inner.load(payload, device, threads), self.around)
    def around(self, run, xs): return run(xs)


class Runner:
    def __init__(self, inner, around): self.inner, self.around, self.placement = inner, around, inner.placement
    def __call__(self, xs): return self.around(self.inner, xs)


# ---- files and processes

@dataclass
class Files:
    "What a folder holds: names, contents, times"
    found:dict

    @classmethod
    def of(cls, folder):
        found = {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino)
                 for p in sorted(Path(folder).iterdir()) if p.is_file()}
        return cls(found)


def contents(data):
    "All the bytes that a file holds, members of zip archives unpacked, archives inside archives too"
    yield data
    at = data.find(b"PK\x03\x04")
    if at < 0: return
    try: z = zipfile.ZipFile(io.BytesIO(data[at:]))
    except zipfile.BadZipFile: return
    with z:
        for info in z.infolist(): yield from contents(z.read(info))


def fresh(code, env=None, path=(), timeout=300, check=True):
    "Run `code` in a new interpreter. What it passes to `answer` comes back"
    pre = "import json, sys\ndef answer(o): print('ANSWER ' + json.dumps(o), flush=True)\n"
    full = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, path)]), "PYTHONWARNINGS": "ignore",
            **(env or {})}
    done = subprocess.run([sys.executable, "-c", pre + code], env={k: v for k, v in full.items() if v is not None},
                          capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if check: assert done.returncode == 0 and answers, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return answers[-1] if answers else None
