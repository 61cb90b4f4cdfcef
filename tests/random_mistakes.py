"""What users do to their validation sets, and what looks like it and is harmless. Each returns a small Learner."""
import itertools
import random
import threading
import time
from dataclasses import dataclass
from functools import cache
from random import random as draw

import kornia.augmentation as K
import numpy as np
import pandas as pd
import torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *
from torchvision.transforms import v2

import albumentations as A  # after fastai, which has another A

import copy  # the same

from helpers import make_frame, small_cnn


@dataclass
class Case:
    name:str
    make:object    # folder of images -> Learner
    finds:str = "" # Part of the name that is reported
    source:str = "" # Part of the source that is reported
    where:str = ""
    auto:str = "raises"  # What each policy makes of it: 'valid', 'skip', 'seed', 'in order' or 'raises'
    valid:str = "raises"
    skip:str = "skip"
    seed:str = "seed"


MISTAKES, HARMLESS = [], []


def mistake(finds, source, where, **policies):
    def add(make):
        MISTAKES.append(Case(make.__name__, make, finds, source, where, **policies))
        return make
    return add


def harmless(make):
    HARMLESS.append(Case(make.__name__, make))
    return make


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def cnn(dls, path, model=None):
    torch.manual_seed(0)
    return quiet(Learner(dls, model or small_cnn(), loss_func=CrossEntropyLossFlat(), path=path))


def images(folder, item=(), batch=(), model=None, resize=True, **kwargs):
    "A classifier of the images in `folder` with a few more transforms"
    item = [*([Resize(32)] if resize else []), *item]
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.2, seed=1, item_tfms=item, batch_tfms=[*batch], bs=5,
                                       num_workers=0, **kwargs)
    return cnn(dls, folder, model)


def raw(folder, ds=None, model=None, valid=None, **kwargs):
    "Loaders on a dataset that is no fastai one"
    ds = ds or Squares()
    return cnn(DataLoaders.from_dsets(ds, valid or ds, bs=4, num_workers=0, **kwargs), folder, model)


class Squares:
    "A dataset as PyTorch's users write it"
    def __init__(self, transform=None, n=8): self.transform, self.n = transform, n
    def __len__(self): return self.n
    def new_empty(self):
        res = copy.copy(self)
        res.n = 0
        return res
    def __getitem__(self, i):
        x = TensorImage(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)))
        return (self.transform(x) if self.transform else x), TensorCategory(i % 4)


def items_of(learn, folder):
    "A few items as `learn.dls.test_dl` takes them"
    ds = learn.dls.valid.dataset
    if isinstance(ds, Tabular): return make_frame(5, seed=2).dropna()
    if isinstance(ds, Squares): return [Squares()[i] for i in range(5)]
    if isinstance(ds.items[0], str): return list(ds.items[:5])
    return get_image_files(folder).sorted()[:5]


def late(f):
    "A batch transform that runs after `IntToFloatTensor`"
    f.order = 50
    return f


# ---- the mistakes

class Jitter(RandTransform):
    split_idx, order = None, 50
    def encodes(self, x:TensorImage): return (x * random.uniform(0.5, 1.5)).to(x.dtype)

@mistake("Jitter", "random", "item transforms")
def rand_transform_without_split(folder): return images(folder, [Jitter()])


@late
def numpy_noise(x:TensorImage): return x + torch.tensor(np.random.normal(size=x.shape), dtype=x.dtype)

@mistake("numpy_noise", "numpy.random", "batch transforms")
def numpy_in_a_function(folder): return images(folder, batch=[numpy_noise])


class FlipPairs(ItemTransform):
    order = 50
    def encodes(self, b): return (b[0].flip(-1) if random.random() < 0.5 else b[0], *b[1:])

@mistake("FlipPairs", "random", "item transforms")
def item_transform_on_tuples(folder): return images(folder, [FlipPairs()])


@late
def torch_noise(x:TensorImage): return x + torch.randn_like(x)

