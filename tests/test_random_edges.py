"""Learners and moments at the edge: threads, forks, empty sets, loaders with code of their own, state that must come back."""
import logging
import os
import random
import secrets
import threading
import time
import warnings
from datetime import date

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import IndexSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorCategory, TensorImage
from fastai.vision.all import ImageBlock, ItemTransform, RandomResizedCropGPU, Resize, Transform, aug_transforms
from torch import nn

from fastai_compile import (CompileError, ExampleError, FreezeTransforms, GraphBreakCallback, RandomTransformError, find_breaks,
                            find_random, frozen)
from fastai_compile.dynamo import Listener
from fastai_compile.reach import content, difference
import random_mistakes as cases
from helpers import make_images
from test_freeze import preds


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_images(tmp_path_factory.mktemp("pixels"), n=20)


@cases.late
def system_noise(x:TensorImage): return x * (secrets.randbelow(1000) / 1000)


class OwnGenerator(Transform):
    order = 50
    def encodes(self, x:TensorImage): return x + float(np.random.default_rng().random())


class SlowItem(ItemTransform):
    order = 50
    def encodes(self, b):
        time.sleep(.02)
        return (b[0] + random.random(), *b[1:])


# ---- threads and forks

def test_a_loop_that_rejects_draws_of_the_system_ends(folder):
    found = find_random(cases.images(folder, batch=[system_noise])).random
    assert [f.name for f in found] == ["system_noise"] and "os.urandom" in found[0].source


def test_other_threads_get_real_entropy_and_the_process_is_put_back(folder):
    make, system = np.random.default_rng, os.urandom
    served = cases.images(folder, batch=[OwnGenerator()])
    served.add_cb(FreezeTransforms("seed"))
    served.get_preds()
    tokens, stop = [], []
    def draw():
        while not stop: tokens.append(secrets.token_hex(8))
    def serve():
        while not stop: served.get_preds()
    threads = [threading.Thread(target=f) for f in (draw, serve)]
    for t in threads: t.start()
    try:
        for _ in range(3):
            found = find_random(cases.images(folder, batch=[OwnGenerator()])).random
            assert [f.name for f in found] == ["OwnGenerator"]
    finally:
        stop.append(1)
        for t in threads: t.join()
    assert len(tokens) > 100 and len(set(tokens)) == len(tokens)
    assert np.random.default_rng is make and os.urandom is system


def test_workers_that_are_forked_while_another_thread_is_pinned(folder):
    one, other = [cases.images(folder, [SlowItem()]) for _ in range(2)]
    stop, done = [], []
    with frozen(one, "seed"), frozen(other, "seed"):
        def serve():
            while not stop: one.get_preds()
        def work(): done.append(other.get_preds(dl=other.dls.valid.new(num_workers=1)))
        threads = [threading.Thread(target=f, daemon=True) for f in (serve, work)]
        for t in threads: t.start()
        threads[1].join(60)
        stop.append(1)
        threads[0].join()
    assert done


# ---- learners without validation rows

def test_an_empty_validation_set_takes_training_rows_without_their_augmentation(folder, tmp_path):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=IndexSplitter([]),
                      item_tfms=Resize(32), batch_tfms=aug_transforms())
    learn = cases.cnn(block.dataloaders(folder, bs=5, num_workers=0), folder)
    assert not find_random(learn).random
    assert learn.export(tmp_path / "model.pkl", compile="eager").source.startswith("5 rows from dls.train")
    x = [learn.dls.train.one_batch()[0] for _ in range(2)]
    assert difference(*x) is not None, "training is still augmented"


def test_what_nobody_could_test_is_said(folder, tmp_path):
    ds = cases.Squares()
    learn = cases.cnn(DataLoaders.from_dsets(ds, ds.new_empty(), bs=4, num_workers=0), folder)
    report = learn.export(tmp_path / "model.pkl", compile="eager")
    assert "not tested" in report.frozen[0]["source"] and "not tested" in repr(report)


