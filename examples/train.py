"""Train a classifier of handwritten digits and export it as one compiled file: `python examples/train.py [folder]`."""
import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # idle OpenMP threads sleep instead of spinning; read when torch is imported
import sys
import numpy as np
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastai_compile import *

SIZE, SEED = 64, 42

def write_digits(path):
    "The 1,797 scans that scikit-learn ships, 8 by 8 pixels in 17 greys, as PNG files of 64 by 64 in folders `0` to `9`"
    path = Path(path)
    if len(get_image_files(path)) == 1797: return path
    scans = load_digits()
    for i, (scan, label) in enumerate(zip(scans.images, scans.target)):
        (path/str(label)).mkdir(parents=True, exist_ok=True)
        im = Image.fromarray((scan*255/16).round().astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        im.save(path/str(label)/f'{i:04}.png')
    return path

def train(path, epochs=3):
    "A resnet18 trained from scratch on the digits below `path`"
    set_seed(SEED, reproducible=True)
    dls = ImageDataLoaders.from_folder(write_digits(Path(path)/'digits'), valid_pct=0.2, seed=SEED, bs=64, num_workers=0,
                                       batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=Path(path))
    learn.fit_one_cycle(epochs, 5e-3)
    return learn

if __name__ == '__main__':
    learn = train(sys.argv[1] if len(sys.argv) > 1 else 'demo_out')
    print(f'accuracy {learn.validate()[1]:.2%}')
    print(learn.export('digits.pkl', compile=True))
