"""Graph breaks and recompiles: the right layer, the right line, and nothing left behind."""
import contextlib
import gc
import io
import logging
import pickle
import random
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import TensorImage
from torch import nn
from torch.utils.data import TensorDataset

from break_causes import CAUSES, PATH, Branch, Grow, Item, Layer, Model, Print, line_of
from fastai_compile.breaks import breaks_of, find_breaks
from fastai_compile.errors import GraphBreakError
from fastai_compile.dynamo import Listener, _entries, isolated
from fastai_compile.errors import CaptureError, ConfigError
from fastai_compile.graph_callback import GraphBreakCallback

X = torch.linspace(-1, 2, 12).reshape(3, 4)
# What PyTorch 2.15 traces without a break
NO_BREAK = {"NumpyRound", "DictSideEffect", "ListSideEffect", "GlobalSideEffect", "TryExcept", "Random", "TensorHook",
            "Builtin", "Input", "Grow"}
CODES = {"Print": "GB0059", "Item": "GB0124", "Branch": "GB0170", "WhileLoop": "GB0170", "Nonzero": "GB0036",
         "Unique": "GB0036", "Logging": "GB0291", "Warn": "GB0007", "Backward": "GB0123", "Disabled": "GB0099",
         "LoopPrint": "GB0059"}
SAYS = {"Print": "`print`", "Hook": "`print`", "LoopPrint": "`print`", "Item": "Python number", "Tolist": "Python number",
        "FloatOf": "Python number", "Branch": "torch.where(condition", "WhileLoop": "torch.where(condition",
        "Nonzero": "torch.where(mask", "MaskedSelect": "torch.where(mask", "Unique": "torch.where(mask", "Numpy": "NumPy",
        "Logging": "line for the log", "Warn": "a warning", "RandomChoice": "torch.rand", "RandomGauss": "torch.rand",
        "Deepcopy": "clone", "DeepcopyLayer": "clone", "Subclass": "as_subclass", "Clock": "clock", "Open": "`open`",
        "Lock": "_thread.allocate_lock", "Traceback": "sys._getframe", "Seed": "seeded", "Generator": "generator",
        "Backward": "`backward`", "Disabled": "torch.compiler.disable", "Lstm": "nn.LSTM"}
needs_215 = pytest.mark.skipif(torch.__version__ < "2.15", reason="the table was made with torch 2.15")
names_layers = pytest.mark.skipif(torch.__version__ < "2.12", reason="dynamo of torch 2.11 says only that the model breaks")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager_answer(model, x):
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()): return model(x)


# ---- find_breaks: where and why

@needs_215
@pytest.mark.parametrize("name", CAUSES)
def test_layer_and_line(name):
    cls = CAUSES[name]
    rows = find_breaks(Model(cls()), X, recompiles=False)
    if name in NO_BREAK:
        assert not rows
        return
    file, line = line_of(cls)
    where = [(r.file, r.line) for r in rows]
    assert (file, line) in where, rows
    row = rows[where.index((file, line))]
    assert row.layer == (f"{PATH}.lin" if name == "Hook" else PATH), row
    assert row.cls == ("Linear" if name == "Hook" else cls.__name__)
    assert row.source and row.source in open(file).read().splitlines()[line - 1]
    assert row.reason and row.todo and row.details
    if name in CODES: assert row.code == CODES[name]
    assert SAYS[name] in row.reason + row.todo, row
    assert all(r.layer.startswith(PATH) for r in rows)
    assert len({(r.line, r.reason) for r in rows}) == len(rows)


def test_there_are_enough_causes():
    assert len(set(CAUSES) - NO_BREAK) >= 20


def test_a_cause_is_one_row_with_every_layer_and_the_count():
    model = nn.Sequential(*[Model(Print()) for _ in range(3)]).append(nn.Sequential(nn.Linear(2, 4), Print()))
    for i in range(2): model[i].head = nn.Linear(4, 4)
    rows = find_breaks(model, X).breaks
    assert len(rows) == 1 and rows[0].count == 4
    assert rows[0].layers == (f"0.{PATH}", f"1.{PATH}", f"2.{PATH}", "3.1")
    assert "and 3 more" in repr(rows) and "break_causes.py" in rows._repr_html_()


