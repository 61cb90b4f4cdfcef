"""Decoders of JPEG files with the very pixels of PIL: does another one gain anything before fastai's exact resize?

PIL (what the library uses), torchvision, OpenCV and simplejpeg, one thread each, in one interleaved run, on the photograph of
scikit-learn as it is and scaled to 1600 pixels. `decode`: file to pixels. `decode, crop, resize`: file to the picture of 224
pixels that a model sees. The resize is PIL's in every case, because another one gives other pixels, so what is no PIL picture
is cropped as an array and becomes one. Pixels are compared before anything is timed.
"""
import argparse
import importlib.metadata
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from benchmarks import by_hand
from benchmarks.common import RESULTS, facts, parse, table, timed, write
from benchmarks.photographs import SIZE, original

OUT = RESULTS / "decode.json"
SIDES = (640, 1600)


def pil(data: bytes, file: Path):
    with Image.open(file) as im: im.load()
    return im


def torchvision(data: bytes, file: Path):
    from torchvision.io import ImageReadMode, decode_jpeg
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_jpeg(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()


def opencv(data: bytes, file: Path):
    import cv2
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def simplejpeg(data: bytes, file: Path):
    import simplejpeg
    return simplejpeg.decode_jpeg(data, "RGB")


DECODERS = {"PIL": (pil, "pillow", "PIL"), "torchvision": (torchvision, "torchvision", "torchvision"),
            "OpenCV": (opencv, "opencv-python-headless", "cv2"), "simplejpeg": (simplejpeg, "simplejpeg", "simplejpeg")}


def prepared(im) -> Image.Image:
    "The middle square, scaled by PIL"
    if isinstance(im, Image.Image): return by_hand.resize(im, SIZE)
    h, w = im.shape[:2]
    side = min(w, h)
    left, top = (w - side) // 2, (h - side) // 2
    part = Image.fromarray(np.ascontiguousarray(im[top:top + side, left:left + side]))
    return part.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def photograph(folder: Path, side: int) -> Path:
    "The photograph of scikit-learn with `side` pixels in width"
    file = original(folder)
    with Image.open(file) as im: size = side, im.size[1] * side // im.size[0]
    if side != SIDES[0]: Image.open(file).resize(size).save(file := folder / f"{side}.jpg", quality=90)
    return file


def measure(folder: Path, side: int) -> dict:
    from fastai_compile.timing import interleave, ratio
    file = photograph(folder, side)
    found = {k: f for k, (f, _, module) in DECODERS.items() if importlib.util.find_spec(module)}
    def read(f): return f(file.read_bytes(), file)
    want = pil(b"", file)
    same = {k: bool((np.asarray(read(f)) == np.asarray(want)).all() and prepared(read(f)).tobytes() == prepared(want).tobytes())
            for k, f in found.items()}
    runs = {}
    for what, then in (("decode", lambda im: im), ("decode, crop, resize", prepared)):
        times = interleave({k: lambda f=f, g=then: g(read(f)) for k, f in found.items()}, rounds=31, most=31)
        runs[what] = {k: {"ms": t.median_ms, "PIL / it": [(r := ratio(times["PIL"], t)).median, r.low, r.high]}
                      for k, t in times.items()}
    return {"width": side, "same": same, "runs": runs}


def describe(data: dict) -> str:
    "The result as Markdown"
    rows = []
    for m in data["results"]:
        for k in DECODERS:
            row = {"width": m["width"], "decoder": f"{k} {data['versions'][k]}", "PIL's pixels": m["same"].get(k, "not run")}
            for what, run in m["runs"].items():
                row[f"{what}, ms"] = f"{run[k]['ms']:.2f}" if k in run else "not installed"
                times = "{:.2f} ({:.2f} to {:.2f})".format(*run[k]["PIL / it"]) if k in run else ""
                row[f"{what}: PIL takes, times that"] = times
            rows.append(row)
    return "\n\n".join([table(rows), timed(data["run"])])


def _version(package: str, module: str) -> str:
    if not importlib.util.find_spec(module): return "not installed"
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return str(__import__(module).__version__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if importlib.util.find_spec("cv2"): __import__("cv2").setNumThreads(1)
    data = {"run": facts(), "versions": {k: _version(p, m) for k, (_, p, m) in DECODERS.items()}, "results": []}
    with tempfile.TemporaryDirectory() as tmp:
        for side in SIDES: data["results"].append(measure(Path(tmp), side))
    write(args.out, data)
    print(describe(data))
    return 0


if __name__ == "__main__": sys.exit(main())
