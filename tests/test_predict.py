"""The lean path: fastai's answers around the same compiled model, bit for bit, from many threads; bad input is refused."""
import importlib
import io
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.transforms import Transform
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.tabular.all import (Categorify, CategoryBlock, FillMissing, TabularDataLoaders, TabularProc, noop, tabular_learner)
from fastai.vision.all import (Normalize, PILImage, TensorImage)
from benchmarks import families_data
from helpers import items_of, make_frame
from stock import assert_same, by_fastai, stock
from threads import wrong_answers
from PIL import Image as PILFile

from fastai_compile.errors import CompileError, ConfigError
from fastai_compile.items import InvalidInput, stock_input
from fastai_compile.lean import patch_lean
from fastai_compile.predict import plan_of

patch_lean()


@pytest.fixture(scope="module")
def image(artifacts): return artifacts("eager", "image").open()


@pytest.fixture(scope="module")
def table(artifacts): return artifacts("eager", "table").open()


@pytest.fixture(scope="module")
def files(artifacts): return items_of("image", artifacts.learner("image").path)


def compiled(learn, folder, **kwargs):
    "The learner as its compiled file opens"
    _quiet_export(learn, folder / "m.pkl", **kwargs)
    res = load_learner(folder / "m.pkl")
    return res


def _quiet_export(learn, path, **kwargs):
    with learn.no_bar(): learn.export(path.resolve(), compile="eager", **kwargs)


# ---- pairs of a user and an item, of which fastai predicts no single one

@pytest.mark.parametrize("family", ["collab_dot", "collab_nn"])
def test_pairs(family, tmp_path):
    learn = compiled(families_data.build(family, tmp_path, train=False), tmp_path)
    df = families_data.items(family, tmp_path).iloc[:6].reset_index(drop=True)
    want = stock(learn, "get_preds", dl=learn.dls.test_dl(df))[0]
    rows = df.to_dict("records")
    for row, w in ((rows[2], want[2]), (df.iloc[3], want[3]), (df.iloc[[4]], want[4])):
        assert torch.allclose(learn.predict(row)[2], w, atol=1e-6)
    for one in ([rows[0]], df.iloc[:1]): assert torch.allclose(next(learn.predict_many(one))[2], want[0], atol=1e-6)
    bad = [{k: v for k, v in r.items() if k != df.columns[0]} if i == 1 else r for i, r in enumerate(rows)]
    got = list(learn.predict_many(bad, errors="return"))
    assert [isinstance(g, InvalidInput) for g in got] == [i == 1 for i in range(6)]
    assert all(torch.allclose(g[2], w, atol=1e-6) for i, (g, w) in enumerate(zip(got, want)) if i != 1)
    with pytest.raises(InvalidInput): learn.predict(bad[1])
    with pytest.raises(InvalidInput): learn.predict(3)


# ---- the same answers

def test_pictures(image, files):
    assert image.why_not_lean() == ""
    for f in files[:4]:
        for kw in ({}, {"with_input": True}):
            with by_fastai(): want = stock(image, "predict", f, **kw)
            assert_same(image.predict(f, **kw), want)


@pytest.mark.parametrize("rm", [None, 0, 1, (1,)])
def test_rm_type_tfms(image, files, rm):
    for item in (files[0], PILImage.create(files[1])):
        if rm == 0 and not isinstance(item, Path): continue
        with by_fastai():
            try: want = stock(image, "predict", item, rm_type_tfms=rm)
            except Exception: want = None
        if want is None:
            with pytest.raises(InvalidInput): image.predict(item, rm_type_tfms=rm)
        else: assert_same(image.predict(item, rm_type_tfms=rm), want)


def test_what_may_be_passed_for_a_picture(image, files):
    f = files[0]
    pixels = np.array(PILImage.create(f))
    with by_fastai(): want = stock(image, "predict", f)
    chw = pixels.transpose(2, 0, 1)
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    data = f.read_bytes()
    items = [str(f), data, bytearray(data), io.BytesIO(data), f.open("rb"), PILFile.open(f), PILImage.create(f), pixels, chw,
             np.asfortranarray(pixels), pixels[::-1][::-1], torch.tensor(pixels), torch.tensor(chw), rgba,
             TensorImage(torch.tensor(chw)), torch.tensor(chw).permute(1, 2, 0), PILFile.fromarray(rgba)]
    for item in items: assert_same(image.predict(item), want, str(type(item)))


