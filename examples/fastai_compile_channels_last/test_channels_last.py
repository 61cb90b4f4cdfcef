"""The contract of a backend, as far as it matters here: right, safe, honest, and found by its name."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.tabular.all import TabularDataLoaders, tabular_learner
from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Learner, PILImage, Resize, nn, set_seed

from fastai_compile import BackendError, ConfigError, available_backends, open_learner
from fastai_compile.backends.base import get_backend


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    set_seed(0)
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        PILImage.create(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.3, seed=0, item_tfms=Resize(24), bs=8, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat())


@pytest.fixture(scope="module")
def exported(learn, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.pkl"
    with learn.no_bar(): report = learn.export(path, compile="channels_last")
    return path, report


def test_it_is_found_by_its_entry_point():
    row = next(r for r in available_backends() if r["backend"] == "channels_last")
    assert row["usable"] == "yes" and type(get_backend("channels_last")).__module__ == "fastai_compile_channels_last"


def test_the_file_answers_as_the_learner_does(learn, exported):
    path, report = exported
    assert report.backend == "channels_last"
    model = open_learner(path).model
    for n in (1, 2, 5, 64, 65):
        x = torch.randn(n, 3, 24, 24)
        with torch.no_grad(): want = learn.model.eval()(x)
        before = x.clone()
        assert torch.allclose(model(x), want, atol=1e-5) and torch.equal(x, before)
    assert "1 in channels_last" in str(model.placement) and model.placement.level == "executed" and not model.placement.elsewhere


def test_threads_do_not_mix(exported):
    model = open_learner(exported[0]).model
    xs = [torch.randn(n, 3, 24, 24) for n in (1, 3, 8)] * 8
    want = [model(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(model, xs), want))


def test_what_it_cannot_do_is_said(learn, tmp_path):
    df = pd.DataFrame({"x": np.arange(20.), "y": ["a", "b"] * 10})
    table = tabular_learner(TabularDataLoaders.from_df(df, tmp_path, cont_names=["x"], y_names="y", bs=4))
    with table.no_bar(), pytest.raises(BackendError, match="2-d convolutions only"):
        table.export(tmp_path / "t.pkl", compile="channels_last")
    with learn.no_bar(), pytest.raises(ConfigError, match="channels_last has no option 'fast'"):
        learn.export(tmp_path / "t.pkl", compile="channels_last", options={"fast": True})
    assert not (tmp_path / "t.pkl").exists()