@mistake("torch_noise", "torch", "batch transforms")
def torch_in_a_function(folder): return images(folder, batch=[torch_noise])


FLIP = v2.RandomHorizontalFlip()
@late
def v2_flip(x:TensorImage): return TensorImage(FLIP(x.as_subclass(torch.Tensor)))

@mistake("v2_flip", "torch", "batch transforms")
def torchvision_in_a_function(folder): return images(folder, batch=[v2_flip])


def v2_colours(x:PILImage): return PILImage.create(v2.ColorJitter(0.5, 0.5)(Image.fromarray(np.array(x))))

@mistake("v2_colours", "torch", "item transforms")
def torchvision_on_pil(folder): return images(folder, [v2_colours])


class V2Crop(Transform):
    order = 0
    def __init__(self): super().__init__(); self.crop = v2.RandomResizedCrop(32)
    def encodes(self, x:PILImage): return PILImage.create(self.crop(Image.fromarray(np.array(x))))

@mistake("V2Crop", "torch", "item transforms", skip="raises")
def torchvision_crop_held(folder): return images(folder, [V2Crop()], resize=False)


COMPOSED = v2.Compose([v2.Resize((32, 32)), v2.RandomRotation(30), v2.RandomGrayscale(0.5)])
def open_and_turn(path): return PILImage.create(COMPOSED(Image.open(path).convert("RGB")))

@mistake("open_and_turn", "torch", "type transforms", skip="raises")
def torchvision_where_images_open(folder):
    files = get_image_files(folder).sorted()
    dls = Datasets(files, [[open_and_turn], [parent_label, Categorize()]], splits=RandomSplitter(0.2, seed=1)(files)
                   ).dataloaders(bs=5, num_workers=0, after_item=[ToTensor()], after_batch=[IntToFloatTensor()])
    return cnn(dls, folder)


MIRROR = A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5)])
def albumentations_mirror(x:PILImage): return PILImage.create(MIRROR(image=np.array(x))["image"])

@mistake("albumentations_mirror", "generator", "item transforms")
def albumentations_by_global_name(folder): return images(folder, [albumentations_mirror])


class Albumentations(ItemTransform):
    order = 2
    def __init__(self, aug): super().__init__(); self.aug = aug
    def encodes(self, b): return (PILImage.create(self.aug(image=np.array(b[0]))["image"]), *b[1:])

@mistake("Albumentations", "generator", "item transforms")
def albumentations_held(folder): return images(folder, [Albumentations(A.Affine(rotate=(-20, 20), p=1))])

@mistake("Albumentations", "generator", "item transforms")
def albumentations_with_a_seed(folder): return images(folder, [Albumentations(A.Compose([A.GaussNoise(p=1)], seed=42))])

@mistake("Albumentations", "generator", "item transforms")
def albumentations_rare(folder): return images(folder, [Albumentations(A.Compose([A.HorizontalFlip(p=0.03)]))])


class Kornia(Transform):
    order = 50
    def __init__(self, aug): super().__init__(); self.aug = aug
    def encodes(self, x:TensorImage): return TensorImage(self.aug(x.as_subclass(torch.Tensor)))

@mistake("Kornia", "torch", "batch transforms")
def kornia_affine(folder): return images(folder, batch=[Kornia(K.RandomAffine(20., p=0.8))])

@mistake("Kornia", "torch", "batch transforms")
def kornia_sequence(folder):
    return images(folder, batch=[Kornia(K.AugmentationSequential(K.RandomGaussianNoise(p=0.5),
                                                                 K.RandomHorizontalFlip()))])

@mistake("Kornia", "torch", "batch transforms")
def kornia_rare(folder): return images(folder, batch=[Kornia(K.RandomHorizontalFlip(p=0.05))])


class Held(Transform):
    order = 50
    def __init__(self, rng): super().__init__(); self.rng = rng
    def encodes(self, x:TensorImage):
        one = torch.rand(1, generator=self.rng).item() if isinstance(self.rng, torch.Generator) else self.rng.random()
        return x + one

