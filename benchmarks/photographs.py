"""Photographs in many sizes, made of the two that come with scikit-learn, and learners for them: no download."""
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, TabularDataLoaders, tabular_learner
from fastai.tabular.all import Normalize as TabNormalize
from fastai.torch_core import set_seed
from fastai.vision.all import (ImageDataLoaders, Normalize, ProgressCallback, Resize, imagenet_stats, resnet18, resnet34,
                               vision_learner)
from PIL import Image

SIZE = 224
TORCHVISION = {"resnet18": resnet18, "resnet34": resnet34}


def photographs(folder: Path, n: int, seed: int = 0) -> list:
    "`n` JPEG files of 400 to 1600 pixels, in one folder for each subject: crops of the two photographs, scaled"
    from sklearn.datasets import load_sample_images
    rng, files = np.random.default_rng(seed), []
    sources = dict(zip(("china", "flower"), map(Image.fromarray, load_sample_images().images)))
    for i in range(n):
        name = ("china", "flower")[i % 2]
        im, width = sources[name], int(rng.integers(400, 1600))
        x, y = (int(rng.integers(0, 100)) for _ in range(2))
        im = im.crop((x, y, im.size[0] - x, im.size[1] - y)).resize((width, int(width * rng.uniform(.6, 1.1))))
        file = Path(folder) / name / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        im.save(file, quality=90)
        files.append(file)
    return files


def _quiet(learn):
    learn.remove_cb(ProgressCallback)
    return learn


def vision_model(model: str, work: Path, n: int = 12) -> tuple:
    "(learner with random weights, a photograph, pixels of a side)"
    files = photographs(work / "photographs", n)
    set_seed(0)
    dls = ImageDataLoaders.from_folder(work / "photographs", valid_pct=.3, seed=0, item_tfms=Resize(SIZE), bs=4, num_workers=0,
                                       batch_tfms=Normalize.from_stats(*imagenet_stats), device=torch.device("cpu"))
    learn = vision_learner(dls, TORCHVISION.get(model, model), pretrained=False, normalize=False, path=work)
    return _quiet(learn), files[0], SIZE


def frame(n: int, seed: int = 0) -> pd.DataFrame:
    "Categories, numbers and gaps"
    rng = np.random.default_rng(seed)
    kinds = {f"kind{i}": rng.choice(list("abcdefgh"), n) for i in range(6)}
    df = pd.DataFrame(kinds | {f"x{i}": rng.normal(i, 2, n) for i in range(6)})
    df.loc[rng.random(n) < .05, "x5"] = np.nan
    return df.assign(y=np.where(df.x0 + df.x1 > 1, "yes", "no"))


def table_rows(work: Path) -> tuple:
    "(tabular learner with random weights, a row, None)"
    set_seed(0)
    df = frame(2000)
    dls = TabularDataLoaders.from_df(df, work, [Categorify, FillMissing, TabNormalize], [c for c in df if c.startswith("kind")],
                                     [c for c in df if c.startswith("x")], "y", y_block=CategoryBlock(), bs=64,
                                     valid_idx=list(range(500)), device=torch.device("cpu"))
    return _quiet(tabular_learner(dls, layers=[200, 100], path=work)), df.drop(columns="y").iloc[0], None
