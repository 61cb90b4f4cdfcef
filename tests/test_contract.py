"""What every backend keeps, seen through `CompiledModel`: any batch and layout, typed errors, eager's answers, no faulty file."""
import copy
import dataclasses
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import weakref

import cloudpickle
import pytest
import torch
from fastai.vision.all import TensorBase, TensorImage, TensorImageBW, nn

from fastai_compile import (BackendError, CompiledModel, CompileError, ConfigError, InputError, NotTrainable,
                            VerificationError, available_backends, open_learner)
from fastai_compile.backends import base
from fastai_compile.backends.base import LEVELS, Backend, Payload, Placement, Probe, backends, cpu_threads, get_backend, unmet
from helpers import (BACKENDS, BY_NAME, KINDS, LACKS, RUNS, Files, Wrapped, assert_close, eager_of, fresh, random_inputs,
                     registered, run, run_double)

@dataclasses.dataclass
class Case:
    "A compiled model, as it came out of its file, and what it is compared with"
    model:CompiledModel
    eager:nn.Module
    exact:nn.Module
    bs:int
    remainder:int
    artifact:object

    def inputs(self, n, seed=0): return random_inputs(self.model, n, seed)
    def check(self, xs, got=None):
        got = run(self.model, xs) if got is None else got
        want = run(self.eager, xs)
        assert_close(got, want)
        exact = run_double(self.exact, xs)
        if not exact.numel(): return
        off, own = (got.double() - exact).abs().max(), (want.double() - exact).abs().max()
        assert off <= 10 * own + 1e-5 * exact.abs().max(), f"{off:.3g} from fp64, eager is {own:.3g} from it"


_cases = {}


@pytest.fixture
def case(artifacts, request):
    backend, kind = request.param
    if (backend, kind) not in _cases:
        art = artifacts(backend, kind)
        dl = art.learn.dls.valid
        _cases[backend, kind] = Case(art.open().model, eager_of(art.learn), eager_of(art.learn, True), dl.bs, dl.n % dl.bs, art)
    case = _cases[backend, kind]
    vars(case.model).update(_watch=None, _handed=False)  # as it came out of the file: nobody has asked it for weights
    return case


each = pytest.mark.parametrize("case", [pytest.param((b, k), id=f"{b}-{k}") for b in RUNS for k in KINDS], indirect=True)
each_table = pytest.mark.parametrize("case", [pytest.param((b, "table"), id=b) for b in RUNS], indirect=True)


# ---- the Protocol

@pytest.mark.parametrize("name", BACKENDS)
def test_protocol(name):
    b = get_backend(name)
    assert isinstance(b, Backend)
    assert b.name == name and isinstance(b.rewrites, tuple) and b.shapes in ("dynamic", "static")
    assert isinstance(b.cost, int)
    probe = b.probe("cpu")
    assert isinstance(probe, Probe) and isinstance(probe.usable, bool) and probe.reason
    if not probe.usable: assert probe.mend
    row = next(r for r in available_backends() if r["backend"] == name)
    assert (row["usable"] == "yes") == probe.usable


@pytest.mark.parametrize("name", [*LACKS, *BY_NAME])
def test_not_run_here(name): pytest.skip((LACKS | BY_NAME)[name])


def test_names_and_costs_are_distinct():
    assert len({b.cost for b in backends().values()}) == len(backends())
    assert all(k == b.name for k, b in backends().items())


@each
def test_payload(case):
    payload = case.model.payload
    assert isinstance(payload, Payload) and payload.backend == case.artifact.backend
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.uint8 for t in payload.files.values())
    assert not unmet(payload.needs), "a payload must fit the host that made it"
    own = {t.data_ptr() for t in [*case.model.parameters(), *case.model.buffers()]}
    assert {t.data_ptr() for t in payload.tensors.values()} <= own, "shared weights are there twice after loading"


@each
def test_placement(case):
    p = case.model.placement
    assert isinstance(p, Placement) and p.level in LEVELS
    assert p.level == "executed" and p.target and not p.elsewhere


@pytest.mark.parametrize("name", RUNS)
def test_coverage_says_so_before_compiling(name, artifacts):
    art = artifacts(name, "table")
    wrapped = Wrapped(name, "covered", key="table")
    from fastai_compile.config import make_config
    from fastai_compile.export import compile_learner
    with registered(wrapped): compile_learner(art.learn, make_config("covered"))
    p = get_backend(name).coverage(wrapped.captured, make_config(name))
    assert isinstance(p, Placement) and not p.elsewhere


# ---- batches

@each
@pytest.mark.parametrize("n", [1, 2, 3, "bs", "remainder", "max_bs", "max_bs+1", "2*max_bs+5"])
def test_batch(case, n):
    names = {"bs": case.bs, "remainder": case.remainder, "max_bs": case.model.max_bs}
    n = eval(n, {}, names) if isinstance(n, str) else n
    xs = case.inputs(n, seed=n)
    got = run(case.model, xs)
    case.check(xs, got)
    one = torch.cat([run(case.eager, [x[i:i+1] for x in xs]) for i in range(min(n, 5))])
    assert_close(got[:5], one)  # other rows of the batch change nothing


@each
def test_empty_batch(case):
    got = run(case.model, case.inputs(0))
    want = run(case.eager, case.inputs(2))
    assert got.shape == (0, *want.shape[1:]) and got.dtype == want.dtype
    case.check(case.inputs(2))