@mistake("Held", "generator rng", "batch transforms")
def numpy_generator_held(folder): return images(folder, batch=[Held(np.random.default_rng(0))])

@mistake("Held", "generator rng", "batch transforms")
def python_generator_held(folder): return images(folder, batch=[Held(random.Random(0))])

@mistake("Held", "generator rng", "batch transforms")
def torch_generator_held(folder): return images(folder, batch=[Held(torch.Generator())])


RNG = np.random.default_rng(0)
@late
def shared_generator(x:TensorImage): return x + RNG.random()

@mistake("shared_generator", "generator RNG", "batch transforms")
def generator_of_the_module(folder): return images(folder, batch=[shared_generator])


@late
def fresh_generator(x:TensorImage): return x + np.random.default_rng().random()

@mistake("fresh_generator", "default_rng()", "batch transforms")
def generator_made_in_the_call(folder): return images(folder, batch=[fresh_generator])


class EveryOther(Transform):
    order, n = 50, 0
    def encodes(self, x:TensorImage):
        self.n += 1
        return x.flip(-1) if self.n % 2 else x

@mistake("EveryOther", "state", "batch transforms")
def counter_of_the_object(folder): return images(folder, batch=[EveryOther()])


class EveryTwentieth(Transform):
    order = 50
    def __init__(self): super().__init__(); self.seen = 0
    def encodes(self, x:TensorImage):
        self.seen += 1
        return x.flip(-1) if self.seen % 20 == 0 else x

@mistake("EveryTwentieth", "state", "batch transforms")
def rare_counter(folder): return images(folder, batch=[EveryTwentieth()])


def make_counter():
    n = 0
    @late
    def counted(x:TensorImage):
        nonlocal n
        n += 1
        return x + n % 3
    return counted

@mistake("counted", "state", "batch transforms", seed="raises")
def counter_in_a_closure(folder): return images(folder, batch=[make_counter()])


CALLS = 0
@late
def counted_by_the_module(x:TensorImage):
    global CALLS
    CALLS += 1
    return x + CALLS % 2

@mistake("counted_by_the_module", "state", "batch transforms", seed="raises")
def counter_of_the_module(folder): return images(folder, batch=[counted_by_the_module])


class Cycle(Transform):
    order = 50
    def __init__(self): super().__init__(); self.turns = itertools.cycle([0, 1, 2])
    def encodes(self, x:TensorImage): return x + next(self.turns)

@mistake("Cycle", "state", "batch transforms")
def cycle_held(folder): return images(folder, batch=[Cycle()])


class Smooth(Transform):
    "Remembers the last batches"
    order = 50
    def __init__(self): super().__init__(); self.mean = 0.
    def encodes(self, x:TensorImage):
        self.mean = 0.9*self.mean + 0.1*x.mean().item()
        return x - self.mean

@mistake("Smooth", "state", "batch transforms")
def running_mean(folder): return images(folder, batch=[Smooth()])


@late
def rare_random(x:TensorImage): return x * 0 if random.random() < 0.05 else x

@mistake("rare_random", "random", "batch transforms")
def rare_python(folder): return images(folder, batch=[rare_random])


@late
def rare_draw(x:TensorImage): return x * 0 if draw() > 0.98 else x

@mistake("rare_draw", "random", "batch transforms")
def rare_by_an_imported_name(folder): return images(folder, batch=[rare_draw])


@late
def rare_numpy(x:TensorImage): return x.flip(-1) if np.random.uniform() < 0.01 else x

@mistake("rare_numpy", "numpy.random", "batch transforms")
def rare_with_numpy(folder): return images(folder, batch=[rare_numpy])


@late
def rare_torch(x:TensorImage): return x * torch.empty(1).uniform_(0.5, 1.5) if torch.rand(1) < 0.05 else x