def test_one_loader_is_refused_clearly(folder, tmp_path):
    learn = cases.cnn(DataLoaders(DataLoader(cases.Squares(), bs=4)), folder)
    for call in (lambda: find_random(learn), lambda: learn.export(tmp_path / "model.pkl", compile="eager"), learn.explain):
        with pytest.raises(ExampleError, match="one loader"): call()


# ---- loaders with code of their own

class NoisyDo(TfmdDL):
    def do_batch(self, b):
        x, *rest = super().do_batch(b)
        return (x + torch.rand(1), *rest)


class NoisyIter(TfmdDL):
    def __iter__(self):
        for x, *rest in super().__iter__(): yield (x + torch.rand(1), *rest)


@pytest.mark.parametrize("cls", [NoisyDo, NoisyIter])
def test_a_loader_with_code_of_its_own(cls, folder, tmp_path):
    learn = cases.images(folder)
    learn.dls.loaders[1] = learn.dls.valid.new(cls=cls)
    assert [f.name for f in find_random(learn).random] == [cls.__name__]
    with pytest.raises(RandomTransformError, match=cls.__name__): learn.export(tmp_path / "model.pkl", compile="eager")


def shake(b): return b[0] + torch.rand(1), *b[1:]


def test_a_function_after_the_batch_is_pinned_row_by_row(folder):
    ds = cases.Squares()
    dls = DataLoaders(*[DataLoader(ds, bs=4, after_batch=shake) for _ in range(2)])
    learn = cases.cnn(dls, folder)
    with frozen(learn, "seed"):
        all_at_once, one_by_one = preds(learn, 1), preds(learn, 2, dl=dls.valid.new(bs=1))
    torch.testing.assert_close(all_at_once, one_by_one, rtol=1e-4, atol=1e-5)


class OtherLabels(cases.Squares):
    def __getitem__(self, i): return super().__getitem__(i)[0], TensorCategory((i+1) % 4)