@each
def test_results_belong_to_the_caller(case):
    a, b = case.inputs(4, 1), case.inputs(4, 2)
    kept = [x.clone() for x in a]
    first = run(case.model, a)
    before = first.clone()
    second = run(case.model, b)
    assert torch.equal(first, before), "a later call changed an earlier result"
    assert all(torch.equal(x, k) for x, k in zip(a, kept)), "the call changed its inputs"
    first.add_(1000)
    second.add_(1000)
    case.check(a)
    case.check(b)


@each
def test_inference_mode(case):
    with torch.inference_mode():
        xs = case.inputs(3)
        got = case.model(*xs)
    case.check([x.clone() for x in xs], got.clone())
    assert torch.equal(run(case.model, xs), got)


@each_table
def test_loaded_and_copied_in_inference_mode(case):
    xs = case.inputs(3)
    with torch.inference_mode():
        from fastai_compile import open_learner
        for model in (open_learner(case.artifact.path).model, copy.deepcopy(case.model)):
            assert_close(model(*xs), run(case.eager, xs))


@each
def test_same_inputs_same_bits(case):
    xs = case.inputs(case.bs, 3)
    assert torch.equal(run(case.model, xs), run(case.model, xs))


@each
def test_values_at_the_edge(case):
    for scale in (0., 1e-30, 1e4):
        xs = [x * scale if x.is_floating_point() else x for x in case.inputs(3)]
        assert_close(run(case.model, xs), run(case.eager, xs), 1e-4)


@each
def test_nan_stays_nan_in_its_row(case):
    xs = case.inputs(3)
    i = next(i for i, x in enumerate(xs) if x.is_floating_point())
    xs[i][1].flatten()[0] = float("nan")
    got, want = run(case.model, xs), run(case.eager, xs)
    assert torch.equal(got.isnan(), want.isnan())
    assert_close(got[[0, 2]], want[[0, 2]])


# ---- wrong inputs

def _wrong(xs):
    "(what, inputs) of every kind that a compiled function must not run on"
    last = len(xs) - 1
    def change(f, i=last): return [f(x) if j == i else x for j, x in enumerate(xs)]
    for i, x in enumerate(xs):
        for dtype in (torch.float64, torch.float16, torch.int32, torch.int64, torch.bool, torch.float32):
            if dtype != x.dtype: yield f"input {i} as {dtype}", change(lambda t, d=dtype: t.to(d), i)
    yield "rank above", change(lambda t: t[None])
    yield "rank below", change(lambda t: t[0])
    yield "no dimension", change(lambda t: t.flatten()[0])
    yield "size above", change(lambda t: torch.cat([t, t], -1))
    yield "size below", change(lambda t: t[..., :-1])
    yield "size 0", change(lambda t: t[..., :0])
    if xs[last].ndim == 4: yield "channels last as shape", change(lambda t: t.permute(0, 2, 3, 1))
    yield "too many", [*xs, xs[0]]
    yield "too few", xs[:-1]
    yield "other device", change(lambda t: t.to("meta"))
    yield "no tensor", change(lambda t: t.numpy())
    yield "a list", change(lambda t: t.tolist())
    yield "nothing", change(lambda t: None)
    yield "sparse", change(lambda t: t.to_sparse())
    if len(xs) > 1: yield "batches differ", change(lambda t: torch.cat([t, t]))


@each
def test_wrong_inputs_are_typed_errors(case):
    xs, passed = case.inputs(4), []
    for what, bad in _wrong(xs):
        try: case.model(*bad)
        except InputError as e: assert re.search(r"input|batch", str(e)), what
        except Exception as e: passed.append(f"{what}: {type(e).__name__}: {e}")
        else: passed.append(f"{what}: no error")
    assert not passed, "\n".join(passed)
    case.check(xs)


@each_table
def test_an_index_outside_of_an_embedding_is_a_typed_error(case):
    "Unchecked, ONNX Runtime takes -1 for the last row, and code of inductor ends the process"
    cats, conts = case.inputs(4)
    sizes = [e.num_embeddings for e in case.eager.embeds]
    for col, size in enumerate(sizes):
        for value in (-1, size, 2**40, -2**63):
            bad = cats.clone()
            bad[2, col] = value
            says = rf"{value} in row 2, column {col}.*embeds\.{col} knows 0 to {size - 1}"
            with pytest.raises(InputError, match=says): case.model(bad, conts)
    edge = torch.tensor([[s - 1 for s in sizes], [0] * len(sizes)])
    case.check([edge, conts[:2]])


def _compiled(name, net, xs):
    "A network of one input, compiled without a learner"
    from fastai_compile.capture import capture
    from fastai_compile.config import make_config
    from fastai_compile.example import Example
    cap = capture(net, Example((xs,), (), (torch.Tensor,), "here", [0, 1]), 16)
    payload = get_backend(name).compile(cap, make_config(name))
    return CompiledModel(payload, cap.inputs, cap.outputs, cap.structure, cap.max_bs, guards=cap.guards)


class Mixed(nn.Module):
    "A table of which one column is an index, and another a number, which may be negative"
    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(4, 3), nn.Linear(4, 2)
    def forward(self, x): return self.lin(torch.cat([self.emb(x[:, 0]), x[:, 1:].float()], 1))