def test_only_layers_that_run_the_line_are_named():
    class Sometimes(Layer):
        def __init__(self, on): super().__init__(); self.on = on
        def forward(self, x):
            if self.on: print("on")
            return self.lin(x)
    rows = find_breaks(nn.Sequential(Sometimes(False), Sometimes(True)), X, recompiles=False)
    assert "1" in rows[0].layers


def test_the_model_in_training_mode():
    class OnlyTraining(Layer):
        def forward(self, x):
            if self.training: print("training")
            return self.lin(x)
    assert not find_breaks(OnlyTraining(), X, recompiles=False)
    assert len(find_breaks(OnlyTraining(), X, recompiles=False, train=True)) == 1


def test_no_inputs_and_wrong_inputs():
    with pytest.raises(CaptureError, match="pass one batch"): find_breaks(Model(Print()))
    with pytest.raises(CaptureError, match="fails on these inputs"): find_breaks(Model(Print()), torch.ones(2, 3))


# ---- recompiles

def causes_of(model, *xb, **kw): return {r.reason: r for r in find_breaks(model, *xb, **kw).recompiles}


def find(rows, text):
    found = [r for why, r in rows.items() if text in why]
    assert len(found) == 1, (text, list(rows))
    return found[0]


def test_a_plain_model_compiles_again_for_size_and_grad_mode_only():
    rows = causes_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    assert len(rows) == 2
    assert find(rows, "size 0").count == 1 and "then any size" in find(rows, "size 0").reason
    assert find(rows, "gradients").count == 1


def test_a_number_that_changes():
    row = find(causes_of(Model(Grow()), X), "calls")
    assert (row.layer, row.cls, (row.file, row.line)) == (PATH, "Grow", line_of(Grow)) and row.count >= 2


class Fades(nn.Module):
    scale = 1.0
    def forward(self, x):
        self.scale = self.scale * 0.99
        return x * self.scale


def test_a_float_that_changes_with_each_call():
    found = [r for r in find_breaks(nn.Sequential(nn.Linear(4, 4), Fades()), X) if r.kind == "recompile"]
    assert any("scale" in r.reason and "0.99" in r.reason for r in found), found


class Crops(nn.Module):
    def forward(self, x):
        i = random.randint(0, 2)
        return x[:, i:i+2]


def test_a_break_beside_a_draw_names_the_draw():
    found, = find_breaks(Crops(), X, recompiles=False).breaks
    assert "return x[:, i:i+2]" in found.source and "`i = random.randint(0, 2)`, draws a random number" in found.reason
    assert "self.training" in found.todo


def test_a_size_that_is_fixed_every_time():
    class Fixed(Layer):
        def forward(self, x):
            torch._check(x.shape[0] == int(x.shape[0]))
            return self.lin(x) * [0, 1, 2, 3, 4, 5, 6, 7, 8][x.shape[0]]
    row = find(causes_of(Fixed(), X), "size")
    assert row.count == 2 and "every new size" in row.reason or "fixed" in row.reason


def test_a_dtype_that_changes():
    class Cast(Layer):
        def forward(self, x): return self.lin(x.float())
    assert find(causes_of(Cast(), X), "dtype").count == 1


def test_further_batches():
    class Any(nn.Module):
        def forward(self, x): return x * 2
    rows = causes_of(Any(), X, also=[(torch.ones(3, 4, 2),)])
    assert find(rows, "number of dimensions")


# ---- fastai's types

@needs_215
def test_inputs_of_fastais_types():
    rows = find_breaks(nn.Linear(4, 4), TensorImage(X), recompiles=False)
    assert len(rows) == 1 and "TensorImage" in rows[0].reason


