"""fastai's own methods, and what it means that ours give the same."""
from contextlib import contextmanager

import pandas as pd
import torch
from fastai.learner import Learner
from fastai.tabular.all import L, TabularLearner, TabularPandas

STOCK = {"predict": getattr(Learner.predict, "stock", Learner.predict),
         "row": getattr(TabularLearner.predict, "stock", TabularLearner.predict),
         "get_preds": getattr(Learner.get_preds, "stock", Learner.get_preds)}


def stock(learn, what, *args, **kwargs): return STOCK[what](learn, *args, **kwargs)


@contextmanager
def by_fastai():
    "fastai's own methods, also where one calls another"
    ours = Learner.get_preds
    Learner.get_preds = STOCK["get_preds"]
    try: yield
    finally: Learner.get_preds = ours


def assert_same(got, want, at="answer"):
    "Equal in type, dtype, shape and every bit"
    assert type(got) is type(want), (at, type(got), type(want))
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, (at, got.shape, want.shape)
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), at
    elif isinstance(want, (tuple, list, L)):
        assert len(got) == len(want), at
        for i, (g, w) in enumerate(zip(got, want)): assert_same(g, w, f"{at}[{i}]")
    elif isinstance(want, TabularPandas):
        pd.testing.assert_frame_equal(got.items, want.items, check_exact=True)
        assert list(got.cat_names) == list(want.cat_names) and got.procs.fs is want.procs.fs
        assert vars(got).keys() == vars(want).keys()
    else: assert str(got) == str(want), at
