"""A learner is the same after an export: one that worked, one that was refused, and one that was interrupted."""
import contextlib
import copy
import logging
import os
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from fastai.vision.all import (Callback, DataLoader, DataLoaders, L, Learner, Metric, MSELossFlat, ProgressCallback, accuracy, nn,
                               noop, rmse, set_seed)

from fastai_compile import VerificationError
from helpers import RUNS, KINDS, Wrapped, make_learner, needs_backend, registered


# ---- all that must stay

def _is(a, b):
    "The same object, or an equal plain value, tensor or container of such"
    if a is b: return True
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray): return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict): return list(a) == list(b) and all(_is(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, L)): return len(a) == len(b) and all(map(_is, a, b))
    if isinstance(a, float): return a == b or (a != a and b != b)
    return a == b if isinstance(a, (int, str, bytes, set)) else False


def _frozen(o, depth=3):
    "A copy of what can change inside: containers and tensors; other objects stay themselves"
    if isinstance(o, torch.Tensor): return o.detach().clone()
    if isinstance(o, np.ndarray): return o.copy()
    if depth and isinstance(o, dict): return {k: _frozen(v, depth - 1) for k, v in o.items()}
    if depth and type(o) in (list, tuple, L): return type(o)(_frozen(v, depth - 1) for v in o)
    return o


def _vars(o): return dict(vars(o)) if hasattr(o, "__dict__") else {}


def _rng_states():
    s = np.random.get_state()
    return {"python": random.getstate(), "numpy": (s[0], s[1].copy(), *s[2:]), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


LOGGERS = ("", "torch", "torch._inductor", "torch._dynamo", "torch.onnx", "onnxscript")


def _process():
    return {"threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(), "dtype": torch.get_default_dtype(),
            **{f"${k}": v for k, v in os.environ.items()}, "folder": os.getcwd(), "warnings": list(warnings.filters),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "mkldnn": torch.backends.mkldnn.enabled,
            "log levels": {n: logging.getLogger(n).level for n in LOGGERS}, "logging": logging.root.manager.disable}


def _inside(o):
    "Copies of the containers and tensors that an object holds"
    return {k: _frozen(v) for k, v in _vars(o).items() if isinstance(v, (list, dict, tuple, L, torch.Tensor))}


def _transforms(dl):
    return [f for name in ("after_item", "before_batch", "after_batch") for f in getattr(getattr(dl, name, None), "fs", [])]


def state_of(learn):
    "{what: objects and contents} of a learner and of the process; equal before and after, or something was touched"
    model, opt, rec, loaders = learn.model, learn.opt, learn.recorder, learn.dls.loaders
    named = [*model.named_parameters(), *model.named_buffers()]
    lists = ("values", "log", "iters", "losses", "lrs", "metric_names", "hps")
    return {
        "learner": _vars(learn), "learner, inside": _inside(learn),
        "callbacks": list(learn.cbs), "callbacks' attributes": [_vars(cb) for cb in learn.cbs],
        "callbacks, inside": [_inside(cb) for cb in learn.cbs],
        "metrics": list(learn.metrics), "metrics' attributes": [_vars(m) for m in learn.metrics],
        "metrics, inside": [_inside(m) for m in learn.metrics],
        "recorder": _frozen({k: getattr(rec, k, None) for k in lists}),
        "recorder's losses": [_vars(m) for m in (rec.loss, rec.smooth_loss)],
        "loaders": list(loaders), "dls": _vars(learn.dls), "loaders' attributes": [_vars(dl) for dl in loaders],
        "loaders, inside": [_inside(dl) for dl in loaders],
        "transforms": [_transforms(dl) for dl in loaders],
        "transforms' attributes": [_vars(f) for dl in loaders for f in _transforms(dl)],
        "loaders' random state": [dl.rng.getstate() for dl in loaders if hasattr(dl, "rng")],
        "generators": [g.get_state() for dl in loaders if (g := getattr(dl, "generator", None)) is not None],
        "modules": list(model.modules()), "train or eval": [m.training for m in model.modules()],
        "modules' attributes": [{k: v for k, v in _vars(m).items() if not isinstance(v, dict)} for m in model.modules()],
        "hooks": [{k: list(v) for k, v in _vars(m).items() if k.endswith("_hooks") and v} for m in model.modules()],
        "weights": dict(named), "values": {k: v.clone() for k, v in model.state_dict().items()},
        "versions": {n: t._version for n, t in named}, "strides": {n: t.stride() for n, t in named},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()], "gradients' values": [_frozen(p.grad) for p in model.parameters()],
        "optimizer": [opt, None if opt is None else _vars(opt)],
        "optimizer's state": None if opt is None else copy.deepcopy(opt.state_dict()),
        "random state": _rng_states(), "process": _process(),
    }