@pytest.mark.parametrize("kw", [{}, {"with_input": True}, {"with_decoded": True}, {"with_loss": True}, {"act": noop},
                                {"with_input": True, "with_decoded": True, "with_loss": True}, {"with_preds": False},
                                {"with_targs": False}, {"reorder": False}], ids=lambda kw: ",".join(kw) or "nothing")
@pytest.mark.parametrize("kind", ["image", "table"])
def test_get_preds(artifacts, kind, kw):
    learn, items = artifacts("eager", kind).open(), items_of(kind, artifacts.learner(kind).path)
    def loader(bs):
        if kind == "image": return learn.dls.test_dl(items, with_labels=True, bs=bs, num_workers=0)
        return learn.dls.test_dl(make_frame(11, seed=5), bs=bs)
    for bs in (1, 4):
        want, got = stock(learn, "get_preds", dl=loader(bs), **kw), learn.get_preds(dl=loader(bs), **kw)
        assert_same(got, want)


def test_get_preds_of_a_shuffled_loader_of_worker_processes_and_of_batches(image, files):
    for kw in ({"shuffle": True}, {"num_workers": 2}):
        dl = image.dls.test_dl(files, bs=4, **kw)
        for reorder in (True, False):
            if reorder or not dl.shuffle:
                assert_same(image.get_preds(dl=dl, reorder=reorder), stock(image, "get_preds", dl=dl, reorder=reorder))
    batches = list(image.dls.test_dl(files, bs=4, num_workers=0))
    assert_same(image.get_preds(dl=batches), stock(image, "get_preds", dl=batches))


def test_rows(table):
    df = make_frame(40, seed=5)
    frames = [df, df.drop(columns="label"), df[["height", "kind", "width"]], df.assign(more=1),
              df.assign(width=1, height=2.5),
              df[["width", "height"]].assign(kind=0.), df.assign(kind="oak"), df.assign(kind=None),
              df.astype({"width": "float32", "height": "float32", "kind": "category"})]
    for frame in frames:
        for i in range(12):
            row = frame.iloc[i]
            with by_fastai():
                try: want = stock(table, "row", row)
                except ValueError as e: # an order of columns that fastai cannot turn into a tensor
                    assert "negative" in str(e)
                    want = stock(table, "row", row[["kind", "width", "height"]])
            assert_same(table.predict(row), want, str(row))
            assert_same(table.predict(dict(row.astype(object))), want)
    assert all(plan_of(table).rows.coder.known.values()), "every kind of row has been coded as fastai codes it"


def test_numbers_of_every_type(table):
    base = {"kind": "ash", "width": 1., "height": 2.}
    numpys = np.float32(.1), np.float64(.1), np.int8(3), np.float16(.1)
    for v in (3, True, *numpys, -0., 1e-40, 1e30, None, np.nan, pd.NA):
        row = pd.Series({**base, "height": v}, dtype=object)
        with by_fastai(): want = stock(table, "row", row)
        assert_same(table.predict(row), want, repr(v))


def test_regression_and_a_table_without_categories(tmp_path):
    df = make_frame().assign(size=lambda d: d.width * 2)
    for name, kw in {"a": dict(cat_names=["kind"], cont_names=["width"]),
                     "b": dict(cont_names=["width"]),
                     "c": dict(cat_names=["kind"], cont_names=["height"],
                               procs=[Categorify, FillMissing(add_col=False)])}.items():
        kw = {"procs": [Categorify, FillMissing, Normalize], "cat_names": [], **kw}
        dls = TabularDataLoaders.from_df(df, path=tmp_path, y_names="size", valid_idx=list(range(50)), bs=16, **kw)
        (tmp_path / name).mkdir()
        learn = compiled(tabular_learner(dls, layers=[8]), tmp_path / name)
        with learn.no_bar():
            bare = df.drop(columns="size") # fastai fails on a row that mixes text with a numeric target
            for i in range(5):
                try:
                    with by_fastai(): want = stock(learn, "row", bare.iloc[i])
                except TypeError: # no categories: fastai fails on a row, not on a frame
                    want = stock(learn, "get_preds", dl=learn.dls.test_dl(df[i:i + 1]))[0][0]
                    assert name == "b" and torch.equal(learn.predict(df.iloc[i])[2], want)
                else:
                    for frame in (bare, df): assert_same(learn.predict(frame.iloc[i]), want)