@mistake("rare_torch", "torch", "batch transforms")
def rare_with_torch(folder): return images(folder, batch=[rare_torch])


def v2_on_tensor(x): return TensorImage(FLIP(x.as_subclass(torch.Tensor)))

@mistake("v2_on_tensor", "torch", "dataset transform")
def transform_of_a_dataset(folder): return raw(folder, Squares(v2_on_tensor))


class DrawingSquares(Squares):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + random.random(), y

@mistake("DrawingSquares", "random", "dataset", skip="raises", seed="raises")
def dataset_that_draws(folder): return raw(folder, DrawingSquares())


@mistake("Flip", "torch", "batch transforms", auto="valid", valid="valid")
def augmentation_of_a_raw_dataset(folder): return raw(folder, after_batch=[Flip()])

@mistake("RandomResizedCropGPU", "random", "batch transforms", auto="valid", valid="valid", skip="raises", seed="seed")
def crop_of_a_raw_dataset(folder): return raw(folder, after_batch=[RandomResizedCropGPU(24)])

@mistake("DeterministicDihedral", "state", "batch transforms", auto="valid", valid="valid")
def deterministic_dihedral(folder): return raw(folder, after_batch=[DeterministicDihedral()])


@mistake("Resize", "random", "item transforms", auto="valid", valid="valid", skip="raises")
def training_rows_as_validation(folder):
    learn = images(folder)
    learn.dls = DataLoaders(learn.dls.train, learn.dls.train.new(shuffle=False, drop_last=False), path=folder)
    return learn


@mistake("shuffle=True", "random", "order of rows", auto="in order", valid="in order", skip="in order", seed="in order")
def shuffled_validation(folder): return images(folder, val_shuffle=True)


class AlwaysDrops(nn.Module):
    def forward(self, x): return F.dropout(x, 0.5)

@mistake("AlwaysDrops", "torch", "model", skip="raises", seed="raises")
def dropout_in_eval(folder):
    return images(folder, model=nn.Sequential(nn.Conv2d(3, 4, 3), AlwaysDrops(), nn.AdaptiveAvgPool2d(1), Flatten(),
                                              nn.Linear(4, 4)))


class StubbornDropout(nn.Dropout):
    def train(self, mode=True): return super().train(True)

@mistake("StubbornDropout", "torch", "model", skip="raises", seed="raises")
def dropout_that_stays(folder):
    return images(folder, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), Flatten(),
                                              StubbornDropout(), nn.Linear(4, 4)))


class DropsLayers(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x): return x if random.random() < 0.04 else x + self.conv(x)

@mistake("DropsLayers", "random", "model", skip="raises", seed="raises")
def layer_drop_in_eval(folder):
    return images(folder, model=nn.Sequential(DropsLayers(), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(3, 4)))


class NoisyProc(TabularProc):
    def encodes(self, to): to.items["width"] = to.items["width"] + np.random.rand(len(to.items))

@mistake("NoisyProc", "numpy.random", "procs", valid="raises", seed="raises")
def proc_that_draws(folder):
    df = make_frame(60)
    dls = TabularDataLoaders.from_df(df, path=folder, procs=[Categorify, FillMissing, NoisyProc], cat_names="kind",
        cont_names=["width", "height"], y_names="label", valid_idx=range(40, 60), bs=8)
    return quiet(tabular_learner(dls, layers=[4]))


def drop_words(words): return [w for w in words if random.random() > 0.1]

def text(folder, more=()):
    words = [f"w{i}" for i in range(30)]
    items = [" ".join(words[(i*j) % 30] for j in range(12)) for i in range(1, 25)]
    dsets = Datasets(items, [[str.split, *more, Numericalize(min_freq=1, vocab=words)], [len, lambda n: n % 2,
                                                                                         Categorize()]],
                     splits=[range(16), range(16, 24)])
    dls = dsets.dataloaders(bs=4, before_batch=pad_input_chunk, num_workers=0)
    return quiet(Learner(dls, nn.Sequential(nn.EmbeddingBag(40, 4, padding_idx=1), nn.Linear(4, 2)),
                         loss_func=CrossEntropyLossFlat(), path=folder))