@pytest.mark.slow
@names_layers
def test_unet():
    from fastai.layers import ToTensorBase
    from fastai.vision.all import DynamicUnet, resnet18
    from fastai.vision.learner import create_body
    model = DynamicUnet(create_body(resnet18(weights=None), pretrained=False), 2, (32, 32))
    assert any(isinstance(m, ToTensorBase) for m in model.modules())
    rows = find_breaks(model, torch.randn(2, 3, 32, 32), recompiles=False)
    assert rows and all(r.cls == "ToTensorBase" for r in rows), rows


def test_a_learner_with_its_own_data(tmp_path):
    from helpers import make_learner
    learn = make_learner("image", tmp_path, epochs=0)
    learn.model.append(Print())
    learn.model[-1].lin = nn.Linear(4, 4)
    rows = find_breaks(learn, recompiles=False)
    assert [(r.layer, r.cls) for r in rows] == [(str(len(learn.model) - 1), "Print")]


# ---- what is left behind

def test_model_and_random_state_are_untouched():
    model = nn.Sequential(nn.BatchNorm1d(4), Print(), nn.Dropout(0.5), Grow())
    model[0].eval()
    model[1].lin.register_forward_hook(lambda *a: None)
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    objects = {k: id(v) for k, v in model.named_parameters()}
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tracer, grad, levels = sys.gettrace(), torch.is_grad_enabled(), logging.getLogger("torch._dynamo").level
    out = io.StringIO()
    with contextlib.redirect_stdout(out): rows = find_breaks(model, X, train=True)
    assert rows and not out.getvalue()
    assert modes == [m.training for m in model.modules()] and model[3].calls == 0
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert objects == {k: id(v) for k, v in model.named_parameters()} and all(p.grad is None for p in model.parameters())
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert (sys.gettrace(), torch.is_grad_enabled(), logging.getLogger("torch._dynamo").level) == (tracer, grad, levels)


def dynamo_state():
    utils = torch._dynamo.utils
    return ({k: dict(v) for k, v in utils.counters.items()}, len(utils.graph_break_reasons),
            [str(m.compile_id) for m in utils.get_compilation_metrics()],
            len(torch._dynamo.callback.callback_handler.start_callbacks), torch._dynamo.config.recompile_limit,
            [(log.level, log.propagate, len(log.handlers)) for log in map(logging.getLogger, (
                "torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks"))])


@pytest.mark.parametrize("culprit", [Print, Branch, CAUSES["LoopPrint"], Layer])
def test_what_was_compiled_stays_compiled(culprit):
    class Fine(Layer):
        def forward(self, x): return self.lin(x)
    graphs = []
    def backend(gm, xs):
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        graphs.append([re.sub(r"s\d+", "s", str(getattr(v, "shape", v))) for v in values])
        return gm.forward
    model = Model(Fine() if culprit is Layer else culprit()).eval()
    mine = torch.compile(model, backend=backend)
    eager_answer(mine, X)
    before, made = dynamo_state(), len(graphs)
    find_breaks(model, X)
    assert dynamo_state() == before
    eager_answer(mine, X)
    assert len(graphs) == made
    eager_answer(mine, torch.cat([X, X])), eager_answer(mine, torch.cat([X, X, X]))
    after = graphs[made:]
    torch._dynamo.reset()
    graphs.clear()
    alone = torch.compile(Model(Fine() if culprit is Layer else culprit()).eval(), backend=backend)
    for n in (1, 2, 3): eager_answer(alone, torch.cat([X] * n))
    assert graphs[made:] == after


@needs_215
def test_an_uncompiled_model_leaves_no_code():
    model = Model(Print())
    find_breaks(model, X)
    assert not _entries(Print.forward.__code__) and not _entries(Model.forward.__code__)


def test_a_failure_inside_leaves_nothing_either():
    before = dynamo_state()
    with pytest.raises(ZeroDivisionError), isolated(), Listener():
        torch.compile(nn.Linear(4, 4), backend="eager")(X)
        raise ZeroDivisionError
    assert dynamo_state() == before


# ---- a capture that fails