class Half(TabularProc):
    "A proc of the user"
    order = 50
    def encodes(self, to): to.transform(to.cont_names, lambda c: c / 2)


def test_a_proc_of_the_user_goes_through_fastai(tmp_path):
    dls = TabularDataLoaders.from_df(make_frame(), path=tmp_path, y_names="label", y_block=CategoryBlock(),
                                     cat_names=["kind"], cont_names=["width"], procs=[Categorify, Half],
                                     valid_idx=list(range(50)), bs=16)
    learn = compiled(tabular_learner(dls, layers=[8]), tmp_path)
    with learn.no_bar():
        row = make_frame().iloc[0]
        with by_fastai(): want = stock(learn, "row", row)
        assert_same(learn.predict(row), want)
    assert "Half" in plan_of(learn).rows.why


# ---- other families

@pytest.mark.parametrize("name", ["points", "text_classifier", "several_inputs", "tuple_output"])
def test_families(name, tmp_path):
    (tmp_path / name).mkdir()
    rows, built = families_data.items(name, tmp_path), families_data.build(name, tmp_path, train=False)
    given = {} if families_data.FAMILIES[name].blocks else {"items": rows}
    learn = compiled(built, tmp_path / name, **given)
    with learn.no_bar():
        assert learn.why_not_lean() == ""
        for item in list(rows)[:3]:
            for kw in ({}, {"with_input": True}):
                with by_fastai(): want = stock(learn, "predict", item, **kw)
                assert_same(learn.predict(item, **kw), want)
        for kw in ({"with_decoded": True}, {"with_input": True, "reorder": False}):
            dl = learn.dls.test_dl(rows, bs=4, num_workers=0)
            assert_same(learn.get_preds(dl=dl, **kw), stock(learn, "get_preds", dl=dl, **kw))
        assert len(list(learn.predict_many(rows, bs=4))) == len(rows)


BAD_TEXTS = {"a number": 3, "nothing": None, "nan": float("nan"), "bytes": b"the film", "no tokens": []}

def test_texts(tmp_path):
    learn = compiled(families_data.build("text_classifier", tmp_path, train=False), tmp_path)
    texts = families_data.items("text_classifier", tmp_path)
    with learn.no_bar():
        for text in ("", " ", "the " * 300, "\u4f60\u597d", *texts[:2]):
            with by_fastai(): want = stock(learn, "predict", text)
            assert_same(learn.predict(text), want, text[:20])
        for bad in BAD_TEXTS.values():
            with pytest.raises(InvalidInput): learn.predict(bad)
        dl = learn.dls.test_dl(texts, bs=4)
        want = stock(learn, "get_preds", dl=dl)[0]
        got = list(learn.predict_many([*texts[:5], 3, *texts[5:]], bs=4, errors="return"))
        assert isinstance(got.pop(5), InvalidInput) and torch.equal(torch.stack([g[2] for g in got]), want)


# ---- when fastai's way is taken

class Doubles(Callback):
    def after_pred(self): self.learn.pred = self.pred * 2


class OwnLearner(Learner):
    def _do_one_batch(self):
        super()._do_one_batch()
        self.pred = self.pred + 1


def _fake_loss(*args, **kwargs): return torch.tensor(0.)


def test_why_not_lean_names_the_reason_and_the_answer_is_fastais(artifacts, files):
    def check(reason, change):
        learn = artifacts("eager", "image").open()
        learn.predict(files[0])
        change(learn)
        assert reason in learn.why_not_lean(), learn.why_not_lean()
        with by_fastai(): want = stock(learn, "predict", files[0])
        assert_same(learn.predict(files[0]), want)
        dl = learn.dls.test_dl(files, num_workers=0)
        assert_same(learn.get_preds(dl=dl), stock(learn, "get_preds", dl=dl))
    check("Doubles", lambda o: o.add_cb(Doubles()))
    check("loss_func", lambda o: setattr(o, "loss_func", MSELossFlat()))
    check("dls", lambda o: setattr(o, "dls", artifacts.learner("image").dls))
    check("OwnLearner has its own `_do_one_batch`", lambda o: setattr(o, "__class__", OwnLearner))
    check("compiled", lambda o: o.to_eager())
    check("model", lambda o: setattr(o, "model", artifacts("eager", "image").open().model))
    assert "compiled" in artifacts.learner("image").why_not_lean()


