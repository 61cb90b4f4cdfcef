"""Train a classifier of handwritten digits and export it as one compiled file: `python examples/train.py [folder]`."""
import sys
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastai_compile import *

SIZE, SEED, EPOCHS = 64, 42, 3

def write_digits(path):
    "The 1,797 scans that scikit-learn ships, 8 by 8 pixels in 17 greys, as PNG files of 64 by 64 in folders `0` to `9`"
    path, scans = Path(path), load_digits()
    if path.exists() and len(get_image_files(path)) == len(scans.target): return path
    for i, (scan, label) in enumerate(zip(scans.images, scans.target)):
        folder = path/str(label)
        folder.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray((scan*255/16).round().astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        im.save(folder/f'{i:04}.png')
    return path

def make_learner(path):
    "A resnet18 without pretrained weights for the digits, which are written below `path`"
    set_seed(SEED, reproducible=True)
    dls = ImageDataLoaders.from_folder(write_digits(Path(path)/'digits'), valid_pct=0.2, seed=SEED, bs=64, num_workers=0,
                                       device='cpu', item_tfms=Resize(SIZE), batch_tfms=Normalize.from_stats(*imagenet_stats))
    return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=Path(path))

def train(learn):
    "Three epochs: a minute on 2 cores"
    set_seed(SEED, reproducible=True)
    learn.fit_one_cycle(EPOCHS, 3e-3)

if __name__ == '__main__':
    learn = make_learner(sys.argv[1] if len(sys.argv) > 1 else 'demo_out')
    train(learn)
    print(learn.export('digits.pkl', compile=True))
