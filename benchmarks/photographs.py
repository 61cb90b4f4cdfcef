"""Photographs in many sizes, made of the two that come with scikit-learn, and learners for them: no download."""
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, TabularDataLoaders, tabular_learner
from fastai.tabular.all import Normalize as TabNormalize
from fastai.text.all import AWD_LSTM, TextDataLoaders, text_classifier_learner
from fastai.torch_core import set_seed
from fastai.vision.all import (ImageDataLoaders, Learner, Normalize, PILMask, ProgressCallback, Resize, SegmentationDataLoaders,
                               imagenet_stats, resnet18, resnet34, resnet50, unet_learner, vision_learner)
from PIL import Image

SIZE = 224
TORCHVISION = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}


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


def original(folder: Path) -> Path:
    "The photograph of scikit-learn as it is, 640x427 pixels, as a JPEG file"
    from sklearn.datasets import load_sample_images
    file = Path(folder) / "china.jpg"
    Image.fromarray(load_sample_images().images[0]).save(file, quality=90)
    return file


def _quiet(learn):
    learn.remove_cb(ProgressCallback)
    return learn


def _pictures(work: Path, n: int, **kwargs):
    files = photographs(work / "photographs", n)
    set_seed(0)
    return files, {"item_tfms": Resize(SIZE), "bs": 4, "num_workers": 0, "device": torch.device("cpu"),
                   "batch_tfms": Normalize.from_stats(*imagenet_stats), **kwargs}


def vision_model(model: str, work: Path, n: int = 12) -> tuple:
    "(learner with random weights, a photograph, pixels of a side)"
    _, kwargs = _pictures(work, n, valid_pct=.3, seed=0)
    dls = ImageDataLoaders.from_folder(work / "photographs", **kwargs)
    if model.startswith("vit"):
        import timm
        return _quiet(Learner(dls, timm.create_model(model, num_classes=2), path=work)), original(work), SIZE
    learn = vision_learner(dls, TORCHVISION.get(model, model), pretrained=False, normalize=False, path=work)
    return _quiet(learn), original(work), SIZE


def _bright(file) -> PILMask:
    "Which pixels are brighter than the middle"
    return PILMask.create((np.asarray(Image.open(file).convert("L")) > 127).astype(np.uint8))


def segmentation(work: Path) -> tuple:
    "(U-Net around resnet18 with random weights, a photograph, pixels of a side)"
    files, kwargs = _pictures(work, 12)
    dls = SegmentationDataLoaders.from_label_func(work, files, _bright, codes=["dark", "bright"], valid_pct=.3, seed=0, **kwargs)
    return _quiet(unet_learner(dls, resnet18, pretrained=False, normalize=False, n_out=2, path=work)), original(work), SIZE


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


def pairs(work: Path) -> tuple:
    "(collab learner with random weights, two users with their films, None)"
    set_seed(0)
    rng, n = np.random.default_rng(0), 4000
    df = pd.DataFrame({"user": rng.integers(0, 200, n), "film": [f"film {i}" for i in rng.integers(0, 300, n)],
                       "rating": rng.integers(1, 6, n).astype(float)})
    dls = CollabDataLoaders.from_df(df, seed=0, bs=64, path=work, device=torch.device("cpu"))
    return _quiet(collab_learner(dls, y_range=(0, 5.5), path=work)), df.drop(columns="rating").iloc[:2], None


def texts(work: Path, words: int) -> tuple:
    "(AWD_LSTM classifier of full size with random weights, a text, None)"
    set_seed(0)
    rng, some = np.random.default_rng(0), [a + b for a in "bdfgklmnprst" for b in ("an", "el", "ist", "or", "um", "ing", "ate")]
    made = [" ".join(rng.choice(some, int(k))) for k in rng.integers(20, 200, 120)]
    df = pd.DataFrame({"text": made, "label": ["a", "b"] * 60})
    dls = TextDataLoaders.from_df(df, work, seed=0, text_col="text", label_col="label", bs=16, num_workers=0,
                                  device=torch.device("cpu"))
    return _quiet(text_classifier_learner(dls, AWD_LSTM, pretrained=False, path=work)), " ".join(rng.choice(some, words)), None


def _vision(model): return "picture", lambda work: vision_model(model, work)


ITEMS = {m: _vision(m) for m in ("resnet18", "resnet50", "mobilenetv3_small_100", "convnext_tiny", "convnext_base",
                                 "vit_small_patch16_224")}  # {name: (kind, function of a folder)}
ITEMS |= {"U-Net, resnet18": ("picture", segmentation), "tabular": ("row", table_rows), "collab, two pairs": ("pairs", pairs),
          "text, 20 words": ("text", lambda work: texts(work, 20)), "text, 200 words": ("text", lambda work: texts(work, 200))}