def test_preds_inside_of_another_loop_are_fastais(image, files, monkeypatch):
    "`inner=True` runs under the callbacks of the loop around it"
    from fastai_compile import lean
    dl, seen = image.dls.test_dl(files, num_workers=0), []
    monkeypatch.setattr(lean, "_stock_get_preds", lambda *args, **kwargs: seen.append(args))
    image.get_preds(dl=dl, inner=True)
    assert len(seen) == 1 and seen[0][2] is dl and seen[0][7] is True
    image.get_preds(dl=dl)
    assert len(seen) == 1


def bars(monkeypatch, *modules):
    "What the progress bars of these modules were given to count"
    seen = []
    for name in modules:
        module = importlib.import_module(name)
        class Bar(module.progress_bar):
            def __init__(self, gen, total=None, **kwargs):
                super().__init__(gen, total, **kwargs)
                seen.append(self.total)
        monkeypatch.setattr(module, "progress_bar", Bar)
    return seen


def test_a_bar_is_shown_where_the_learner_shows_bars(artifacts, files, monkeypatch, capsys):
    image = artifacts("eager", "image").open()
    if not any(isinstance(cb, ProgressCallback) for cb in image.cbs): image.add_cb(ProgressCallback())
    seen = bars(monkeypatch, "fastai_compile.preds", "fastai_compile.stream")
    dl = image.dls.test_dl(files, bs=2, num_workers=0)
    with image.no_bar():
        image.get_preds(dl=dl)
        list(image.predict_many(files))
        assert not seen and not capsys.readouterr().out.strip()
    image.get_preds(dl=dl)
    assert seen == [len(dl)]
    list(image.predict_many(files))
    assert seen == [len(dl), len(files)] and capsys.readouterr().out.strip()
    list(image.predict_many(files, progress=False))
    list(image.predict_many(f for f in files)) # nobody knows how many
    assert len(seen) == 2


def test_a_temporary_callback_takes_part(image, files):
    dl = image.dls.test_dl(files, num_workers=0)
    want = stock(image, "get_preds", dl=dl, cbs=Doubles())
    assert_same(image.get_preds(dl=dl, cbs=Doubles()), want)
    assert not torch.equal(want[0], image.get_preds(dl=dl)[0])


def test_changed_transforms_make_a_new_plan(artifacts, files):
    learn = artifacts("eager", "image").open()
    before = learn.predict(files[0])
    class Darker(Transform):
        order = 20
        def encodes(self, x:TensorImage): return x * .1
    learn.dls.add_tfms([Darker()], "after_batch")
    with by_fastai(): want = stock(learn, "predict", files[0])
    assert_same(learn.predict(files[0]), want)
    assert not torch.equal(before[2], want[2])
    learn.dls.valid.after_batch[-1].mean = torch.zeros(1, 3, 1, 1)
    with by_fastai(): want = stock(learn, "predict", files[0])
    assert_same(learn.predict(files[0]), want)


# ---- threads

def test_many_threads_and_sizes_with_random_resized_crop(tmp_path):
    assert wrong_answers(tmp_path, 600)["WRONG"] == 0  # `make soak`: 10,000


def test_threads_over_a_table(table):
    df = make_frame(60, seed=7)
    with by_fastai(): want = [stock(table, "row", df.iloc[i])[2] for i in range(len(df))]
    ids = np.random.default_rng(0).integers(0, len(df), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: torch.equal(table.predict(df.iloc[i])[2], want[i]), ids))


# ---- bad input

def _png(arr, mode=None, **kwargs):
    res = io.BytesIO()
    im = PILFile.fromarray(arr)
    (im.convert(mode) if mode else im).save(res, kwargs.pop("format", "PNG"), **kwargs)
    return res.getvalue()


def _bomb():
    "A PNG of 30,000 x 30,000 pixels in a few bytes"
    def four(n): return n.to_bytes(4, "big")
    def chunk(kind, data): return four(len(data)) + kind + data + four(zlib.crc32(kind + data))
    head, body = four(30_000) * 2 + bytes([8, 2, 0, 0, 0]), zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
