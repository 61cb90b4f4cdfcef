"""What the gate must not let pass, and what it must not refuse: one fault each, through a whole export."""
import copy
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.vision.all import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat, ProgressCallback,
                               accuracy, load_learner, nn, noop, rmse, set_seed)

from fastai_compile import CaptureError, ExampleError, VerificationError, inspect_artifact, open_learner
from fastai_compile.verify import FLOOR, room, size_around
from helpers import LACKS, Wrapped, make_learner, registered


class Fault(Wrapped):
    "Right answers, but for what `fault` makes of them"
    def __init__(self, fault):
        super().__init__("eager", "fault")
        self.fault = fault
    def around(self, run, xs): return self.fault(run, xs)


def plain_learner(path, net=None, target=None, loss=None, n=300, bs=16, valid_bs=None, **kw):
    "Three numbers to two; nothing is trained"
    set_seed(0)
    x = torch.randn(n, 3)
    y = (x.sum(1) > 0).long() if target is None else target(x)
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items, bs=bs, shuffle=True), DataLoader(items, bs=valid_bs or bs))
    net = net or nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    learn = Learner(dls, net, loss_func=loss or CrossEntropyLossFlat(), path=path, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger, learn.create_mbar = noop, False
    return learn


def exported(learn, fault=None, **kw):
    "The report of an export by a backend with one fault, or by eager"
    file = learn.path / "gate.pkl"
    if fault is None: return learn.export(file, compile="eager", **kw)
    with registered(Fault(fault)): return learn.export(file, compile="fault", **kw)


def without_data(learn):
    "The same from a stock file"
    learn.export(learn.path / "stock.pkl")
    return load_learner(learn.path / "stock.pkl")


# ---- sizes
class TwoSizes(nn.Module):
    def __init__(self, large):
        super().__init__()
        self.a, self.b, self.large = nn.Linear(3, 32), nn.Linear(32, 2), large
    def forward(self, x): return self.b(torch.relu(self.a(x))) * torch.tensor([self.large, 1.])


def two_sizes(path, large):
    return plain_learner(path, TwoSizes(large), lambda x: torch.stack([x.sum(1) * large, x.sum(1)], 1), MSELossFlat(),
                         metrics=[rmse])


def _half(run, xs):
    half = copy.deepcopy(run.module).half()
    with torch.no_grad(): return torch.stack([run(xs)[0][:, 0], half(xs[0].half())[0].float()[:, 1]], 1)


@pytest.mark.parametrize("large,fault", [(1e6, lambda run, xs: [run(xs)[0] * torch.tensor([1., 0.])]),
                                         (2000., lambda run, xs: [_half(run, xs)])], ids=["zeros", "fp16"])
def test_a_small_column_is_not_excused_by_a_large_one(tmp_path, large, fault):
    with pytest.raises(VerificationError, match="off by"): exported(two_sizes(tmp_path, large), fault)
    assert not (tmp_path / "gate.pkl").exists()
    assert exported(two_sizes(tmp_path, large)).backend == "eager"


def test_other_rows_are_not_excused_by_one_that_is_out_of_the_ordinary(tmp_path):
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 10))
    def off(run, xs):
        t = run(xs)[0]
        return [torch.cat([t[:1], t[1:] + 0.05 * torch.linspace(-1, 1, 10)])]
    def with_outlier():
        learn = plain_learner(tmp_path, net, lambda x: (x.sum(1) > 0).long())
        learn.dls.valid.dataset[0] = torch.tensor([1e5, 1e5, 1e5]), torch.tensor(1)
        return learn
    with pytest.raises(VerificationError, match="off by 0.05"): exported(with_outlier(), off)
    assert exported(with_outlier()).backend == "eager"


def test_the_size_around_a_number_is_not_taken_from_too_few():
    one = torch.tensor([[1., 1e-5]])
    assert (size_around(one) == 1).all() # one row tells little of a column
    many = torch.rand(200, 2) * torch.tensor([1e4, 1.])
    assert size_around(many)[:, 1].max() < 1.1 and size_around(many)[:, 0].min() > 50 # of a row: two numbers, which may be small
    assert size_around(torch.zeros(0, 4)).numel() <= 1 and size_around(torch.zeros(3)).max() == 0
    assert (room(torch.zeros(4, 4), FLOOR) > 0).all()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", pytest.param("inductor", marks=pytest.mark.slow)])
def test_sizes_that_differ_refuse_no_sound_backend(tmp_path, backend):
    if backend in LACKS: pytest.skip(LACKS[backend])
    report = two_sizes(tmp_path, 1e6).export(tmp_path / "two.pkl", compile=backend)
    assert report.backend == backend


