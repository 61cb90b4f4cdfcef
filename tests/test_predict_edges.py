"""The lean path where something was changed after the first prediction, and where input is odd: fastai's answer, or an error."""
import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import Categorize
from fastai.learner import load_learner
from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, Normalize, TabDataLoader, TabularDataLoaders,
                                tabular_learner)
from fastai.vision.all import Resize
from helpers import assert_close, items_of, make_frame, table_learner
from PIL import Image
from stock import assert_same, by_fastai, stock

from fastai_compile.errors import ConfigError
from fastai_compile.items import InvalidInput, stock_input
from fastai_compile.predict import why_not_lean


@pytest.fixture
def image(artifacts): return artifacts("eager", "image").open()


@pytest.fixture
def table(artifacts): return artifacts("eager", "table").open()


@pytest.fixture
def files(artifacts): return items_of("image", artifacts.learner("image").path)


@pytest.fixture
def row(): return make_frame(4, seed=8).drop(columns="label").iloc[0]


def same_as_stock(learn, item, what="predict"):
    got = learn.predict(item)
    with by_fastai(): want = stock(learn, what, item)
    assert_same(got, want)
    return got


# ---- what changes after the first prediction

class Doubles(Callback):
    def after_pred(self): self.learn.pred = self.pred * 2


def test_a_stream_asks_the_callbacks(image, files, artifacts):
    image.add_cb(Doubles())
    plain = artifacts.learner("image")
    want = plain.predict(files[0])[2]
    assert_close(next(iter(plain.predict_many(files)))[2], want)
    plain.add_cb(Doubles())
    try:
        for learn in (image, plain):
            got = next(iter(learn.predict_many(files)))[2]
            assert torch.equal(got, learn.predict(files[0])[2]) and not torch.allclose(got, want)
    finally: plain.remove_cb(Doubles)
    assert len(list(image.predict_many(files))) == len(files)


def _proc(learn, kind): return next(p for p in learn.dls.train_ds.procs.fs if isinstance(p, kind))


CHANGES = {
    "mean": lambda l: _proc(l, Normalize).means.update(width=10.), "stds": lambda l: _proc(l, Normalize).stds.update(height=.1),
    "filling": lambda l: _proc(l, FillMissing).na_dict.update(height=100.),
    "classes": lambda l: setattr(_proc(l, Categorify), "classes", {**_proc(l, Categorify).classes}),
}


@pytest.mark.parametrize("how", CHANGES)
def test_procs_changed_after_a_prediction_count(table, row, how):
    row["height"] = np.nan
    before = same_as_stock(table, row, "row")[2]
    CHANGES[how](table)
    after = same_as_stock(table, row, "row")[2]
    if how in ("mean", "stds", "filling"): assert not torch.equal(before, after), "the change changed nothing"


def test_columns_in_another_order_after_a_prediction(table, row):
    same_as_stock(table, row, "row")
    for dl in table.dls.loaders: dl.dataset.cont_names.reverse()
    same_as_stock(table, row, "row")


def test_a_resize_that_crops_in_its_own_way(image, files):
    resize = next(f for f in image.dls.valid.after_item.fs if isinstance(f, Resize))
    before = same_as_stock(image, files[0])[2]
    resize.before_call = lambda b, split_idx: setattr(resize, "pcts", (0., 0.))
    assert not torch.equal(same_as_stock(image, files[0])[2], before)


def test_own_ways_of_making_loaders(image, files):
    image.predict(files[0])
    own = image.dls.test_dl
    image.dls.test_dl = lambda items, **kwargs: own(list(reversed(items)), **kwargs)
    del image.dls.valid._device  # makes a new plan
    image.dls.valid._device = None
    assert "own `test_dl`" in why_not_lean(image)


def test_a_loader_that_is_changed_after_a_prediction(image, files):
    before = same_as_stock(image, files[0])[2]
    create = image.dls.valid.create_batch
    image.dls.valid.create_batch = lambda b: tuple(x * .5 for x in create(b))
    assert not torch.equal(same_as_stock(image, files[0])[2], before)


def test_an_edited_vocabulary(image, files):
    name, i, _ = image.predict(files[0])
    vocab = next(f for f in image.dls.train.dataset.tls[1].tfms.fs if isinstance(f, Categorize)).vocab
    vocab.items[int(i)] = "another"
    assert str(image.predict(files[0])[0]) == "another" and str(name) != "another"


def bare_loss(pred, y, reduction="mean"): return torch.nn.functional.cross_entropy(pred, y.flatten().long(), reduction=reduction)
bare_loss.activation = lambda x: x.softmax(-1)
bare_loss.decodes = lambda x: x.argmax(-1)


def test_a_loss_without_reduction_while_others_predict(tmp_path):
    learn = table_learner(tmp_path, loss_func=bare_loss)
    learn.export(tmp_path / "m.pkl", compile="eager")
    learn = load_learner(tmp_path / "m.pkl")
    df = make_frame(60, seed=3)
    dl = learn.dls.test_dl(df, with_labels=True)
    with by_fastai(): want = stock(learn, "get_preds", dl=dl, with_loss=True)
    assert_same(learn.get_preds(dl=dl, with_loss=True), want)
    one, wrong, end = df.drop(columns="label").iloc[0], [], threading.Event()
    right = learn.predict(one)[2]
    def work():
        while not end.is_set():
            if not torch.equal(learn.predict(one)[2], right): wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads: t.start()
    for _ in range(60): learn.get_preds(dl=dl, with_loss=True)
    end.set()
    for t in threads: t.join()
    assert not wrong