@mistake("drop_words", "random", "type transforms", seed="seed")
def words_dropped(folder): return text(folder, [drop_words])


class RandomShift(ItemTransform):
    def encodes(self, samples): return [(torch.roll(x, random.randint(0, 3)), *y) for x, *y in samples]

@mistake("RandomShift", "random", "before_batch", seed="raises")
def before_batch_that_draws(folder):
    learn = images(folder)
    learn.dls.valid.before_batch.add(RandomShift())
    return learn


def noisy_collate(b):
    x = torch.stack([o[0] for o in b])
    return x + torch.rand_like(x), torch.stack([o[1] for o in b])

@mistake("TfmdDL", "torch", "create_batch", skip="raises", seed="raises")
def collate_that_draws(folder): return raw(folder, create_batch=noisy_collate)


class NoiseInput(Callback):
    def before_batch(self): self.learn.xb = tuple(x + torch.rand_like(x) for x in self.xb)

@mistake("NoiseInput", "torch", "callback", auto="raises", skip="raises", seed="raises")
def callback_that_draws(folder):
    learn = images(folder)
    learn.add_cb(NoiseInput())
    return learn


@late
def clock(x:TensorImage): return x + time.time_ns() % 1000 / 1000

@mistake("clock", "clock", "batch transforms", seed="raises")
def depends_on_the_clock(folder): return images(folder, batch=[clock])


# ---- what is harmless

@harmless
def squish(folder): return images(folder, [Resize(24, ResizeMethod.Squish)])
@harmless
def crop(folder): return images(folder, [Resize(24, ResizeMethod.Crop)])
@harmless
def pad(folder): return images(folder, [Resize((24, 40), ResizeMethod.Pad, pad_mode="zeros")])
@harmless
def random_resized_crop(folder): return images(folder, [RandomResizedCrop(32, min_scale=0.3)], resize=False)
@harmless
def random_crop(folder): return images(folder, [RandomCrop(24)])
@harmless
def crop_pad(folder): return images(folder, [CropPad(48)])
@harmless
def ratio_resize(folder): return images(folder, [RatioResize(40)], resize=False)
@harmless
def flips_of_items(folder): return images(folder, [FlipItem(), DihedralItem()])
@harmless
def stock_augmentation(folder): return images(folder, batch=aug_transforms())
@harmless
def all_augmentation(folder):
    return images(folder, batch=[*aug_transforms(do_flip=True, flip_vert=True, max_rotate=30, max_warp=0.4, p_affine=1,
                                                 p_lighting=1, size=28),
                                 Normalize.from_stats(*imagenet_stats)])
@harmless
def lighting(folder): return images(folder, batch=[Brightness(), Contrast(), Saturation(), Hue(), RandomErasing(p=1.)])
@harmless
def crop_on_batches(folder): return images(folder, batch=[RandomResizedCropGPU(24), Zoom(), Warp(), Rotate(),
                                                          Dihedral()])
@harmless
def normalized_by_the_data(folder): return images(folder, batch=[Normalize()])
@harmless
def block_of_images(folder):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(seed=1),
                      item_tfms=Resize(32), batch_tfms=aug_transforms(do_flip=False))
    return cnn(block.dataloaders(folder, bs=5, num_workers=0), folder, small_cnn(n_in=1))
@harmless
def from_name_func(folder):
    return cnn(ImageDataLoaders.from_name_func(folder, get_image_files(folder).sorted(),
                                               label_func=lambda n: n.split("_")[1], bs=5,
                                               item_tfms=Resize(32), num_workers=0), folder)
