"""What people write today instead: an ONNX file, a runtime, PIL and numpy, as the tutorials of those runtimes show it."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MEAN, STD = np.array([.485, .456, .406], np.float32), np.array([.229, .224, .225], np.float32)


def softmax(x):
    "Rows of scores to probabilities"
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def onnx_file(model, xb: tuple, path: Path) -> Path:
    "The model as ONNX, any batch up to 64"
    batch, two = torch.export.Dim("batch", min=1, max=64), tuple(torch.cat([x, x])[:2].contiguous() for x in xb)
    with torch.no_grad():
        program = torch.export.export(model, two, dynamic_shapes=tuple({0: batch} for _ in xb), strict=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    return path


def onnxruntime_engine(file: Path, threads: int) -> Callable:
    "Arrays to arrays, by ONNX Runtime"
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *xs: session.run(None, dict(zip(names, xs, strict=True)))


def openvino_engine(file: Path, threads: int) -> Callable:
    "Arrays to arrays, by OpenVINO"
    import openvino
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(openvino.Core().read_model(file), "CPU", settings)
    request, n = model.create_infer_request(), len(model.outputs)
    def run(*xs):
        request.infer(list(xs))
        return [request.get_output_tensor(i).data for i in range(n)]
    return run


def decode(file: Path): return Image.open(file).convert("RGB")


def resize(im, size: int):
    "The middle square, scaled"
    w, h = im.size
    side = min(w, h)
    left, top = (w - side) // 2, (h - side) // 2
    return im.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


def picture(engine: Callable, file: Path, size: int) -> Callable:
    "A file to probabilities, by class or by pixel"
    def run():
        x = (np.asarray(resize(decode(file), size), dtype=np.float32) / 255 - MEAN) / STD
        return softmax(engine(np.ascontiguousarray(x.transpose(2, 0, 1)[None]))[0])[0]
    return run


def row(engine: Callable, learn, item) -> Callable:
    "A row to probabilities: look up the codes, fill the gaps, normalize the numbers"
    from fastai.tabular.all import Categorify, FillMissing, Normalize
    procs = {type(p): p for p in learn.dls.train_ds.procs.fs}
    codes = {c: {v: i for i, v in enumerate(vs)} for c, vs in procs[Categorify].classes.items()}
    gaps, norm = procs[FillMissing].na_dict, procs[Normalize]
    cats, conts = list(learn.dls.train_ds.cat_names), list(learn.dls.train_ds.cont_names)
    def run():
        flags = {f"{c}_na": item[c] != item[c] for c in gaps}
        x = np.array([[codes[c].get(flags[c] if c in flags else item[c], 0) for c in cats]], np.int64)
        nums = [((gaps[c] if item[c] != item[c] else item[c]) - norm.means[c]) / norm.stds[c] for c in conts]
        return softmax(engine(x, np.array([nums], np.float32))[0])[0]
    return run


def pairs(engine: Callable, learn, item) -> Callable:
    "Users and films to ratings"
    codes = {c: {v: i for i, v in enumerate(learn.dls.classes[c])} for c in ("user", "film")}
    rows = item.to_dict("records")
    return lambda: engine(np.array([[codes[c][r[c]] for c in codes] for r in rows], np.int64))[0]


def as_fastinference(engine: Callable, learn, kind: str, item) -> Callable:
    "The way of the package fastinference: fastai's own `test_dl` for each call, its batch to the runtime, no training loop"
    def loader():
        if kind not in ("row", "pairs"): return learn.dls.test_dl([item], num_workers=0)
        dl = learn.dls.test_dl(item.to_frame().T if kind == "row" else item)
        if dl.dataset.with_cont: dl.dataset.conts = dl.dataset.conts.astype(np.float32)
        return dl
    def run():
        xb = next(iter(loader()))
        i = learn.dls.n_inp if getattr(learn.dls, "n_inp", -1) > 0 else len(xb)
        out = engine(*[x.numpy() for x in xb[:i]])[0]
        preds = learn.loss_func.activation(torch.from_numpy(out)).numpy()
        return preds if kind == "pairs" else preds[0]
    return run
