"""Many threads, pictures of many sizes, one learner: every answer is the one that fastai gives alone."""
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.transforms import get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import ImageDataLoaders, Normalize, RandomResizedCrop, imagenet_stats

from fastai_compile import open_learner
from helpers import make_images, small_cnn
from stock import by_fastai, stock

SIZES = {"x": (36, 40), "y": (61, 33), "z": (40, 90)}


def wrong_answers(folder: Path, calls: int, threads: int = 8) -> dict:
    "How many of `calls` predictions from `threads` threads differ in any bit from fastai's answer to the same file"
    for name, size in SIZES.items(): make_images(folder / name, n=8, size=size)
    files = get_image_files(folder).sorted()
    dls = ImageDataLoaders.from_path_func(folder, files, parent_label, item_tfms=RandomResizedCrop(32), bs=8, num_workers=0,
                                          batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(dls, small_cnn(), loss_func=CrossEntropyLossFlat(), path=folder)
    learn.export(folder / "compiled.pkl", compile="onnxruntime", verify="numbers")
    learn = open_learner(folder / "compiled.pkl")
    learn.remove_cb(ProgressCallback)
    with by_fastai(): want = {f: stock(learn, "predict", f)[2] for f in files}
    order = [files[i] for i in np.random.default_rng(0).integers(0, len(files), calls)]
    gate = threading.Barrier(threads)
    def right(i):
        if i < threads: gate.wait()
        return torch.equal(learn.predict(order[i])[2], want[order[i]])
    with ThreadPoolExecutor(threads) as pool: found = list(pool.map(right, range(calls)))
    return {"calls": calls, "threads": threads, "files": len(files), "WRONG": found.count(False)}