# ---- embeddings
def test_every_index_of_an_embedding_is_looked_up(tmp_path):
    "fastai sends each category that it does not know to row 0, which no row of the validation set may hold"
    learn = make_learner("table", tmp_path)
    twin = copy.deepcopy(learn.model).eval()
    with torch.no_grad(): twin.embeds[0].weight[0] += 5
    def fault(run, xs):
        with torch.no_grad(): return [twin(*xs)]
    with registered(Fault(fault)), pytest.raises(VerificationError, match="every index of the embeddings"):
        learn.export(tmp_path / "t.pkl", compile="fault")


def test_embeddings_of_many_rows_are_looked_up_in_batches(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many, self.out = nn.Embedding(5, 4), nn.Embedding(2000, 4), nn.Linear(8, 2)
        def forward(self, x): return self.out(torch.cat([self.few(x[:, 0]), self.many(x[:, 1])], 1))
    def learner(net):
        items = [(torch.tensor([i % 3, i % 7]), torch.tensor(i % 2)) for i in range(40)]
        dls = DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8))
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), path=tmp_path)
        learn.logger, learn.create_mbar = noop, False
        return learn
    net = Net().eval()
    report = learner(net).export(tmp_path / "many.pkl", compile="eager")
    whats = [r["what"] for r in report.gate if "every index" in r["what"]]
    assert len(whats) == 8 and whats[-1].endswith("448 to 511")
    seen = []
    def watched(run, xs):
        seen.append(xs[0][:, 1])
        return run(xs)
    with registered(Fault(watched)): learner(net).export(tmp_path / "many.pkl", compile="fault")
    assert {0, 1999} <= set(torch.cat(seen).tolist())
    with torch.no_grad(): net.many.weight[1999] = float("nan")
    report = learner(net).export(tmp_path / "many.pkl", compile="eager")
    assert "not compared" in [r["result"] for r in report.gate if "eager gives NaN" in r["what"]]


# ---- rows
def test_rows_that_depend_on_each_other_are_told(tmp_path):
    class Centred(nn.Linear):
        def forward(self, x): return super().forward(x) - super().forward(x).mean(0)
    with pytest.raises(VerificationError, match="rows of a batch depend on each other"):
        exported(plain_learner(tmp_path, Centred(3, 2)))


def test_no_more_rows_than_asked_of_a_pytorch_loader(tmp_path):
    x = torch.randn(3000, 3)
    def loader(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long()), batch_size=64)
    learn = plain_learner(tmp_path, metrics=[accuracy])
    learn.dls = DataLoaders(loader(), loader())
    report = exported(learn, verify_rows=100)
    assert "get_preds, 128 validation rows" in [r["what"] for r in report.gate]
    assert any("128 rows" in n for n in report.notes)


def test_no_more_rows_than_asked(tmp_path):
    report = exported(plain_learner(tmp_path, metrics=[accuracy]), verify_rows=100)
    assert "get_preds, 100 validation rows" in [r["what"] for r in report.gate]
    assert any("not enough data" in n and "100 rows" in n for n in report.notes)


# ---- metrics
def test_metrics_that_say_nothing_are_left_out_by_name(tmp_path):
    def infinite(p, t): return torch.tensor(float("inf"))
    def undefined(p, t): return float("nan")
    def broken(p, t): raise ValueError("needs three classes")
    report = exported(plain_learner(tmp_path, metrics=[accuracy, infinite, undefined, broken]))
    assert [r["what"] for r in report.gate if r["check"] == "metric"] == ["accuracy"]
    for name, why in ("infinite", "inf before"), ("undefined", "NaN before"), ("broken", "needs three classes"):
        assert any(name in n and why in n for n in report.notes)


def test_undecided_rows_may_move_a_metric_of_any_size(tmp_path):
    def percent(p, t): return 100 * accuracy(p, t)
    learn = plain_learner(tmp_path, metrics=[percent])
    with torch.no_grad():
        learn.model[2].weight[1] = learn.model[2].weight[0]
        learn.model[2].bias[1] = learn.model[2].bias[0] + 1e-7
    report = exported(learn, lambda run, xs: [t + torch.tensor([2e-7, 0.]) for t in run(xs)])
    moved = next(r for r in report.gate if r["check"] == "metric")
    assert moved["against"] != moved["result"]