def compare(before, after):
    touched = []
    for what, a in before.items():
        b = after[what]
        if _is(a, b): continue
        if isinstance(a, dict) and isinstance(b, dict):
            a, b = ({k: d.get(k, "missing") for k in {**a, **b}} for d in (a, b))
            touched += [f"{what}: {k} was {str(a[k])[:150]}, is {str(b[k])[:150]}" for k in a if not _is(a[k], b[k])]
        else: touched.append(f"{what}: was {str(a)[:300]}, is {str(b)[:300]}")
    return touched


def _put(d, **kwargs): d.update(kwargs)


TOUCHES = {
    "attribute": lambda l: setattr(l, "new", 1), "another model": lambda l: setattr(l, "model", copy.deepcopy(l.model)),
    "no optimizer": lambda l: setattr(l, "opt", None), "hypers": lambda l: l.opt.set_hypers(lr=3),
    "optimizer's state": lambda l: next(iter(l.opt.state.values())).update(more=1),
    "train": lambda l: l.model.train(), "frozen": lambda l: next(l.model.parameters()).requires_grad_(False),
    "buffer": lambda l: next(l.model.buffers()).add_(1), "gradients": lambda l: l.zero_grad(),
    "hook": lambda l: l.model.register_forward_hook(noop), "strides": lambda l: l.model[0].to(memory_format=torch.channels_last),
    "python": lambda l: random.random(), "numpy": lambda l: np.random.rand(), "torch": lambda l: torch.rand(1),
    "loader's rng": lambda l: l.dls.train.rng.random(), "loader's bs": lambda l: setattr(l.dls.valid, "bs", 3),
    "order of loaders": lambda l: l.dls.loaders.reverse(), "transform": lambda l: _put(vars(l.dls.valid.after_batch.fs[0]), x=1),
    "recorder": lambda l: l.recorder.values.append(1), "callback": lambda l: l.remove_cb(l.cbs[-1]),
    "metric": lambda l: l.metrics[0].reset(), "environment": lambda l: os.environ.update(FOR_THIS_TEST="1"),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_the_comparison_itself_sees(touch, image_folder, monkeypatch):
    "Each kind of change is found, or the tests below would prove nothing"
    monkeypatch.setenv("FOR_THIS_TEST", "0")
    learn = make_learner("image", image_folder, epochs=1)
    before = state_of(learn)
    assert not compare(before, state_of(learn))
    TOUCHES[touch](learn)
    assert compare(before, state_of(learn))


# ---- learners with something to lose

class LogCallback(Callback):
    "A user's logger: writes down every event"
    run_valid = True
    def __init__(self): self.lines = []
    def __call__(self, event_name):
        if event_name != "after_create": self.lines.append(event_name)
        super().__call__(event_name)


class LossLogger(Callback):
    "A user's logger as most are written: a few events, a list and a counter"
    def __init__(self): self.losses, self.n = [], 0
    def before_fit(self): self.n += 1
    def after_loss(self): self.losses.append(1)
    def after_epoch(self): self.n += 1
    def after_fit(self): self.n += 1


class ValidationLogger(Callback):
    "A user's logger of validation only"
    def __init__(self): self.seen, self.n = [], 0
    def before_validate(self): self.seen.append("before_validate"); self.n += 1
    def after_pred(self): self.seen.append("after_pred"); self.n += 1
    def after_validate(self): self.seen.append("after_validate"); self.n += 1


class RunningMean(Metric):
    "A metric with state of its own"
    def __init__(self): self.total, self.calls = 0., []
    def reset(self): self.total = 0.; self.calls.append("reset")
    def accumulate(self, learn): self.total += learn.pred.mean().item(); self.calls.append("accumulate")
    @property
    def value(self): return self.total
    @property
    def name(self): return "mean"


def _prepared(kind, folder, fitted=True, logger=LossLogger, **kwargs):
    learn = make_learner(kind, folder, epochs=2 if fitted else 0, metrics=[accuracy, RunningMean()], cbs=[logger()], **kwargs)
    if fitted:
        first = next(learn.model.parameters())
        first.requires_grad_(False)
        next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)).eval()
        for i, p in enumerate(learn.model.parameters()): p.grad = torch.full_like(p, i) if i % 2 else None
    return learn