@pytest.mark.parametrize("name", RUNS)
def test_only_indices_are_refused_for_their_sign(name):
    "ONNX Runtime checks what it looks up, where it proved to; a column that is a number keeps its sign"
    net, xs = Mixed(), torch.tensor([[0, -5], [3, 2**40], [1, -2**62], [2, 7]])
    model = _compiled(name, net, xs)
    large = [xs.clamp(-2**31, 2**31 - 1) if name == "openvino" else xs]
    if name == "openvino":
        with pytest.raises(BackendError, match="32 bits.* -4611686018427387904"): model(xs)
    for _ in range(2): assert_close(run(model, large), run(net, large))
    for v in (-1, 4, -2**63):
        bad = xs.clone()
        bad[1, 0] = v
        with pytest.raises(InputError, match=f"holds {v} in row 1, column 0"): model(bad)
    if name == "onnxruntime": assert not model.runner().checks_indices


class Shown(nn.Module):
    "A table model that also answers what is on the way: an embedding, and the normalized numbers that a linear layer takes"
    def __init__(self):
        super().__init__()
        self.embs = nn.ModuleList(nn.Embedding(4, 3) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) for n in (9, 5, 5))
        self.a, self.b, self.c = nn.Linear(9, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
    def forward(self, x):
        looked = [e(x[:, i]) for i, e in enumerate(self.embs)]
        h = self.norms[1](self.a(self.norms[0](torch.cat(looked, 1))).relu())
        last = torch.cat([e(x[:, -1]) for e in self.embs], 1)
        return self.c(self.norms[2](self.b(h).relu())), h, looked[1], last, self.scale.exp()


@pytest.mark.parametrize("name", RUNS)
def test_what_is_on_the_way_is_answered_as_it_is(name):
    net = Shown().train()
    for _ in range(30): net(torch.randint(0, 4, (16, 3)))  # the batch norms have seen something
    with torch.no_grad(): net.norms[2].running_var[0] = 1e-12
    xs = torch.randint(0, 4, (7, 3))
    model = _compiled(name, net.eval(), xs)
    with torch.no_grad():
        for got, want in zip(model(xs), net(xs), strict=True): assert_close(got, want)


@pytest.mark.parametrize("one_ms, all_ms, one", [(.9, 1., True), (1., 1., True), (1.2, 1., False), (1., 1.1, False)])
def test_one_thread_is_taken_where_it_is_as_fast(one_ms, all_ms, one, artifacts, tmp_path, monkeypatch):
    "0.05 ms a call, but 1.1 ms in the last row: there all threads are kept"
    from fastai_compile.backends import onnxruntime
    from fastai_compile.timing import Timing
    unit = 1 if all_ms > 1 else .05
    times = {1: Timing((one_ms * unit,) * 3, 1), 2: Timing((all_ms * unit,) * 3, 1)}
    monkeypatch.setattr(onnxruntime, "interleave", lambda fns, **how: [fns[k]() for k in (1, 2)] and times)
    artifacts.learner("table").export(tmp_path / "x.pkl", compile="onnxruntime", threads=2)
    choices = open_learner(tmp_path / "x.pkl").model.payload.choices
    assert choices["options"]["one_thread"] is one and ("one thread over all" in choices) == (all_ms <= 1)


@each_table
def test_the_row_of_a_wrong_index_is_counted_in_the_whole_batch(case):
    xs = case.inputs(case.model.max_bs + 40)
    xs[0][case.model.max_bs + 20, 0] = -1
    with pytest.raises(InputError, match=f"holds -1 in row {case.model.max_bs + 20}, column 0"): case.model(*xs)


@pytest.mark.parametrize("asked, threads, one", [(True, 2, True), (False, 2, False), ("auto", 1, False)])
def test_one_thread_can_be_asked_for(asked, threads, one, artifacts, tmp_path):
    learn = artifacts.learner("table")
    report = learn.export(tmp_path / "x.pkl", compile="onnxruntime", options={"one_thread": asked}, threads=threads)
    model = open_learner(tmp_path / "x.pkl").model
    assert report.backend == "onnxruntime" and bool(model.payload.choices["options"].get("one_thread")) == one
    assert model.runner().session.get_session_options().intra_op_num_threads == (1 if one else threads)
    with pytest.raises(ConfigError, match="one_thread=2: choose True, False or 'auto'"):
        learn.export(tmp_path / "x.pkl", compile="onnxruntime", options={"one_thread": 2})
    with pytest.raises(ConfigError, match="one_thread=1: choose"):
        learn.export(tmp_path / "x.pkl", compile="onnxruntime", options={"one_thread": 1})


# ---- the short way of a call

def test_the_short_way_is_taken_and_left(artifacts):
    "Small rows are answered in one step; hooks, another `forward`, a watch and failures take the long way, or are told as there"
    model = artifacts("onnxruntime", "table").open().model
    xs = random_inputs(model, 5)
    want, steps = run(model, xs), []
    model._check = lambda *a: steps.append(1) or CompiledModel._check(model, *a)
    assert torch.equal(run(model, xs), want) and not steps and model.runner().checks_indices
    for register in (model.register_forward_hook, nn.modules.module.register_module_forward_hook):
        hook = register(lambda m, i, o: o + 1)
        assert torch.equal(run(model, xs), want + 1)
        hook.remove()
    hook = model.register_forward_pre_hook(lambda m, i: (i[0], i[1] * 0))
    assert torch.equal(run(model, xs), run(model, [xs[0], xs[1] * 0])) and len(steps) == 4
    hook.remove()
    model.forward = lambda *xs: "mine"
    assert model(*xs) == "mine"
    del model.forward, model._check
    stock, model._run.run = model._run.run, lambda *args: 1 / 0
    with pytest.raises(BackendError, match="division"): model(*xs)
    model._run.run = lambda *args: [o[:-1] for o in stock(*args)]
    with pytest.raises(InputError, match="returned"): model(*xs)
    model._run.run = lambda *args: [o.astype("float64") for o in stock(*args)]
    with pytest.raises(InputError, match="float64"): model(*xs)
    model._run.run = stock
    with torch.no_grad(): next(model.parameters()).add_(1)
    with pytest.raises(NotTrainable): model(*xs)


def test_a_model_that_was_called_is_freed_at_once(artifacts):
    model = copy.deepcopy(artifacts("onnxruntime", "table").open().model)
    run(model, random_inputs(model, 3))
    assert model._quick is not None
    gone, gc_was_on = weakref.ref(model), gc.isenabled()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        if gc_was_on: gc.enable()


# ---- layouts

def _layouts(x):
    "(what, the same values in another layout)"
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 2 else x.t().contiguous().t()
    yield "every second", torch.stack([x, -x], -1)[..., 0] if x.is_floating_point() else torch.stack([x, x], -1)[..., 0]
    yield "with an offset", torch.cat([torch.full_like(x, 7)[:1], x])[1:]
    yield "rows of a larger batch", torch.stack([x, torch.full_like(x, 3)], 1).flatten(0, 1)[::2]
    if x.is_floating_point():
        yield "that asks for a gradient", x.clone().requires_grad_()
        yield "with a negative bit", torch._neg_view(-x)
        yield "part of complex numbers", torch.complex(x, x + 1).real
        yield "part of conjugates", torch.complex(x, -x).conj().imag
    if x.ndim == 4: yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    for cls in (TensorBase, *((TensorImage, TensorImageBW) if x.ndim == 4 else ())): yield cls.__name__, cls(x.clone())
    yield "a parameter", nn.Parameter(x.clone(), requires_grad=False)


@each
@pytest.mark.parametrize("n", [1, 5, 70])
def test_any_layout(case, n):
    xs = case.inputs(n, 9)
    want = run(case.model, xs)
    for i, x in enumerate(xs):
        for what, other in _layouts(x):
            assert torch.equal(other.detach().as_subclass(torch.Tensor), x), what
            got = run(case.model, [other if j == i else y for j, y in enumerate(xs)])
            assert type(got) is torch.Tensor and not got.requires_grad
            assert torch.equal(got, want), f"input {i} {what}: off by {(got - want).abs().max():.3g}"


@each
def test_one_row_for_all(case):
    xs = [x.expand(6, *x.shape[1:]) for x in case.inputs(1)]
    case.check(xs)


# ---- threads

@each
def test_eight_threads_at_once(case):
    model = copy.deepcopy(case.model)  # not run yet: the threads also race for its first call
    batches = [case.inputs(n, seed=n) for n in (1, 3, case.bs, 2, 70, 5, case.model.max_bs, 1)]
    want, found, gate = [run(case.eager, xs) for xs in batches], {}, threading.Barrier(8)
    def work(i):
        try:
            gate.wait(30)
            for _ in range(25): assert_close(run(model, batches[i]), want[i])
            found[i] = None
        except BaseException as e: found[i] = e
    ts = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join(120)
    assert not any(t.is_alive() for t in ts), "a thread hangs"
    for e in found.values():
        if e is not None: raise e
    assert len(found) == 8


def _spy(monkeypatch, name):
    seen, b = [], get_backend(name)
    stock = b.load
    monkeypatch.setattr(b, "load", lambda payload, device, threads: seen.append(threads) or stock(payload, device, threads))
    return seen


@each_table
def test_threads_reach_the_runtime(case, monkeypatch):
    seen, model = _spy(monkeypatch, case.artifact.backend), copy.deepcopy(case.model)
    for threads in (1, 2, None):
        model.threads = threads
        model._reset()
        case.check(case.inputs(3), run(model, case.inputs(3)))
        runner = model.runner()
        n = cpu_threads(threads)
        assert seen[-1] == n
        if session := getattr(runner, "session", None):
            alone = model.payload.choices["options"].get("one_thread")
            assert session.get_session_options().intra_op_num_threads == (1 if alone else n)
        if hasattr(runner, "threads"): assert runner.threads == n


@each_table
def test_default_threads_are_those_the_process_may_use(case, monkeypatch):
    if not hasattr(os, "sched_setaffinity"): pytest.skip("this system has no CPU affinity")
    seen, all_cpus, n = _spy(monkeypatch, case.artifact.backend), os.sched_getaffinity(0), torch.get_num_threads()
    try:
        os.sched_setaffinity(0, {min(all_cpus)})
        run(copy.deepcopy(case.model), case.inputs(2))
        assert seen == [1]
    finally: os.sched_setaffinity(0, all_cpus)
    torch.set_num_threads(1)
    try: run(copy.deepcopy(case.model), case.inputs(2))
    finally: torch.set_num_threads(n)
    assert seen == [1, 1]


@pytest.mark.parametrize("files, cpus", [
    ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({}, None),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3), ({"cpu.max": "rubbish"}, None),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None)])