BAD_PICTURES = {
    "truncated": (lambda: _png(PIXELS, format="JPEG")[:1200], "truncated"),
    "empty bytes": (lambda: b"", "is empty"),
    "no picture": (lambda: b"hello" * 20, "no picture"),
    "bomb": (_bomb, "MAX_IMAGE_PIXELS"),
    "16-bit": (lambda: _png(RNG.integers(0, 60000, (40, 50), dtype=np.uint16)), "16-bit"),
    "16-bit array": (lambda: RNG.integers(0, 60000, (40, 50), dtype=np.uint16), "uint16"),
    "float array": (lambda: RNG.random((40, 50, 3)), "float64"),
    "float tensor": (lambda: torch.rand(3, 40, 50), "float32"),
    "TensorImage of floats": (lambda: TensorImage(torch.rand(3, 40, 50)), "float32"),
    "bool array": (lambda: RNG.random((40, 50)) > .5, "bool"),
    "no pixels": (lambda: np.zeros((0, 50, 3), np.uint8), "none of them 0"),
    "two channels": (lambda: np.zeros((40, 50, 2), np.uint8), "1, 3 or 4 channels"),
    "a batch": (lambda: np.zeros((5, 40, 50, 3), np.uint8), "a picture is"),
    "sparse": (lambda: torch.zeros(40, 50, dtype=torch.uint8).to_sparse(), "layout"),
    "no file": (lambda: Path("nowhere.png"), "no such file"),
    "a folder": (lambda: Path("."), "folder"),
    "empty path": (lambda: "", "no path"),
    "text file": (lambda: io.StringIO("hello"), "open as text"),
    "None": (lambda: None, "NoneType"),
    "a number": (lambda: 3, "int is no input"),
    "an empty list": (lambda: [], "list is no input"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused_by_name(image, name):
    make, reason = BAD_PICTURES[name]
    item = make()
    with pytest.raises(InvalidInput, match=re.escape(reason)) as e: image.predict(item)
    assert isinstance(e.value, CompileError) and e.value.item and e.value.reason in str(e.value)


ROTATED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
GOOD_PICTURES = {
    "CMYK": lambda: _png(PIXELS, "CMYK", format="JPEG"),
    "palette": lambda: _png(PIXELS, "P"),
    "palette with transparency": lambda: _png(PIXELS, "P", transparency=0),
    "gray": lambda: _png(PIXELS, "L"),
    "1 bit": lambda: _png(PIXELS, "1"),
    "1x1": lambda: _png(PIXELS[:1, :1]),
    "thin": lambda: _png(PIXELS[:1]),
    "animated": lambda: _png(PIXELS, format="GIF", save_all=True, append_images=[PILFile.fromarray(PIXELS // 2)]),
    "rotated by EXIF": lambda: _png(PIXELS, format="JPEG", exif=ROTATED),
    "progressive": lambda: _png(PIXELS, format="JPEG", progressive=True),
}


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_unusual_pictures_are_answered_as_fastai_does(image, tmp_path, name):
    file = tmp_path / "x.img"
    file.write_bytes(GOOD_PICTURES[name]())
    with by_fastai(): want = stock(image, "predict", file)
    assert_same(image.predict(file), want)


def test_the_switch_gives_fastais_answer(image, table, tmp_path):
    deep, row = tmp_path / "deep.png", pd.Series({"kind": "ash", "width": np.inf, "height": 1.}, dtype=object)
    deep.write_bytes(BAD_PICTURES["16-bit"][0]())
    with by_fastai(): want = stock(image, "predict", deep), stock(table, "row", row)
    with stock_input(): got = image.predict(deep), table.predict(row)
    assert_same(got, want)
    assert got[1][2].isnan().all()


BAD_ROWS = {
    "missing column": ({"kind": "ash", "width": 1.}, "'height' is missing"),
    "inf": ({"kind": "ash", "width": np.inf, "height": 1.}, "'width' holds inf"),
    "too large for float32": ({"kind": "ash", "width": 1e300, "height": 1.}, "'width'"),
    "huge integer": ({"kind": "ash", "width": 10**400, "height": 1.}, "Overflow"),
    "text for a number": ({"kind": "ash", "width": "wide", "height": 1.}, "'width' holds 'wide'"),
    "nothing, never missing in training": ({"kind": "ash", "width": np.nan, "height": 1.}, "'width' lacks a value"),
    "a list for a category": ({"kind": ["ash"], "width": 1., "height": 1.}, "'kind'"),
    "a list": ([1, 2], "no row"),
    "a frame of two": (make_frame(2), "frame of 2 rows"),
    "an empty frame": (make_frame(2)[:0], "frame of 0 rows"),
    "a column twice": (pd.Series(["ash", 1., 1., 2.], index=["kind", "width", "width", "height"]), "twice"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_name(table, name):
    row, reason = BAD_ROWS[name]
    with pytest.raises(InvalidInput, match=re.escape(reason)): table.predict(row)


def test_bad_frames(table):
    df = make_frame(8, seed=5)
    df.loc[3, "width"] = np.inf
    with pytest.raises(InvalidInput, match="row 3.*width"): table.get_preds(dl=table.dls.test_dl(df))
    with stock_input(): got = table.get_preds(dl=table.dls.test_dl(df))
    assert_same(got, stock(table, "get_preds", dl=table.dls.test_dl(df)))
    other = make_frame(8, seed=5).astype({"kind": pd.CategoricalDtype(["cedar", "ash", "beech"])})
    with pytest.raises(InvalidInput, match="categories"): list(table.predict_many(other))


# ---- streams

@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("bs", [1, 4, None])
def test_a_stream_of_pictures(image, files, bs, workers):
    dl = image.dls.test_dl(files, num_workers=0, **({"bs": bs} if bs else {}))
    preds, _, dec = stock(image, "get_preds", dl=dl, with_decoded=True)
    got = list(image.predict_many(iter(files), bs=bs, workers=workers))
    assert torch.equal(torch.stack([g[2] for g in got]), preds) and torch.equal(torch.stack([g[1] for g in got]), dec)
    assert [g[0] for g in got] == [image.dls.vocab[i] for i in dec]
    assert type(got[0][0]) is type(image.predict(files[0])[0])


def test_one_bad_item_costs_only_itself(image, table, files):
    items = [*files[:3], b"no picture", *files[3:6], None]
    got = list(image.predict_many(items, bs=4, errors="return"))
    assert [isinstance(g, InvalidInput) for g in got] == [False] * 3 + [True] + [False] * 3 + [True]
    with pytest.raises(InvalidInput, match="10 bytes"): list(image.predict_many(items, bs=4))
    rows = [{"kind": "ash", "width": w, "height": 1.} for w in (1., np.inf, "wide", 2.)] + [{}]
    got = list(table.predict_many(rows, errors="return"))
    assert [isinstance(g, InvalidInput) for g in got] == [False, True, True, False, True]


def test_a_stream_reads_only_as_far_ahead_as_it_needs(image, files):
    seen = []
    def endless():
        while True:
            seen.append(1)
            yield files[0]
    it = iter(image.predict_many(endless(), bs=2, workers=2))
    for _ in range(6): next(it)
    it.close()
    assert len(seen) < 20


def test_a_stream_of_rows_is_get_preds(table):
    df = make_frame(50, seed=5)
    preds, _, dec = stock(table, "get_preds", dl=table.dls.test_dl(df), with_decoded=True)
    for items in (df, df.to_dict("records"), [df.iloc[i] for i in range(len(df))]):
        got = list(table.predict_many(items))
        assert torch.equal(torch.stack([g[2] for g in got]), preds)
        assert [g[0] for g in got] == [table.dls.vocab[i] for i in dec]


def test_a_stream_of_a_learner_that_is_not_compiled(artifacts, files):
    learn = artifacts.learner("image")
    want = stock(learn, "get_preds", dl=learn.dls.test_dl(files, num_workers=0))[0]
    assert torch.equal(torch.stack([g[2] for g in learn.predict_many(files)]), want)


def test_nothing_to_predict(image, table):
    for kw in ({}, {"with_input": True}): assert_same(image.get_preds(dl=[], **kw), stock(image, "get_preds", dl=[], **kw))
    for learn, items in ((image, []), (table, []), (table, make_frame(3)[:0])): assert list(learn.predict_many(items)) == []


@pytest.mark.parametrize("kw", [{"errors": "skip"}, {"bs": 0}, {"workers": -1}], ids=str)
def test_wrong_choices(image, files, kw):
    with pytest.raises(ConfigError): list(image.predict_many(files, **kw))


def test_one_item_is_no_stream(image, files):
    with pytest.raises(ConfigError, match="learn.predict"): image.predict_many(str(files[0]))