@pytest.mark.parametrize("culprit", [Branch, CAUSES["WhileLoop"]])
@pytest.mark.parametrize("ask", [True, False])
def test_rows_of_a_failed_export(culprit, ask):
    model = Model(culprit()).eval()
    try:
        with torch.no_grad(): torch.export.export(model, (X,), strict=False)
    except Exception as e: error = e
    else: pytest.skip(f"torch {torch.__version__} exports {culprit.__name__}")
    rows = breaks_of(error, model, (X,) if ask else ())
    assert len(rows) == 1 and (rows[0].file, rows[0].line) == line_of(culprit), rows
    assert (rows[0].layer, rows[0].cls) == (PATH, culprit.__name__)
    if ask: assert rows[0].code
    again = pickle.loads(pickle.dumps(GraphBreakError("not one graph", rows)))
    assert again.rows == rows and isinstance(again, CaptureError)


# ---- GraphBreakCallback

def learner(model, n=40):
    gen = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 4, generator=gen), torch.randn(n, 2, generator=gen))
    learn = Learner(DataLoaders.from_dsets(data, data, bs=8, num_workers=0), model, loss_func=MSELossFlat())
    learn.logger = lambda *a: None
    return learn


def compiled(model, how):
    learn = learner(model)
    if how == "method": learn.model.compile(backend="eager")
    else: learn.model = torch.compile(learn.model, backend="eager")
    return learn


def quietly(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.simplefilter("always")
        res = f(*args, **kwargs)
    return res, [str(w.message) for w in told], out.getvalue()


class Late(Layer):
    "Breaks at its third training batch"
    def __init__(self): super().__init__(); self.register_buffer("n", torch.zeros(())); self.kind = "quiet"
    def forward(self, x):
        if self.kind == "loud":
            print("loud")  # here
        return self.lin(x)


class MakeLoud(Callback):
    def before_batch(self):
        if self.training and self.iter == 2: self.model.get_submodule(self.path).kind = "loud"


@pytest.mark.parametrize("how", ["method", "wrapper"])
def test_callback_names_the_batch_and_the_layer(how):
    learn, watch = compiled(Model(Late()), how), GraphBreakCallback()
    loud = MakeLoud()
    loud.path = PATH if how == "method" else f"_orig_mod.{PATH}"
    with learn.no_bar(): _, told, out = quietly(learn.fit, 1, cbs=[watch, loud])
    row = watch.rows.breaks[0]
    assert (row.layer, row.cls) == (PATH, "Late") and row.source == 'print("loud")'
    table = watch.table
    assert next(r["first at"] for r in table if r["kind"] == "break") == "train batch 2 of epoch 0"
    assert len([w for w in told if "train batch 2" in w and "print" in w]) == 1
    assert "train batch 2" in out and learn.recorder.values
    assert any("kind" in r.reason for r in watch.rows.recompiles)


@pytest.mark.parametrize("how", ["method", "wrapper"])
def test_callback_watches_predictions(how):
    learn, watch = compiled(Model(Item()), how), GraphBreakCallback(show=False)
    with learn.no_bar(): _, told, _ = quietly(learn.get_preds, cbs=watch)
    assert (watch.rows.breaks[0].layer, watch.rows.breaks[0].line) == (PATH, line_of(Item)[1])
    assert watch.batches and all(b.startswith("valid batch") for b in watch.batches.values())
    assert not watch._listener.on


def test_callback_raises_before_the_step():
    learn, watch = compiled(Model(Branch()), "method"), GraphBreakCallback("raise")
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), pytest.raises(GraphBreakError, match="train batch 0") as e: quietly(learn.fit, 1, cbs=watch)
    assert e.value.rows[0].layer == PATH and all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
    assert not watch._listener.on


def test_callback_counts_recompiles():
    learn, watch = compiled(Model(Grow()), "method"), GraphBreakCallback("raise", recompile_limit=2)
    with learn.no_bar(), pytest.raises(GraphBreakError, match="calls") as e: quietly(learn.fit, 1, cbs=watch)
    assert e.value.rows[0].kind == "recompile" and e.value.rows[0].count == 3
    learn, watch = compiled(Model(Grow()), "method"), GraphBreakCallback("raise", recompile_limit=None)
    with torch._dynamo.config.patch(recompile_limit=100), learn.no_bar(): quietly(learn.fit, 1, cbs=watch)
    assert max(r.count for r in watch.rows) > 4