@harmless
def from_a_frame(folder):
    files = get_image_files(folder).sorted()
    df = pd.DataFrame({"name": [str(f.relative_to(folder)) for f in files],
                       "label": [f"{f.parent.name} dark" for f in files]})
    dls = ImageDataLoaders.from_df(df, folder, label_delim=" ", bs=5, item_tfms=Resize(32),
                                   batch_tfms=aug_transforms(), num_workers=0)
    return quiet(Learner(dls, small_cnn(n_out=5), loss_func=BCEWithLogitsLossFlat()))
@harmless
def points(folder):
    block = DataBlock((ImageBlock, PointBlock), get_items=get_image_files, get_y=lambda o: tensor([[3., 4.]]),
                      splitter=RandomSplitter(seed=1),
                      item_tfms=Resize(32), batch_tfms=aug_transforms())
    return quiet(Learner(block.dataloaders(folder, bs=5, num_workers=0), small_cnn(n_out=2), loss_func=MSELossFlat(),
                         path=folder))
@harmless
def masks(folder):
    block = DataBlock((ImageBlock, MaskBlock(codes=["a", "b"])), get_items=get_image_files,
                      splitter=RandomSplitter(seed=1),
                      get_y=lambda o: PILMask.create((np.array(PILImage.create(o))[..., 0] > 99).astype(np.uint8)),
                      item_tfms=Resize(32), batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    return quiet(Learner(block.dataloaders(folder, bs=5, num_workers=0), nn.Conv2d(3, 2, 1),
                         loss_func=CrossEntropyLossFlat(axis=1), path=folder))
@harmless
def table(folder):
    dls = TabularDataLoaders.from_df(make_frame(60), path=folder, procs=[Categorify, FillMissing, Normalize],
                                     cat_names="kind",
        cont_names=["width", "height"], y_names="label", valid_idx=range(40, 60), bs=8)
    return quiet(tabular_learner(dls, layers=[4]))
@harmless
def regression_table(folder):
    to = TabularPandas(make_frame(60).dropna(), [Categorify, Normalize], ["kind"], ["width"], y_names="height",
                       splits=(list(range(30)), list(range(30, 50))))
    dls = to.dataloaders(bs=8, path=folder)
    return quiet(tabular_learner(dls, layers=[4], config=tabular_config(ps=0.5, embed_p=0.2), loss_func=MSELossFlat()))
@harmless
def collaborative(folder):
    rng = np.random.default_rng(0)
    df = pd.DataFrame({"user": rng.integers(0, 9, 60), "item": rng.integers(0, 7, 60), "rating": rng.random(60)})
    return quiet(collab_learner(CollabDataLoaders.from_df(df, bs=8, path=folder), n_factors=4, y_range=(0, 1)))
@harmless
def words(folder): return text(folder)
@harmless
def language_model(folder):
    df = pd.DataFrame({"text": [" ".join(f"w{(i*j) % 30}" for j in range(40)) for i in range(1, 25)]})
    dls = TextDataLoaders.from_df(df, path=folder, text_col="text", is_lm=True, valid_pct=0.3, seq_len=8, bs=4,
                                  num_workers=0,
                                  tok_tfm=Tokenizer.from_df("text", tok=BaseTokenizer(), n_workers=1))
    return quiet(language_model_learner(dls, AWD_LSTM, pretrained=False, path=folder,
                                        config={**awd_lstm_lm_config, "emb_sz": 8, "n_hid": 8, "n_layers": 2}))
@harmless
def spacy_texts(folder):
    df = pd.DataFrame({"text": [f"A small text about {'cats' if i % 2 else 'dogs'}, number {i}." for i in range(16)],
                       "y": ["ab"[i % 2] for i in range(16)]})
    dls = TextDataLoaders.from_df(df, path=folder, text_col="text", label_col="y", valid_pct=0.3, bs=4, num_workers=0,
                                  tok_tfm=Tokenizer.from_df("text", n_workers=1))
    return quiet(text_classifier_learner(dls, AWD_LSTM, pretrained=False, path=folder,
                                         config={**awd_lstm_clas_config, "emb_sz": 8, "n_hid": 8, "n_layers": 2}))


@late
def draws_in_vain(x:TensorImage): random.random(); np.random.rand(); torch.rand(3); return x + 1
@harmless
def draws_without_effect(folder): return images(folder, batch=[draws_in_vain])


@late
def pins_itself(x:TensorImage):
    rng = np.random.default_rng(int(x.sum().item() * 1000) % 2**32)
    return x + rng.random()
@harmless
def seeds_by_its_content(folder): return images(folder, batch=[pins_itself])


class DrawsOnce(Transform):
    order = 50
    def __init__(self): super().__init__(); self.shift, self.rng = random.random(), np.random.default_rng(3)
    def encodes(self, x:TensorImage): return x + self.shift
@harmless
def drawn_when_made(folder): return images(folder, batch=[DrawsOnce()])


class Locks(Transform):
    order = 50
    def __init__(self, draws=True): super().__init__(); self.lock, self.draws = threading.Lock(), draws
    def encodes(self, x:TensorImage):
        with self.lock: return x + random.random() if self.draws else x

def lock_held(folder, draws=True): return images(folder, batch=[Locks(draws)])


def noise_by(x, by): return x + by*random.randrange(9) if isinstance(x, TensorImage) else x

@mistake("partial(noise_by)", "random", "batch transforms")
def partial_of_a_function(folder):
    return images(folder, batch=[partial(noise_by, by=2)])


class Counts(Transform):
    order, n = 50, 0
    def encodes(self, x:TensorImage): self.n += 1; return x
@harmless
def counts_without_effect(folder): return images(folder, batch=[Counts()])


@cache
def weight(k): return torch.linspace(0, 1, k)
@late
def remembers(x:TensorImage): return x * weight(x.shape[-1])
@harmless
def cached(folder): return images(folder, batch=[remembers])


@late
def has_nan(x:TensorImage): return x / x.clamp(max=0) * float("nan")
@harmless
def nan_everywhere(folder): return images(folder, batch=[has_nan])


FIXED = v2.Compose([v2.Resize((24, 24)), v2.CenterCrop(20), v2.Normalize([0.5]*3, [0.5]*3)])
@late
def v2_fixed(x:TensorImage): return TensorImage(FIXED(x.as_subclass(torch.Tensor)))
@harmless
def torchvision_without_draws(folder): return images(folder, batch=[v2_fixed])
@harmless
def albumentations_without_draws(folder):
    return images(folder, [Albumentations(A.Compose([A.CenterCrop(20, 20), A.CLAHE(p=1), A.ToGray(p=1)]))])
@harmless
def kornia_without_draws(folder): return images(folder, batch=[Kornia(K.Normalize(torch.tensor([0.5]*3),
                                                                                  torch.tensor([0.5]*3)))])


class TrainsOnly(RandTransform):
    order = 50
    def encodes(self, x:TensorImage): return x + torch.randn_like(x)
@harmless
def own_transform_of_training(folder): return images(folder, batch=[TrainsOnly()])


@harmless
def dropout_and_batchnorm(folder):
    return images(folder, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(),
                                              nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(4, 4)))
@harmless
def raw_dataset(folder): return raw(folder)
@harmless
def mixup_in_training(folder):
    learn = images(folder)
    learn.add_cb(MixUp())
    return learn
@harmless
def torch_loaders(folder):
    ds = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 4)
    loaders = [torch.utils.data.DataLoader(ds, batch_size=4, shuffle=s) for s in (True, False)]
    return cnn(DataLoaders(*loaders), folder)


# ---- what cannot be tested

class Logs(Transform):
    order = 50
    def __init__(self, draws=False): super().__init__(); self.log, self.draws = open(os.devnull, "w"), draws
    def encodes(self, x:TensorImage): return x + random.random() if self.draws else x

def holds_a_file(folder, draws=False): return images(folder, batch=[Logs(draws)])