def test_the_quota_of_a_container_caps_the_threads(files, cpus, tmp_path, monkeypatch):
    "As the kernel writes it, cgroup version 2 and 1"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert base._quota(tmp_path) == cpus
    usual, quota = cpu_threads(), base._quota
    monkeypatch.setattr(base, "_quota", lambda: quota(tmp_path))
    assert cpu_threads() == (min(usual, int(cpus)) if cpus else usual) and cpu_threads(7) == 7


V1 = {"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}


def _below(folder, files): return {f"{folder}/{k}": v for k, v in files.items()}


@pytest.mark.parametrize("own, files, cpus", [
    ("0::/pod/app", {"pod/app/cpu.max": "150000 100000"}, 1.5),
    ("0::/pod/app", {"pod/cpu.max": "100000 100000", "pod/app/cpu.max": "300000 100000"}, 1),  # a stricter parent
    ("0::/pod/app", {"pod/cpu.max": "300000 100000", "pod/app/cpu.max": "max 100000"}, 3),
    ("0::/pod/app", {"cpu.max": "200000 100000"}, 2),  # only the root is to be seen, as in a container
    ("0::/pod/app", {"other/cpu.max": "100000 100000"}, None), ("0::/../../pod", {"cpu.max": "200000 100000"}, 2),
    ("5:memory:/m\n4:cpu,cpuacct:/pod/app\n0::/", _below("cpu/pod/app", V1), 4),
    ("4:cpuacct,cpu:/pod/app", {**_below("cpu/pod/app", V1), **_below("cpu/pod", {**V1, "cpu.cfs_quota_us": "250000"})}, 2.5),
    ("4:cpu:/pod/app", _below("cpu/pod/app", {**V1, "cpu.cfs_quota_us": "-1"}), None),
    ("4:cpu,cpuacct:/pod", _below("cpu,cpuacct/pod", V1), 4), ("4:cpuset:/pod/app", _below("cpu/pod/app", V1), None),
    ("rubbish", {"cpu.max": "200000 100000"}, 2), (None, {"cpu.max": "200000 100000"}, 2),
    ("0::/pod", {"pod/cpu.max": "1 0", "cpu.max": "200000 100000"}, 2)])
def test_the_strictest_quota_of_all_levels_caps_the_threads(own, files, cpus, tmp_path):
    "As /proc/self/cgroup names the process, cgroup version 2 and 1; `None`: it cannot be read"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text + "\n")
    if own is not None: (tmp_path / "own").write_text(own + "\n")
    assert base._quota(tmp_path, tmp_path / "own") == cpus