def test_callback_tells_when_pytorch_gives_up():
    learn, watch = compiled(Model(Grow()), "method"), GraphBreakCallback(show=False)
    with learn.no_bar(): _, told, _ = quietly(learn.fit, 2, cbs=watch)
    assert any(r.code == "GB0039" for r in watch.rows.breaks), watch.rows
    assert any("gave up" in w for w in told)


def test_warnings_as_errors_do_not_stop_a_fit():
    learn, watch = compiled(Model(Print()), "method"), GraphBreakCallback()
    with learn.no_bar(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.filterwarnings("error", ".*batch 0")
        learn.fit(1, cbs=watch)
    assert watch.rows and "print" in out.getvalue()


def test_an_unreadable_message_does_not_stop_a_fit(monkeypatch):
    learn, watch = compiled(Model(Print()), "method"), GraphBreakCallback()
    monkeypatch.setattr("fastai_compile.graph_callback.break_rows", lambda *a: 1 / 0)
    with learn.no_bar(): _, told, _ = quietly(learn.fit, 1, cbs=watch)
    assert any("could not read" in w for w in told)


def test_callback_says_when_nothing_is_compiled():
    with (learn := learner(Model(Print()))).no_bar():
        _, told, _ = quietly(learn.fit, 1, cbs=GraphBreakCallback())
    assert any("not compiled" in w for w in told)


def test_a_compiled_step_asks_nothing(monkeypatch):
    class Fine(Layer):
        def forward(self, x): return self.lin(x)
    learn, watch = compiled(Model(Fine()), "method"), GraphBreakCallback(show=False)
    looks, before = [], dynamo_state()[-1]
    learn.add_cb(watch)
    with learn.no_bar():
        quietly(learn.fit, 1)
        monkeypatch.setattr(GraphBreakCallback, "_look", lambda self: looks.append(getattr(self, "iter", None)))
        monkeypatch.setattr(Listener, "emit", lambda self, r: looks.append("log"))
        quietly(learn.fit, 3)
    assert len(looks) == 1  # at the end
    monkeypatch.undo()
    watch._listener.stop()
    assert dynamo_state()[-1] == before


def test_a_fit_that_fails_leaves_no_listener():
    before = dynamo_state()[-1]
    class Fails(Callback):
        def after_loss(self): raise ZeroDivisionError('stop')
    learn = compiled(Model(Print()), "method")
    with learn.no_bar(), pytest.raises(ZeroDivisionError):
        quietly(learn.fit, 1, cbs=[GraphBreakCallback(), Fails()])
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, GraphBreakCallback)])
    gc.collect()
    assert dynamo_state()[-1] == before


def test_wrong_action():
    with pytest.raises(ConfigError, match="'warn' or 'raise'"): GraphBreakCallback("stop")


def test_callback_survives_pickling_and_a_reset_of_dynamo():
    watch = pickle.loads(pickle.dumps(GraphBreakCallback(show=False)))
    class Reset(Callback):
        def before_batch(self):
            if self.training and self.iter == 1: torch._dynamo.reset()
    learn = compiled(Model(Print()), "method")
    with learn.no_bar(): quietly(learn.fit, 1, cbs=[watch, Reset()])
    assert watch.rows.breaks[0].layer == PATH


@names_layers
def test_a_recurrent_layer_inside_of_a_container_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True))
        def forward(self, x): return self.body(x)[0]
    found = find_breaks(Recurrent(), torch.randn(2, 3, 3), recompiles=False)
    assert [(r.layer, r.cls) for r in found.breaks] == [("body.1", "LSTM")]


def test_inputs_that_are_no_tensors_are_refused_by_type():
    with pytest.raises(CaptureError, match="the inputs are dict: pass tensors"):
        find_breaks(nn.Linear(3, 4), {"x": torch.ones(2, 3)})
