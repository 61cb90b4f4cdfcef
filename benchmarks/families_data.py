"""One tiny Learner for each family that fastai has, built without a download: a few rows, images of 64 pixels.

`FAMILIES` names them, `build(name, path)` makes and briefly trains one, `items(name, path)` gives what it predicts.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import (Categorify, FillMissing, Normalize, RegressionBlock, TabularDataLoaders, accuracy, mae,
                                tabular_learner)
from fastai.text.all import (AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config,
                             language_model_learner, text_classifier_learner)
from fastai.torch_core import set_seed
from fastai.vision.all import (CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, MaskBlock,
                               MultiCategoryBlock, PointBlock, Resize, TensorPoint, accuracy_multi, resnet18,
                               unet_learner, vision_learner, xresnet18)
from PIL import Image
from torch import nn

N_ROWS, N_TRAIN, SIZE, BS = 38, 24, 64, 8 # 14 rows for validation: one full batch and a remainder


# ---- data
def images(path: Path) -> pd.DataFrame:
    "Images with one bright box, written once as PNG files with masks; what is known of each, as a frame"
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(N_ROWS):
        im = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        (x, y), (w, h) = rng.integers(0, 40, 2), rng.integers(8, 24, 2)
        color = int(rng.integers(0, 3))
        im[y:y + h, x:x + w, color] += 180
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[y:y + h, x:x + w] = 1
        if not (path / f"{i}.png").exists():
            Image.fromarray(im).save(path / f"{i}.png")
            Image.fromarray(mask).save(path / f"{i}_mask.png")
        tags = ["wide"] * bool(w > h) + ["left"] * bool(x < 20) + ["top"] * bool(y < 20)
        rows.append({"file": str(path / f"{i}.png"), "color": ["red", "green", "blue"][color], "tags": " ".join(tags),
                     "x": float(x), "y": float(y), "area": float(w * h) / 100, "is_valid": i >= N_TRAIN})
    return pd.DataFrame(rows)


def table() -> pd.DataFrame:
    "Rows with categories, numbers, gaps, and a class and a number that depend on them"
    rng = np.random.default_rng(0)
    df = pd.DataFrame({"kind": rng.choice(["a", "b", "c"], N_ROWS), "place": rng.choice(["north", "south"], N_ROWS),
                       "size": rng.normal(3, 1, N_ROWS), "age": rng.normal(40, 9, N_ROWS)})
    df.loc[::7, "age"] = np.nan
    df["price"] = df["size"] * 2 + (df.kind == "a")
    df["sold"] = np.where(df.price > df.price.median(), "yes", "no")
    return df


def ratings() -> pd.DataFrame:
    "Users, items and ratings"
    rng = np.random.default_rng(0)
    users, films = np.arange(N_ROWS * 3) % 9, rng.integers(0, 12, N_ROWS * 3)
    return pd.DataFrame({"user": users, "film": [f"film {i}" for i in films], "rating": 1. + (users + films) % 5})


def texts() -> pd.DataFrame:
    "Short texts of different lengths, with a label and a mark for validation"
    rng = np.random.default_rng(0)
    good, bad, other = ["fine", "lovely", "great"], ["dull", "poor", "awful"], "the film was and it had a plot".split()
    rows = []
    for i in range(N_ROWS * 2):
        words = list(rng.choice(other, int(rng.integers(4, 14)))) + list(rng.choice(good if i % 2 else bad, 3))
        rows.append({"text": " ".join(words), "label": "good" if i % 2 else "bad", "is_valid": i >= N_TRAIN * 2})
    return pd.DataFrame(rows)


class Rows(torch.utils.data.Dataset):
    "Tensors of equal length as a dataset; the last `n_y` of them are targets"
    def __init__(self, *ts, n_y=0): self.ts, self.n_y, self.n_inp = ts, n_y, len(ts) - n_y
    def __len__(self): return len(self.ts[0])
    def __getitem__(self, i): return tuple(t[i] for t in self.ts)
    def new_empty(self): return Rows(*[t[:0] for t in self.ts], n_y=self.n_y)


def numbers() -> tuple:
    "Two inputs and a class that depends on both"
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(N_ROWS, 6, generator=g), torch.randn(N_ROWS, 4, generator=g)
    return a, b, (a[:, 0] + b[:, 0] > 0).long()


def _plain_dls(*ts, n_y):
    train, valid = (Rows(*[t[s] for t in ts], n_y=n_y) for s in (slice(0, N_TRAIN), slice(N_TRAIN, None)))
    return DataLoaders.from_dsets(train, valid, bs=BS, device=torch.device("cpu"))


# ---- models and losses of the plain learners: at module level, so that files that need them open elsewhere
class SeveralInputs(nn.Module):
    "Two inputs, one output"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(32, 2)
    def forward(self, a, b): return self.head(torch.cat([self.a(a), self.b(b)], 1).relu())


class TupleOutput(nn.Module):
    "A class and a number"
    def __init__(self):
        super().__init__()
        self.body, self.cls, self.num = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 1)
    def forward(self, x):
        h = self.body(x).relu()
        return self.cls(h), self.num(h)


class DictOutput(TupleOutput):
    "The same, by name"
    def forward(self, x):
        cls, num = super().forward(x)
        return {"cls": cls, "num": num}


def tuple_loss(pred, y): return nn.functional.cross_entropy(pred[0], y) + pred[1].pow(2).mean()
def dict_loss(pred, y): return tuple_loss((pred["cls"], pred["num"]), y)
def logits_loss(pred, y): return nn.functional.cross_entropy(pred["logits"], y)


# ---- learners
def _vision_dls(path, *blocks, get_y, size=SIZE):
    block = DataBlock(blocks=(ImageBlock, *blocks), get_x=ColReader("file"), get_y=get_y, splitter=ColSplitter(),
                      item_tfms=Resize(size))
    return block.dataloaders(images(path), bs=BS, num_workers=0, device=torch.device("cpu"))


def classifier(arch, path, size=SIZE, **kwargs):
    "An image classifier around `arch`"
    dls = _vision_dls(path / "images", CategoryBlock, get_y=ColReader("color"), size=size)
    return vision_learner(dls, arch, pretrained=False, metrics=accuracy, path=path, **kwargs)


def _classify(arch, **kwargs): return lambda path: classifier(arch, path, **kwargs)


def _multilabel(path):
    dls = _vision_dls(path / "images", MultiCategoryBlock, get_y=ColReader("tags", label_delim=" "))
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy_multi, path=path)


def _corner(row): return TensorPoint.create([[row["x"], row["y"]]])


def _points(path):
    dls = _vision_dls(path / "images", PointBlock, get_y=_corner)
    return vision_learner(dls, resnet18, pretrained=False, y_range=(-1, 1), path=path)


def _regression(path):
    dls = _vision_dls(path / "images", RegressionBlock, get_y=ColReader("area"))
    return vision_learner(dls, resnet18, pretrained=False, n_out=1, y_range=(0, 8), metrics=mae, path=path)


def _mask_of(row): return row["file"].replace(".png", "_mask.png")


def _unet(path):
    dls = _vision_dls(path / "images", MaskBlock(["background", "box"]), get_y=_mask_of)
    return unet_learner(dls, resnet18, pretrained=False, n_out=2, path=path)


def _tabular(target, layers=(32, 16), **kwargs):
    def make(path):
        dls = TabularDataLoaders.from_df(table(), path, [Categorify, FillMissing, Normalize], ["kind", "place"],
                                         ["size", "age"], target, valid_idx=list(range(N_TRAIN, N_ROWS)), bs=BS)
        return tabular_learner(dls, layers=list(layers), path=path, **kwargs)
    return make


def _collab(**kwargs):
    def make(path):
        dls = CollabDataLoaders.from_df(ratings(), valid_pct=0.3, seed=0, bs=BS, path=path)
        return collab_learner(dls, y_range=(0, 5.5), path=path, **kwargs)
    return make


def _text(path):
    dls = TextDataLoaders.from_df(texts(), path, text_col="text", label_col="label", valid_col="is_valid", bs=BS,
                                  num_workers=0)
    config = {**awd_lstm_clas_config, "emb_sz": 32, "n_hid": 48, "n_layers": 2}
    return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy, path=path)


def _language_model(path):
    dls = TextDataLoaders.from_df(texts(), path, text_col="text", valid_col="is_valid", is_lm=True, bs=BS, seq_len=12,
                                  num_workers=0)
    config = {**awd_lstm_lm_config, "emb_sz": 32, "n_hid": 48, "n_layers": 2}
    return language_model_learner(dls, AWD_LSTM, config=config, pretrained=False, path=path)


def _several_inputs(path):
    return Learner(_plain_dls(*numbers(), n_y=1), SeveralInputs(), CrossEntropyLossFlat(), metrics=accuracy, path=path)


def _tuple_output(path):
    a, _, y = numbers()
    return Learner(_plain_dls(a, y, n_y=1), TupleOutput(), tuple_loss, path=path)


def _dict_output(path):
    a, _, y = numbers()
    return Learner(_plain_dls(a, y, n_y=1), DictOutput(), dict_loss, path=path)


def tokens() -> tuple:
    "Token numbers and a class that depends on the first of them"
    ids = torch.randint(1, 50, (N_ROWS, 12), generator=torch.Generator().manual_seed(0))
    return ids, (ids[:, 0] > 25).long()


def _model_output(path):
    from transformers import BertConfig, BertForSequenceClassification
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=2,
                        intermediate_size=64, max_position_embeddings=16)
    return Learner(_plain_dls(*tokens(), n_y=1), BertForSequenceClassification(config), logits_loss, path=path)


# ---- what each predicts
def _files(path): return [Path(o) for o in images(path / "images").file[N_TRAIN:]]
def _valid_rows(path): return table().iloc[N_TRAIN:].drop(columns=["price", "sold"]).reset_index(drop=True)
def _pairs(path): return ratings().iloc[-14:].drop(columns="rating").reset_index(drop=True)
def _reviews(path): return list(texts().text[-14:])
def _tuples(*ts): return [tuple(t[i] for t in ts) for i in range(N_TRAIN, N_ROWS)]
def _two_inputs(path): return _tuples(*numbers()[:2])
def _one_input(path): return _tuples(numbers()[0])
def _token_rows(path): return _tuples(tokens()[0])


@dataclass(frozen=True)
class Family:
    "How to build one family, and what to expect of it"
    title: str
    make: Callable[[Path], Learner]
    items: Callable[[Path], object] # what `learn.dls.test_dl` takes
    needs: str = ""      # a package beyond fastai
    blocks: bool = True  # False: no items can be made up without data, so an export without data needs `items=`
    refused: str = ""    # the error that an export is expected to raise


FAMILIES = {
    "resnet18": Family("vision_learner, resnet18", _classify(resnet18), _files),
    "xresnet18": Family("vision_learner, xresnet18", _classify(xresnet18), _files),
    "convnext_atto": Family("vision_learner, timm convnext_atto", _classify("convnext_atto"), _files, "timm"),
    "efficientnet_b0": Family("vision_learner, timm efficientnet_b0", _classify("efficientnet_b0"), _files, "timm"),
    "mobilenetv3": Family("vision_learner, timm mobilenetv3_small_100", _classify("mobilenetv3_small_100"), _files,
                          "timm"),
    "vit_tiny": Family("vision_learner, timm vit_tiny_patch16_224", _classify("vit_tiny_patch16_224", img_size=SIZE), _files,
                       "timm"),
    "multilabel": Family("vision_learner, several labels", _multilabel, _files),
    "points": Family("vision_learner, points", _points, _files),
    "image_regression": Family("vision_learner, regression", _regression, _files),
    "unet": Family("unet_learner, resnet18", _unet, _files),
    "tabular_classification": Family("tabular_learner, classes", _tabular("sold", metrics=accuracy), _valid_rows),
    "tabular_regression": Family("tabular_learner, a number", _tabular("price", metrics=mae), _valid_rows),
    "collab_dot": Family("collab_learner, dot product", _collab(), _pairs),
    "collab_nn": Family("collab_learner, neural net", _collab(use_nn=True, layers=[16]), _pairs),
    "text_classifier": Family("text_classifier_learner, AWD_LSTM", _text, _reviews),
    "several_inputs": Family("Learner, two inputs", _several_inputs, _two_inputs, blocks=False),
    "tuple_output": Family("Learner, a tuple comes out", _tuple_output, _one_input, blocks=False),
    "dict_output": Family("Learner, a dict comes out", _dict_output, _one_input, blocks=False),
    "model_output": Family("Learner, transformers ModelOutput", _model_output, _token_rows, "transformers",
                           blocks=False),
    "language_model": Family("language_model_learner, AWD_LSTM", _language_model, _reviews, refused="CaptureError"),
}


def lacks(name: str) -> str:
    "The package that the family `name` needs and that is missing here; '' where all is there"
    needs = FAMILIES[name].needs
    return needs if needs and importlib.util.find_spec(needs) is None else ""


def build(name: str, path, train: bool = True) -> Learner:
    "The learner of the family `name` with its data, trained for one short epoch; files are written below `path`"
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    set_seed(42, reproducible=True)
    learn = FAMILIES[name].make(path)
    if train:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn


def items(name: str, path):
    "The validation rows of that family, without targets, as `learn.dls.test_dl` takes them"
    return FAMILIES[name].items(Path(path))


def first(rows):
    "The first of `rows`, as `learn.predict` takes it"
    return rows.iloc[0] if hasattr(rows, "iloc") else rows[0]