def test_a_quota_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "pod/cpu.max").mkdir(parents=True)
    (tmp_path / "own").write_bytes(b"0::/pod\n\xff")
    assert base._quota(tmp_path, tmp_path / "own") is None


@each_table
def test_calls_leave_the_process_as_it_was(case):
    model = copy.deepcopy(case.model)
    model.threads = 1
    n, grad, rng = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state()
    run(model, case.inputs(5))
    assert torch.get_num_threads() == n and torch.is_grad_enabled() == grad and torch.equal(torch.get_rng_state(), rng)


@each_table
def test_threads_of_the_process_survive_calls_at_once(case):
    model, xs, n = copy.deepcopy(case.model), case.inputs(2), torch.get_num_threads()
    model.threads = 1
    torch.set_num_threads(2)
    try:
        ts = [threading.Thread(target=lambda: [run(model, xs) for _ in range(200)], daemon=True) for _ in range(4)]
        for t in ts: t.start()
        for t in ts: t.join(60)
        assert torch.get_num_threads() == 2
        left = []
        t = threading.Thread(target=lambda: left.append(torch.get_num_threads()))
        t.start()
        t.join()
        assert left == [2], "threads that start later would run with less"
    finally: torch.set_num_threads(n)


def test_threads_option_of_export(artifacts, tmp_path, monkeypatch):
    learn = artifacts.learner("table")
    learn.export(tmp_path / "one.pkl", compile="eager", threads=1)
    from fastai_compile import open_learner
    seen = _spy(monkeypatch, "eager")
    open_learner(tmp_path / "one.pkl")
    assert seen == [1]


# ---- copies

@each
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "cloudpickle", "torch.save"])
def test_copies(case, how):
    if how == "deepcopy": other = copy.deepcopy(case.model)
    elif how == "torch.save":
        buf = io.BytesIO()
        torch.save(case.model, buf)
        other = torch.load(io.BytesIO(buf.getvalue()), weights_only=False)
    else: other = pickle.loads((pickle if how == "pickle" else cloudpickle).dumps(case.model))
    assert type(other) is CompiledModel and not other.training
    assert {t.data_ptr() for t in other.parameters()}.isdisjoint({t.data_ptr() for t in case.model.parameters() if t.numel()})
    xs = case.inputs(7)
    assert torch.equal(run(other, xs), run(case.model, xs))
    del other
    case.check(xs)


@each
def test_weights_are_those_of_the_learner(case):
    ours, theirs = case.model.state_dict(), case.artifact.learn.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [n for n, _ in case.model.named_parameters()] == [n for n, _ in case.artifact.learn.model.named_parameters()]


def _first_weight(model): return next(p for p in model.parameters() if p.ndim > 1 and p.numel() > 16)


def _edit_in_place(m):
    with torch.no_grad(): _first_weight(m).add_(1)
def _edit_one_number(m):
    with torch.no_grad(): _first_weight(m).view(-1)[3] = 9