class Wrong(Wrapped):
    "Wrong numbers: the gate refuses it"
    def around(self, run, xs): return [t + 1 for t in run(xs)]


class Interrupting(Wrapped):
    "Ctrl-C at the n-th call of its model, or while it compiles or loads"
    def __init__(self, where):
        super().__init__("eager")
        self.where, self.calls = where, 0
    def compile(self, captured, config):
        if self.where == "compile": raise KeyboardInterrupt
        return super().compile(captured, config)
    def load(self, *args):
        if self.where == "load": raise KeyboardInterrupt
        return super().load(*args)
    def around(self, run, xs):
        self.calls += 1
        if isinstance(self.where, int) and self.calls >= self.where: raise KeyboardInterrupt
        return run(xs)


class Last(Wrapped):
    "Right numbers, but a wrong answer for one row of validation: refused by the last gate"
    def around(self, run, xs):
        self.seen = getattr(self, "seen", 0) + len(xs[0])
        ts = run(xs)
        return [t.flip(-1) for t in ts] if self.late(xs) else ts
    def late(self, xs): return len(xs[0]) > 1 and any("get_preds" in f for f in _callers())


def _callers():
    f, res = sys._getframe(), []
    while f: res.append(f.f_code.co_name); f = f.f_back
    return res


@contextlib.contextmanager
def _outcome(how, learn, path):
    "Runs one export that ends as `how` says"
    if how in RUNS:
        options = {"freezing": False} if how == "inductor" else {}
        yield lambda: learn.export(path, compile=how, options=options)
    elif how in ("refused", "refused at the end"):
        with registered(Wrong() if how == "refused" else Last()) as b:
            def export():
                with pytest.raises(VerificationError): learn.export(path, compile=b.name)
            yield export
    else:
        where = how.split(" at ")[1]
        with registered(Interrupting(int(where) if where.isdigit() else where)) as b:
            def export():
                with pytest.raises(KeyboardInterrupt): learn.export(path, compile=b.name)
            yield export


def _calls_of_an_export(learn, path):
    with registered(Interrupting(10**9)) as b:
        learn.export(path, compile=b.name)
    return b.calls


HOW = [*[b for b in RUNS if b != "inductor"], "refused", "refused at the end", "interrupted at compile",
       "interrupted at load", "interrupted at 2", "interrupted at 30"]


@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "fresh"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_untouched(kind, how, fitted, image_folder, tmp_path):
    learn = _prepared(kind, image_folder if kind == "image" else tmp_path, fitted)
    assert (learn.opt is not None) == fitted
    path = tmp_path / "out" / "model.pkl"
    path.parent.mkdir()
    with _outcome(how, learn, path) as export:
        before = state_of(learn)
        export()
        touched = compare(before, state_of(learn))
    assert not touched, "\n".join(touched)
    assert path.exists() == (how in RUNS) and len(list(path.parent.iterdir())) == (how in RUNS)


@needs_backend("inductor")
def test_untouched_by_inductor(tmp_path):
    learn = _prepared("table", tmp_path)
    with _outcome("inductor", learn, tmp_path / "model.pkl") as export:
        before = state_of(learn)
        export()
        touched = compare(before, state_of(learn))
    assert not touched, "\n".join(touched)


def test_interruptions_come_where_they_should(image_folder, tmp_path):
    "Call 2 is in the gate of numbers, call 30 in what follows it"
    learn = make_learner("table", tmp_path)
    assert _calls_of_an_export(learn, tmp_path / "x.pkl") > 40


@pytest.mark.parametrize("logger", [LogCallback, LossLogger, ValidationLogger])
@pytest.mark.parametrize("how", ["eager", "refused"])
def test_loggers_do_not_fire(logger, how, tmp_path):
    learn = _prepared("table", tmp_path, logger=logger)
    cb = next(c for c in learn.cbs if isinstance(c, logger))
    assert any(vars(cb).values()), "the logger did not fire in training either"
    learn.logger, printed = lambda *a, **k: printed.append(a), []
    before = copy.deepcopy({k: v for k, v in vars(cb).items() if k != "learn"})
    with _outcome(how, learn, tmp_path / "model.pkl") as export: export()
    assert {k: v for k, v in vars(cb).items() if k != "learn"} == before
    assert not printed