@pytest.mark.parametrize("allowed,written", [(0., False), (0.9, True)])
def test_a_metric_may_move_as_far_as_asked(tmp_path, allowed, written):
    learn = plain_learner(tmp_path, metrics=[accuracy])
    def noisy(run, xs): return [t + torch.randn(t.shape) * 0.5 for t in run(xs)]
    kw = {"tolerance": 10., "max_metric_change": allowed}
    if written: assert exported(learn, noisy, **kw).backend == "fault"
    else:
        with pytest.raises(VerificationError, match="metric accuracy went from"): exported(learn, noisy, **kw)


# ---- callbacks
def test_what_a_callback_holds_is_not_touched(tmp_path):
    class Meter: n = 0
    class Log(Callback):
        def __init__(self): self.held, self.meter = {"preds": []}, Meter()
        def after_pred(self):
            self.held["preds"].append(1)
            self.meter.n += 1
    log = Log()
    exported(plain_learner(tmp_path, cbs=[log]))
    assert log.held == {"preds": []} and log.meter.n == 0


def test_a_callback_that_cannot_be_copied_is_left_out_by_name(tmp_path):
    class Connected(Callback):
        calls = 0
        def __deepcopy__(self, memo): raise TypeError("a connection cannot be copied")
        def after_pred(self): Connected.calls += 1
    report = exported(plain_learner(tmp_path, cbs=[Connected()]))
    assert not Connected.calls
    assert any("callback connected is left out" in n and "a connection cannot be copied" in n for n in report.notes)


# ---- batches and inputs
@pytest.mark.parametrize("bs,valid_bs,want", [(128, 16, 128), (16, 128, 128), (16, 16, 64)])
def test_the_largest_batch_is_that_of_the_loaders(tmp_path, bs, valid_bs, want):
    exported(plain_learner(tmp_path, bs=bs, valid_bs=valid_bs))
    assert open_learner(tmp_path / "gate.pkl").model.max_bs == want


def test_a_largest_batch_of_one_is_kept(tmp_path):
    report = exported(plain_learner(tmp_path), max_bs=1)
    assert "max_bs=1)" in report.pinned and inspect_artifact(tmp_path / "gate.pkl")["batch"] == [1, 1]
    learn = open_learner(tmp_path / "gate.pkl")
    x = torch.randn(5, 3)
    assert torch.allclose(learn.model(x), learn.model.eager(x), atol=1e-6) # cut


def test_a_model_that_cannot_be_copied_is_told(tmp_path):
    learn = plain_learner(tmp_path)
    learn.model.lock = threading.Lock()
    with pytest.raises(CaptureError, match="cannot be copied.*lock"): exported(learn)


@pytest.mark.parametrize("items", ["one.png", Path("one.png"), iter([1]), 5], ids=["str", "path", "iterator", "number"])
def test_items_that_are_no_list_are_told(tmp_path, items):
    learn = without_data(make_learner("image", tmp_path))
    with pytest.raises(ExampleError, match="items must be a list"):
        learn.export(tmp_path / "i.pkl", compile="eager", items=items)


@pytest.mark.parametrize("what,items", [("image", ["nowhere.png"]), ("table", pd.DataFrame({"width": [1.]})),
                                        ("table", [{"width": 1}])], ids=["missing file", "missing columns", "list of dicts"])
def test_items_that_cannot_be_read_are_told(tmp_path, what, items):
    learn = without_data(make_learner(what, tmp_path))
    with pytest.raises(ExampleError, match="cannot take|no batch can be made"):
        learn.export(tmp_path / "i.pkl", compile="eager", items=items)
    assert not (tmp_path / "i.pkl").exists()


# ---- what is said
def test_the_pinned_call_writes_to_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    learn = plain_learner(tmp_path)
    report = learn.export("models/here.pkl", compile="eager")
    assert report.pinned.startswith("learn.export('models/here.pkl', ") and (tmp_path / "models" / "here.pkl").exists()
    (tmp_path / "models" / "here.pkl").unlink()
    exec(report.pinned, {"learn": learn})
    assert (tmp_path / "models" / "here.pkl").exists()


def test_backends_that_were_not_tried_are_listed_in_the_error(tmp_path):
    wrong = Fault(lambda run, xs: [t + 1 for t in run(xs)])
    late = Wrapped("eager", "late")
    wrong.cost, late.cost = -2, -1
    with registered(wrong, late), pytest.raises(VerificationError, match=r"(?s)fault: refused.*late: not tried: budget_s=0"):
        plain_learner(tmp_path).export(tmp_path / "none.pkl", compile=True, budget_s=0)