def _edit_data(m): _first_weight(m).data.mul_(2)
def _edit_set_data(m): _first_weight(m).data = torch.zeros_like(_first_weight(m))
def _edit_numpy(m): _first_weight(m).detach().numpy()[...] *= 2
def _edit_buffer(m): next(b for b in m.buffers() if b.is_floating_point()).add_(1)
def _edit_vector(m): nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters())
def _edit_state_dict(m): next(t for t in m.state_dict().values() if t.is_floating_point() and t.ndim > 1).mul_(2)
def _edit_init(m): nn.init.zeros_(_first_weight(m))
def _edit_replace(m):
    layer = next(l for l in m.eager.modules() if isinstance(l, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


COUNTED = [_edit_in_place, _edit_one_number, _edit_buffer, _edit_vector, _edit_state_dict, _edit_init, _edit_set_data]
UNCOUNTED = [_edit_data, _edit_numpy, _edit_replace]  # PyTorch's version counters do not see these


@each_table
@pytest.mark.parametrize("edit", COUNTED, ids=lambda f: f.__name__[6:])
def test_edited_weights_are_noticed(case, edit):
    model, xs = copy.deepcopy(case.model), case.inputs(3)
    run(model, xs)
    edit(model)
    with pytest.raises(NotTrainable, match="to_eager"): run(model, xs)
    with pytest.raises(NotTrainable): pickle.dumps(model)
    case.check(xs)  # the original has weights of its own


@each_table
@pytest.mark.parametrize("edit", UNCOUNTED, ids=lambda f: f.__name__[6:])
def test_edits_behind_the_counters_are_noticed(case, edit):
    "At the next call, and where the model is copied or written"
    model, xs = copy.deepcopy(case.model), case.inputs(3)
    run(model, xs)
    edit(model)
    for _ in range(2):
        with pytest.raises(NotTrainable, match="to_eager"): run(model, xs)
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(NotTrainable, match="to_eager"): copied(model)
    case.check(xs)


@each_table
def test_a_weight_that_was_kept_and_edited_later_is_noticed_soon(case):
    model, xs = copy.deepcopy(case.model), case.inputs(3)
    kept = _first_weight(model)
    run(model, xs)
    kept.data.mul_(2)
    with pytest.raises(NotTrainable, match="to_eager"):
        for _ in range(100_000): run(model, xs)


def _relayer(m): m.eager.layers[-1] = nn.Sequential(*m.eager.layers[-1])
def _rehook(m): m.eager.register_forward_hook(lambda m, i, o: o * 2)
def _reforward(m): m.eager.layers[-1].forward = lambda x: x
def _reorder(m): m.eager.embeds = nn.ModuleList(reversed(m.eager.embeds)) if len(m.eager.embeds) > 1 else nn.ModuleList()


@each_table
@pytest.mark.parametrize("edit", [_relayer, _rehook, _reforward, _reorder], ids=lambda f: f.__name__)
def test_layers_that_change_are_noticed(case, edit, tmp_path):
    model, xs = copy.deepcopy(case.model), case.inputs(3)
    edit(model)
    with pytest.raises(NotTrainable, match="layer"): run(model, xs)
    with pytest.raises(NotTrainable, match="layer"): pickle.dumps(model)
    case.check(xs)


# ---- planted faults

class Faulty(Wrapped):
    "Gives right answers, but for one fault"
    def __init__(self, inner, fault, key):
        super().__init__(inner, "faulty", key)
        self.fault, self.extra = fault, {}
    def around(self, run, xs): return self.fault(self, run, xs)


def _changed_weight(pick):
    "The effect of one changed weight, on any backend: what eager gives more with it than without"
    def fault(b, run, xs):
        if "m" not in b.extra:
            m = copy.deepcopy(b.captured.module)
            w = pick([p for p in m.parameters() if p.ndim > 1])
            with torch.no_grad():
                i = w.abs().flatten().argmax()
                w.view(-1)[i] *= 1.01
            b.extra["m"] = m
        with torch.no_grad(): more = [a - o for a, o in zip(b.extra["m"](*xs), b.captured.module(*xs))]
        return [t + m for t, m in zip(run(xs), more)]
    return fault


def _outputs_permuted(b, run, xs): return [t.flip(-1) for t in run(xs)]
def _classes_shifted(b, run, xs): return [t.roll(1, -1) for t in run(xs)]
def _one_class_shifted(b, run, xs): return [t + 0.01 * (torch.arange(t.shape[-1]) == 1) for t in run(xs)]
def _normalize_missing(b, run, xs): return run([x * 0.226 + 0.449 if x.is_floating_point() else x for x in xs])
def _fp16_in_disguise(b, run, xs):
    b.extra.setdefault("m", copy.deepcopy(b.captured.module).half())
    with torch.no_grad(): return [t.float() for t in b.extra["m"](*[x.half() if x.is_floating_point() else x for x in xs])]
def _fp16_weights(b, run, xs):
    b.extra.setdefault("m", copy.deepcopy(b.captured.module).half().float())
    with torch.no_grad(): return list(b.extra["m"](*xs))
def _bf16_output(b, run, xs): return [t.bfloat16().float() for t in run(xs)]
def _rows_permuted(b, run, xs): return [t.flip(0) for t in run(xs)]
def _rows_mixed(b, run, xs): return [t + 1e-3 * t.mean(0, keepdim=True) if len(t) > 1 else t for t in run(xs)]
def _wrong_at_one_row(b, run, xs): return [t * 1.001 if len(t) == 1 else t for t in run(xs)]
def _wrong_at_the_remainder(b, run, xs): return [t * 1.001 if len(t) == 3 else t for t in run(xs)]
def _all_nan(b, run, xs): return [torch.full_like(t, float("nan")) for t in run(xs)]
def _inf(b, run, xs): return [t.masked_fill(torch.arange(t.shape[-1]) == 0, float("inf")) for t in run(xs)]
def _too_few_rows(b, run, xs): return [t[:-1] for t in run(xs)]
def _too_few_classes(b, run, xs): return [t[..., :-1] for t in run(xs)]
def _too_many_outputs(b, run, xs): return [*run(xs), xs[-1]]
def _fp64_output(b, run, xs): return [t.double() for t in run(xs)]
def _stale(b, run, xs):
    ts = b.extra.setdefault(len(xs[0]), run(xs))
    return [t.clone() for t in ts]


def _one_late_row(value):
    "Wrong for a single validation row, which is in none of the batches that the numbers are compared on"
    def fault(b, run, xs):
        return [torch.where((b.extra["row"](xs)).reshape(-1, *[1] * (t.ndim - 1)), value(t), t) for t in run(xs)]
    return fault


FAULTS = {
    "first weight changed": _changed_weight(lambda ws: ws[0]), "last weight changed": _changed_weight(lambda ws: ws[-1]),
    "outputs permuted": _outputs_permuted, "classes shifted": _classes_shifted, "one class shifted": _one_class_shifted,
    "Normalize missing": _normalize_missing, "fp16 in disguise": _fp16_in_disguise, "fp16 weights": _fp16_weights,
    "bf16 output": _bf16_output, "rows permuted": _rows_permuted, "rows mixed": _rows_mixed,
    "wrong at one row": _wrong_at_one_row, "wrong at the remainder": _wrong_at_the_remainder,
    "NaN": _all_nan, "inf": _inf, "too few rows": _too_few_rows, "too few classes": _too_few_classes,
    "too many outputs": _too_many_outputs, "fp64 output": _fp64_output, "a stale answer": _stale,
    "NaN for one input": _one_late_row(lambda t: torch.full_like(t, float("nan"))),
    "another class for one input": _one_late_row(lambda t: t.flip(-1)),
}
MAIN = ["first weight changed", "last weight changed", "outputs permuted", "Normalize missing", "one class shifted",
        "NaN for one input", "fp16 in disguise"]  # the others are the same for every backend: they run with one
PLANTED = [(b, "table", f) for b in RUNS for f in (MAIN if b != "eager" else FAULTS)] + [("eager", "image", f) for f in MAIN]


def _late_row(learn):
    "Recognises the last row of the validation set by its inputs"
    b = learn.dls.valid.new(shuffle=False, drop_last=False, bs=learn.dls.valid.n).one_batch()
    row = [x[-1:].as_subclass(torch.Tensor) for x in b[:learn.dls.n_inp]]
    return lambda xs: torch.stack([(x == r).flatten(1).all(1) for x, r in zip(xs, row)]).all(0)


@pytest.mark.parametrize("inner,kind,fault", PLANTED, ids=lambda o: o.replace(" ", "_"))
def test_planted_faults_are_refused(inner, kind, fault, artifacts, tmp_path):
    artifacts(inner, kind)
    learn, path = artifacts.learner(kind), tmp_path / "model.pkl"
    path.write_bytes(b"what was there before")
    before, backend = Files.of(tmp_path), Faulty(inner, FAULTS[fault], kind)
    backend.extra["row"] = _late_row(learn)
    with registered(backend):
        with pytest.raises(VerificationError) as e: learn.export(path, compile="faulty")
    assert backend.compiled == 1
    assert Files.of(tmp_path) == before, "the old file is not as it was, or something was left beside it"
    assert re.search("row|output|batch", str(e.value)), e.value


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_fault_the_same_export_passes(kind, artifacts, tmp_path):
    with registered(Faulty("eager", lambda b, run, xs: run(xs), kind)) as backend:
        report = artifacts.learner(kind).export(tmp_path / "model.pkl", compile="faulty")
        assert backend.compiled == 1 and report.backend == "faulty" and (tmp_path / "model.pkl").exists()


def test_the_worst_rows_are_named(artifacts, tmp_path):
    learn = artifacts.learner("image")
    name = str(learn.dls.valid.items[-1])
    backend = Faulty("eager", FAULTS["NaN for one input"], "image")
    backend.extra["row"] = _late_row(learn)
    with registered(backend):
        with pytest.raises(VerificationError, match=re.escape(os.path.basename(name))):
            learn.export(tmp_path / "x.pkl", compile="faulty")
    assert not list(tmp_path.iterdir())


def test_a_faulty_candidate_makes_room_for_the_next(artifacts, tmp_path):
    learn = artifacts.learner("table")
    with registered(Faulty("eager", _outputs_permuted, "table")):
        report = learn.export(tmp_path / "x.pkl", compile=["faulty", "eager"])
    assert report.backend == "eager"
    assert "refused" in next(r["result"] for r in report.candidates if r["backend"] == "faulty")


def test_a_metric_that_moves_is_refused(artifacts, tmp_path):
    "Numbers within the caller's own tolerance, and yet another accuracy"
    learn = artifacts.learner("table")
    with registered(Faulty("eager", _one_class_shifted_far, "table")):
        with pytest.raises(VerificationError, match="metric accuracy went from .*; predictions moved most: row .*: "):
            learn.export(tmp_path / "x.pkl", compile="faulty", tolerance=100.)
    assert not list(tmp_path.iterdir())


def _one_class_shifted_far(b, run, xs): return [t + 5. * (torch.arange(t.shape[-1]) == 1) for t in run(xs)]


class Crashing(Wrapped):
    def compile(self, captured, config): raise RuntimeError("the compiler broke")


class Refusing(Wrapped):
    def compile(self, captured, config): raise BackendError("this graph is not for me")


@pytest.mark.parametrize("backend", [Crashing, Refusing])
def test_a_backend_that_breaks_is_a_typed_error(backend, artifacts, tmp_path):
    with registered(backend()) as b:
        learn = artifacts.learner("table")
        with pytest.raises(CompileError, match="broke|not for me"): learn.export(tmp_path / "x.pkl", compile=b.name)
        report = learn.export(tmp_path / "y.pkl", compile=[b.name, "eager"])
    assert report.backend == "eager" and [p.name for p in tmp_path.iterdir()] == ["y.pkl"]


# ---- forks

def _in_child(f, timeout=120):
    "What `f` gives in a forked child: ('ok', result), ('raised', error) or ('hangs', None)"
    ctx = multiprocessing.get_context("fork")
    ours, theirs = ctx.Pipe(duplex=False)
    def work():
        try: theirs.send(("ok", f()))
        except BaseException as e: theirs.send(("raised", f"{type(e).__name__}: {e}"))
        theirs.close()
    p = ctx.Process(target=work, daemon=True)
    p.start()
    theirs.close()
    try:
        res = ours.recv() if ours.poll(timeout) else ("hangs", None)
    except EOFError: res = ("died", p.exitcode)
    if res[0] == "hangs": os.kill(p.pid, signal.SIGKILL)
    p.join(30)
    return res


@each
@pytest.mark.parametrize("when", ["loaded", "called", "copied in the child"])
def test_fork(case, when):
    model = copy.deepcopy(case.model)
    xs = case.inputs(case.model.max_bs, 4)
    want = run(case.model, xs).numpy()
    if when == "loaded": model.runner()
    else: run(model, xs)
    def child(): return (run(copy.deepcopy(model), xs) if when == "copied in the child" else run(model, xs)).numpy()
    for _ in range(2):
        how, got = _in_child(child)
        assert how in ("ok", "raised"), f"the child {how} ({got})"
        if how == "ok": assert_close(torch.from_numpy(got), torch.from_numpy(want))
        case.check(xs, run(model, xs))  # the parent goes on


@each_table
def test_fork_while_another_thread_loads(case, monkeypatch):
    b, inside, go_on = get_backend(case.artifact.backend), threading.Event(), threading.Event()
    stock, parent = b.load, os.getpid()
    def slow(*args):
        if os.getpid() == parent:
            inside.set()
            go_on.wait(60)
        return stock(*args)
    monkeypatch.setattr(b, "load", slow)
    model, other, xs = copy.deepcopy(case.model), copy.deepcopy(case.model), case.inputs(2)
    t = threading.Thread(target=lambda: run(model, xs), daemon=True)
    t.start()
    try:
        assert inside.wait(30)
        how, got = _in_child(lambda: run(other, xs).numpy(), 30)
    finally:
        go_on.set()
        t.join(30)
    assert how in ("ok", "raised"), f"the child {how}"


FORKED_PREDICT = """
import os, time, signal
from fastai.vision.all import *
img = PILImage.create(np.random.default_rng(0).integers(0, 256, (900, 700, 3), dtype=np.uint8))
def ended(pid, seconds):
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
def forked(f):
    pid = os.fork()
    if pid: return pid
    try: os._exit(f())
    except BaseException as e: print(repr(e), flush=True); os._exit(4)
def worker(learn, want):
    got = learn.predict(img)[2]
    preds = learn.get_preds(dl=learn.dls.test_dl([img]*9, num_workers=0))[0]
    return 0 if torch.allclose(got, want, atol=1e-5) and preds.shape[0] == 9 else 3
def server(path):
    learn = load_learner(path)
    with learn.no_bar():
        want = learn.predict(img)[2]
        big = torch.randn(2000, 2000).add(1).exp().sum()  # a parallel region in the parent
        code = ended(forked(lambda: worker(learn, want)), 45)
    return 5 if code is None else code
answer({{path: ended(forked(lambda: server(path)), 90) for path in {paths!r}}})
"""


@pytest.fixture(scope="module")
def ends_of_workers(artifacts):
    "How the forked worker of each backend ended. Its server is a process that has loaded nothing but this backend's file"
    paths = {name: str(artifacts(name, "image").path) for name in RUNS}
    ends = fresh(FORKED_PREDICT.format(paths=list(paths.values())), timeout=800)
    return {name: ends[path] for name, path in paths.items()}


@pytest.mark.parametrize("name", RUNS)
def test_predict_in_a_forked_worker(name, ends_of_workers):
    "As with `gunicorn --preload`: loaded and used in the parent, used again in the child"
    code = ends_of_workers[name]
    assert code is not None, "the server hangs"
    assert code != 5, "the child hangs"
    assert code in (0, 4), f"the child ends with {code}: wrong answers (3) or a signal (negative)"


def test_all_public_errors_are_compile_errors():
    errors = importlib.import_module("fastai_compile.errors")
    for name in errors.__all__:
        cls = getattr(errors, name)
        assert issubclass(cls, CompileError) and not issubclass(cls, (ImportError, AttributeError)), name