def test_progress_is_shown_by_callbacks_of_its_own(tmp_path, capsys):
    learn = make_learner("table", tmp_path)
    learn.add_cb(ProgressCallback())
    before = state_of(learn)
    learn.export(tmp_path / "x.pkl", compile="eager")
    assert not compare(before, state_of(learn))
    shown = capsys.readouterr().out
    learn.create_mbar = False
    learn.export(tmp_path / "x.pkl", compile="eager")
    assert "gate" in shown or shown.strip(), "long work shows progress"
    assert not capsys.readouterr().out.strip(), "where the learner shows no bars, export shows none"


# ---- training goes on as if nothing had happened

def _weights_after(kind, folder, export, path, how="eager"):
    learn = make_learner(kind, folder, epochs=1, seed=7)
    if export:
        with _outcome(how, learn, path) as do: do()
    learn.fit(1, 1e-2)
    return {k: v.clone() for k, v in learn.model.state_dict().items()}, learn


@pytest.mark.parametrize("how", ["eager", pytest.param("onnxruntime", marks=needs_backend("onnxruntime")), "refused",
                                 "interrupted at 2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_epoch_is_the_same(kind, how, image_folder, tmp_path):
    folder = image_folder if kind == "image" else tmp_path
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want, plain = _weights_after(kind, folder, False, None)
        got, learn = _weights_after(kind, folder, True, tmp_path / "model.pkl", how)
    finally: torch.set_num_threads(n)
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert _is(list(plain.recorder.losses), list(learn.recorder.losses))
    assert _is([list(v) for v in plain.recorder.values], [list(v) for v in learn.recorder.values])
    a, b = plain.opt.state_dict(), learn.opt.state_dict()
    assert _is(a["state"], b["state"]) and _is([dict(h) for h in a["hypers"]], [dict(h) for h in b["hypers"]])


class ExportInside(Callback):
    "Exports in the middle of training, as a callback that keeps the best model would"
    def __init__(self, event, path): self.event, self.path, self.done = event, path, 0
    def __call__(self, event_name):
        if event_name == self.event and not self.done and self.epoch == 0 and (self.iter == 2 or "epoch" in event_name):
            self.done = 1
            if self.path is not None:
                before = state_of(self.learn)
                self.learn.export(self.path, compile="eager")
                self.touched = compare(before, state_of(self.learn))


@pytest.mark.parametrize("event", ["after_epoch", "after_batch", "after_step"])
def test_export_in_the_middle_of_training(event, tmp_path):
    def trained(path):
        learn, cb = make_learner("table", tmp_path, epochs=0, seed=3), ExportInside(event, path)
        learn.add_cb(cb)
        learn.fit(2, 1e-2)
        assert cb.done
        return learn, cb
    want, _ = trained(None)
    got, cb = trained(tmp_path / "model.pkl")
    assert not cb.touched, "\n".join(cb.touched)
    assert (tmp_path / "model.pkl").exists()
    assert all(torch.equal(a, b) for a, b in zip(want.model.state_dict().values(), got.model.state_dict().values()))


# ---- loaders that are not fastai's, or that have state of their own

def _plain_learner(dls):
    learn = Learner(dls, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), loss_func=MSELossFlat(), metrics=rmse)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def _torch_loaders():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(70, 6, generator=g)
    ds = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    own = [torch.Generator().manual_seed(i) for i in (4, 5)]
    return DataLoaders(torch.utils.data.DataLoader(ds, batch_size=16, shuffle=True, generator=own[0]),
                       torch.utils.data.DataLoader(ds, batch_size=16, generator=own[1])), own


def test_generators_of_plain_torch_loaders(tmp_path):
    set_seed(2)
    dls, own = _torch_loaders()
    learn = _plain_learner(dls)
    learn.fit(1)
    before, states = state_of(learn), [g.get_state() for g in own]
    learn.export(tmp_path / "x.pkl", compile="eager")
    assert not compare(before, state_of(learn))
    assert all(torch.equal(a, g.get_state()) for a, g in zip(states, own))


def test_seeded_fastai_loader(tmp_path):
    set_seed(2)
    x = torch.randn(70, 6)
    items = [(a, a.sum()[None]) for a in x]
    dls = DataLoaders(DataLoader(items, bs=16, shuffle=True), DataLoader(items, bs=16, num_workers=2))
    learn = _plain_learner(dls)
    learn.fit(1)
    before = state_of(learn)
    learn.export(tmp_path / "x.pkl", compile="eager")
    assert not compare(before, state_of(learn))