# ---- rows

def test_a_row_does_not_depend_on_the_rows_before(tmp_path):
    df = make_frame()
    dls = TabularDataLoaders.from_df(df, tmp_path, [Categorify], ["kind"], [], "label", y_block=CategoryBlock(), bs=16,
                                     valid_idx=list(range(40)), num_workers=0)
    tabular_learner(dls, layers=[8], path=tmp_path).export(tmp_path / "m.pkl", compile="eager")
    odd = pd.Series({"kind": "ash"}, dtype=pd.CategoricalDtype(["cedar", "ash", "beech"]))
    usual = pd.Series({"kind": "ash"}, dtype=object)
    for order in ([odd, usual], [usual, odd]):
        learn = load_learner(tmp_path / "m.pkl")
        for r in order: same_as_stock(learn, r, "row")


ODD = [np.array(["ash", "oak"]), pd.Series([1, 2]), ["ash"], {}]


@pytest.mark.parametrize("value", ODD, ids=lambda v: type(v).__name__)
def test_what_is_no_category_is_refused(table, row, value):
    with pytest.raises(InvalidInput, match="kind.*is no category"): table.predict({**row, "kind": value})


def test_rows_of_a_dict_need_their_own_columns(table, row):
    full = row.to_dict()
    items = [full, {k: v for k, v in full.items() if k != "kind"}, {**full, "height": None}]
    a, b, c = table.predict_many(items, errors="return")
    assert isinstance(b, InvalidInput) and str(b).startswith("row 1: column 'kind' is missing")
    assert torch.equal(a[2], table.predict(full)[2])
    alone, = table.predict_many([items[2]])
    assert_same(c, alone)


def test_the_row_that_is_named_is_the_row(table):
    df = pd.concat([make_frame(1000, seed=2)] * 2, ignore_index=True).drop(columns="label")
    df.loc[1020, "width"] = np.inf
    got = list(table.predict_many(df, bs=8, errors="return"))
    assert [i for i, r in enumerate(got) if isinstance(r, InvalidInput)] == [1020]
    assert str(got[1020]).startswith("row 1020: column 'width'")
    with pytest.raises(InvalidInput, match="row 1020: column 'width'"): list(table.predict_many(df))


def test_only_the_rows_of_the_loader_are_checked(table):
    df = make_frame(12, seed=4).drop(columns="label")
    df.loc[9, "width"] = np.inf
    dl = table.dls.test_dl(df)
    dl.n = 7
    with by_fastai(): want = stock(table, "get_preds", dl=dl)
    assert_same(table.get_preds(dl=dl), want)


def test_no_rows(table):
    for kw in ({}, {"with_loss": True}):
        with by_fastai(): want = stock(table, "get_preds", **kw)
        assert_same(table.get_preds(**kw), want)


def test_shuffled_and_not_put_back(table, image, artifacts, files):
    to = artifacts.learner("table").dls.train_ds
    def loader(): return TabDataLoader(to, bs=8, shuffle=True, num_workers=0)
    got, want = loader(), loader()
    want.rng.setstate(got.rng.getstate())
    for _ in range(3):
        with by_fastai(): expected = stock(table, "get_preds", dl=want, reorder=False)
        assert_same(table.get_preds(dl=got, reorder=False), expected)
    got, want = (image.dls.test_dl(files, shuffle=True, bs=4, num_workers=0) for _ in range(2))
    want.rng.setstate(got.rng.getstate())
    for _ in range(3):
        with by_fastai(): expected = stock(image, "get_preds", dl=want, reorder=False)
        assert_same(image.get_preds(dl=got, reorder=False), expected)


# ---- what is passed

ONE = [np.zeros((40, 50, 3), np.uint8), torch.zeros(40, 50), bytearray(b"x"), Image.new("RGB", (4, 4)), 3]


@pytest.mark.parametrize("items", ONE, ids=lambda v: type(v).__name__)
def test_one_picture_is_no_stream(image, items):
    with pytest.raises(ConfigError, match="pass"): image.predict_many(items)


def test_the_switch_gives_fastais_answer_for_pictures_in_memory(image):
    rng = np.random.default_rng(0)
    for mode in ("P", "YCbCr", "HSV"):
        im = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).convert(mode)
        with stock_input():
            try: want = stock(image, "predict", im.copy())
            except Exception:
                with pytest.raises(InvalidInput): image.predict(im)
                continue
            assert_same(image.predict(im), want)
        assert type(im) is Image.Image, "the picture of the user changed its class"


def test_an_error_says_enough_and_not_too_much(image, files, tmp_path):
    with pytest.raises(InvalidInput) as e: image.predict("A" * 2_000_000)
    assert len(str(e.value)) < 2000
    (bad := tmp_path / "bad.png").write_bytes(b"no picture")
    err = pickle.loads(pickle.dumps(InvalidInput("a", "b", at=3)))
    assert (err.item, err.reason, err.at) == ("a", "b", 3)
    with pytest.raises(InvalidInput, match="bad.png"): image.get_preds(dl=image.dls.test_dl([*files[:3], bad], num_workers=1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_come_before_the_error_of_the_source(image, files, workers):
    def source():
        yield from files[:3]
        raise OSError("the disk is gone")
    got, it = [], image.predict_many(source(), bs=2, workers=workers)
    with pytest.raises(OSError, match="gone"):
        for o in it: got.append(o)
    assert len(got) == 3