def test_labels_do_not_change_what_a_function_after_the_item_draws(folder):
    learn = cases.cnn(DataLoaders(*[DataLoader(cases.Squares(), bs=4, after_item=shake) for _ in range(2)]), folder)
    with frozen(learn, "seed"):
        one = preds(learn, 1)
        other = preds(learn, 2, dl=learn.dls.valid.new(OtherLabels()))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_shortened_loader_stay(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    few = learn.dls.valid.new(n=3)
    with frozen(learn, "skip"): assert len(learn.get_preds(dl=few)[0]) == 3


def test_a_change_after_the_plan_counts(folder):
    crop, learn = RandomResizedCropGPU(24), cases.raw(folder)
    for dl in learn.dls.loaders: dl.after_batch.add(crop)
    learn.add_cb(FreezeTransforms())
    seen = []
    class Sizes(Callback):
        def before_batch(self): seen.append(tuple(self.xb[0].shape[2:]))
    learn.validate(cbs=Sizes())
    crop.size = (16, 16)
    learn.validate(cbs=Sizes())
    assert seen[0] == (24, 24) and seen[-1] == (16, 16)


# ---- content

def test_content_of_objects():
    a, b = [np.array([1, "x", None], dtype=object) for _ in range(2)]
    assert content(a) == content(b) != content(np.array([2, "x", None], dtype=object))
    assert content(date(2026, 1, 2)) == content(date(2026, 1, 2)) != content(date(2026, 1, 3))
    with pytest.raises(RandomTransformError, match="no content"): content(i for i in [1])


def test_a_read_only_array_with_nan(folder):
    held = np.array([1., np.nan])
    held.flags.writeable = False
    class Weights(Transform):
        def encodes(self, x:TensorImage): return x*float(held[0])
    assert not find_random(cases.images(folder, [Weights()])).random


# ---- state comes back

class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.seen = cases.small_cnn(), []
    def forward(self, x):
        self.seen.append(len(x))
        return self.inner(x)


def test_lists_and_modes_of_a_model_come_back(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # TorchScript is deprecated, and people have it
        script = torch.jit.script(nn.ReLU())
    learn = cases.images(folder, model=nn.Sequential(script, Keeps()))
    learn.model.train()
    find_random(learn)
    assert learn.model[1].seen == [] and all(m.training for m in learn.model.modules())


def test_listeners_that_overlap_put_the_loggers_back():
    log = logging.getLogger("torch._dynamo.convert_frame.__graph_breaks")
    before = log.level, log.propagate, list(log.handlers)
    one, two = Listener().start(), Listener().start()
    one.stop()
    assert log.level == logging.DEBUG
    two.stop()
    assert (log.level, log.propagate, log.handlers) == before


# ---- callbacks and metrics

def test_a_learner_with_a_watch_is_exported_and_predicts(folder, tmp_path):
    learn = cases.images(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # the model is not compiled by `torch.compile`, and the callback says so
        learn.add_cb(GraphBreakCallback())
        learn.export(tmp_path / "model.pkl", compile="eager")
        again = load_learner(tmp_path / "model.pkl")
        assert again.predict(get_image_files(folder)[0])[0] in learn.dls.vocab


def test_show_results_and_lists_of_batches(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    with frozen(learn, "seed"):
        b = learn.dls.valid.one_batch()
        assert len(learn.get_preds(dl=[b])[0]) == len(b[0])


def test_a_callback_that_cancels_first(folder):
    class Cancels(Callback):
        order = -30
        def before_validate(self): raise CancelValidException
    learn = cases.images(folder)
    learn.add_cb(FreezeTransforms())
    learn.validate(cbs=Cancels())
    assert learn.dl is not None


def drawing(p, y): return torch.rand(1).mean()


def test_a_metric_that_draws_is_no_difference(folder, tmp_path):
    learn = cases.images(folder)
    learn.metrics = [drawing]
    rows = learn.export(tmp_path / "model.pkl", compile="onnxruntime").gate
    assert [r["against"] == r["result"] for r in rows if r["check"] == "metric"] == [True]


def test_explain_is_not_ok_where_export_would_raise(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    assert not learn.explain("onnxruntime").ok and learn.explain("onnxruntime", freeze="skip").ok
    assert find_breaks(learn, recompiles=False) == []


# ---- loaders and layers that are not fastai's

def test_a_torch_loader_that_shuffles_gets_a_way_out_that_it_has(tmp_path):
    rows = [(torch.randn(3), torch.tensor(0)) for _ in range(16)]
    dl = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    with pytest.raises(RandomTransformError, match="order of rows") as e: learn.export("m.pkl", compile="onnxruntime")
    assert "DataLoader(..., shuffle=False)" in str(e.value) and ".new(" not in str(e.value) and "freeze=" not in str(e.value)
    plain = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=False)
    learn.dls = DataLoaders(dl, plain)
    learn.export("m.pkl", compile="onnxruntime")


def test_a_slow_step_with_a_counter_is_found_in_a_few_calls():
    calls = []
    class Slow(Transform):
        n = 0
        def encodes(self, x: torch.Tensor):
            calls.append(1)
            time.sleep(.2)
            self.n += 1
            return x + self.n % 3
    rows = Datasets(list(range(16)), [[lambda i: torch.ones(3) * i, Slow()]])
    learn = Learner(rows.dataloaders(bs=4), nn.Linear(3, 2), loss_func=nn.CrossEntropyLoss())
    found = find_random(learn)
    assert [f.name for f in found.found] == ["Slow"] and "state" in found.found[0].source
    assert len(calls) < 40, "it goes on until a time limit, not for 40 calls of each trial"


def test_a_parametrized_layer_is_named(tmp_path):
    rows = [(torch.randn(3), torch.tensor(0)) for _ in range(16)]
    dl = DataLoader(rows, bs=4)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), nn.ReLU())
    learn = Learner(DataLoaders(dl, dl), model, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    with pytest.raises(CompileError, match="layer 0 of its model is parametrized"): learn.export("m.pkl", compile="onnxruntime")
    assert not (tmp_path / "m.pkl").exists()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    learn.export("m.pkl", compile="onnxruntime")
