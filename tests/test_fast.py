"""`fast_images`: approximate only inside, and with the same care for bad input as outside."""
import io
import threading
from functools import cache

import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import (ImageDataLoaders, IntToFloatTensor, Resize, ResizeMethod, RandomResizedCrop, Transform,
                               PILImage, get_image_files)
from PIL import Image
from sklearn.datasets import load_sample_images

from fastai_compile.errors import ConfigError
from fastai_compile.items import InvalidInput
from helpers import small_cnn

METHODS = ResizeMethod.Crop, ResizeMethod.Squish, ResizeMethod.Pad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    for i, im in enumerate(map(Image.fromarray, load_sample_images().images * 3)):
        (path / "ab"[i % 2]).mkdir(exist_ok=True)
        im.resize((900 + 40 * i, 600)).save(path / "ab"[i % 2] / f"{i}.{'png' if i == 5 else 'jpg'}")
    return path


@cache
def cropped(folder): return compiled(folder, Resize(96))


def compiled(folder, *tfms):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.5, seed=0, bs=2, num_workers=0, item_tfms=tfms)
    learn = Learner(dls, small_cnn(n_out=2), loss_func=CrossEntropyLossFlat(), path=folder)
    learn.export(folder / "m.pkl", compile="eager", verify="numbers")
    learn = load_learner(folder / "m.pkl")
    learn.remove_cb(ProgressCallback)
    return learn


@pytest.mark.parametrize("method", METHODS)
def test_close_inside_and_exact_outside(method, folder):
    learn, files = compiled(folder, Resize(96, method=method)), get_image_files(folder).sorted()
    exact = [learn.predict(f)[2] for f in files]
    with learn.fast_images(files) as report:
        fast = [learn.predict(f)[2] for f in files]
        pixels = learn.predict(files[0], with_input=True)[0]
        from_bytes = learn.predict(files[0].read_bytes())[2]
    shown = learn.predict(files[0], with_input=True)[0]
    assert pixels.shape == shown.shape and 0 < (pixels.float() - shown.float()).abs().mean() < 0.05 * 255
    assert torch.equal(from_bytes, fast[0])
    assert report.difference == max((a.double() - b.double()).abs().max().item() for a, b in zip(exact, fast)) > 0
    assert report.items == 6 and report.agreement == 1 - len(report.differ) / 6 and "times as fast" in repr(report)
    assert all(torch.equal(learn.predict(f)[2], e) for f, e in zip(files, exact))


def test_every_thread_is_in_the_same_mode(folder):
    learn, files, seen = cropped(folder), get_image_files(folder).sorted(), []
    with learn.fast_images(files[:1]):
        want = learn.predict(files[0])[2]
        other = threading.Thread(target=lambda: seen.append(learn.predict(files[0])[2]))
        other.start()
        other.join()
    assert torch.equal(seen[0], want) and not torch.equal(learn.predict(files[0])[2], want)


def test_an_error_inside_turns_it_off(folder):
    learn, file = cropped(folder), get_image_files(folder).sorted()[0]
    exact = learn.predict(file)[2]
    with pytest.raises(ZeroDivisionError):
        with learn.fast_images([file]): raise ZeroDivisionError
    assert torch.equal(learn.predict(file)[2], exact)
    with pytest.raises(InvalidInput, match="no such file"):
        with learn.fast_images([file, "missing.jpg"]): pass
    assert torch.equal(learn.predict(file)[2], exact)


def test_bad_pictures_are_refused_as_outside(folder):
    learn, file = cropped(folder), get_image_files(folder).sorted()[0]
    cut = file.read_bytes()[:5000]
    with learn.fast_images([file]):
        for bad in (cut, b"", b"no picture"):
            with pytest.raises(InvalidInput): learn.predict(bad)


def test_a_small_picture_is_not_made_smaller(folder):
    learn, out = cropped(folder), io.BytesIO()
    Image.new("RGB", (100, 60), "red").save(out, "JPEG")
    with learn.fast_images([out.getvalue()]) as report: assert report.difference < 1e-6


class Bright(Transform):
    order = -1
    def encodes(self, x: PILImage): return PILImage.create(x.point(lambda v: min(255, v + 9)))


@pytest.mark.parametrize("tfms", [(RandomResizedCrop(96),), (Bright(), Resize(96))])
def test_where_nothing_can_be_approximate(tfms, folder):
    learn = compiled(folder, *tfms)
    with pytest.raises(ConfigError, match="Resize"):
        with learn.fast_images(get_image_files(folder)): pass
    assert IntToFloatTensor in [type(f) for f in learn.dls.valid.after_batch.fs]
