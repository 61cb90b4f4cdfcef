"""How far models get on Cerebras without a cluster: lowered by the vendor's own software, and their numbers calculated.

ConvNeXt-Base is trained for two epochs and goes through `learn.export`. The weights of the others are random, and their batch
normalizations get the statistics of a few images. Where the worker is missing:
`python -m fastai_compile.worker install cerebras`.
"""
import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from fastai.vision.all import densenet121, resnet18, resnet50, xresnet18
from fastai_compile import CompileError
from fastai_compile.backends.base import register_backend
from fastai_compile.backends.cerebras import CerebrasBackend
from fastai_compile.backends.cerebras_rewrites import count_macs
from fastai_compile.backends.cirh import parse_cirh
from fastai_compile.capture import capture
from fastai_compile.config import make_config
from fastai_compile.example import example_batch
from fastai_compile.worker_env import worker_info
from benchmarks.common import RESULTS, child_env, facts, parse, table, where, write
from benchmarks.families_data import build, classifier

OUT = RESULTS / "cerebras.json"
TRAINED = "convnext_base at 224", "mobilenetv3_large, trained" # through `vision_learner`, and exported
# name: (architecture, pixels). None: a learner of `families_data`
MODELS = {
    "convnext_base at 224": ("convnext_base", 224), "resnet18": (resnet18, 64), "resnet50": (resnet50, 64),
    "densenet121": (densenet121, 64), "vit_tiny": ("vit_tiny_patch16_224", 224), "efficientnet_b0": ("efficientnet_b0", 64),
    "mobilenetv3_large": ("mobilenetv3_large_100", 64), "mobilenetv3_large, trained": ("mobilenetv3_large_100", 64),
    "xresnet18": (xresnet18, 65), "regnety_004": ("regnety_004", 64),
    "resnext50": ("resnext50_32x4d", 64), "convnextv2_nano": ("convnextv2_nano", 64),
    "mobilenetv2": ("mobilenetv2_100", 64), "resnet18 at 224": (resnet18, 224),
    "unet_learner": (None, "unet"), "tabular_learner": (None, "tabular_classification"), "collab_learner": (None, "collab_nn"),
}


def learner(name, folder):
    arch, size = MODELS[name]
    return build(size, folder) if arch is None else classifier(arch, folder, size)


@torch.no_grad()
def settle(model, xb):
    """Statistics of `xb` in every batch normalization, and random scales and shifts. Small scales and positive shifts: the
    freshly made network doubles any rounding every few layers, which a trained one does not"""
    for p in model.parameters(): # Layer scales start at 1e-6: whole blocks would not count, and no error in them would show
        if p.ndim == 1 and p.numel() and 0 < p.abs().max() < 1e-3: p.uniform_(0.1, 0.3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None
        m.reset_running_stats()
        if m.affine:
            m.weight.uniform_(0.3, 0.6)
            m.bias.uniform_(0.2, 0.6)
    model.train()
    model(*xb)
    for m, v in zip(norms, momentum):
        m.momentum = v
        # The features of a few images through random weights hardly differ: divided by that, any rounding would be large
        m.running_var.copy_(torch.maximum(m.running_var, (m.running_mean * 0.3) ** 2))
    model.eval()


def lower(name):
    "One model, from its learner to numbers"
    torch.manual_seed(0)
    backend, config = CerebrasBackend(), make_config("cerebras")
    with tempfile.TemporaryDirectory() as folder:
        learn = learner(name, Path(folder))
        if name in TRAINED: return exported(learn, Path(folder) / "model.pkl")
        example = example_batch(learn, bs=8)
    settle(learn.model, example.xb)
    two = replace(example, xb=tuple(x[:2].contiguous() for x in example.xb), rows=example.rows[:2])
    return lowered(backend, config, learn.model, two)


class Keeping(CerebrasBackend):
    "Remembers what it made: a file for the cluster opens there only"
    def compile(self, captured, config):
        self.made = super().compile(captured, config)
        return self.made


def exported(learn, path):
    "Trained, then `learn.export`: the article's own case"
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    start, backend = time.perf_counter(), register_backend(Keeping())
    row = facts_of(learn.model, capture(learn.model, example_batch(learn), rewrites=backend.rewrites))
    try: learn.export(path, compile="cerebras", level="lowered")
    except CompileError as e: return row | refused(e, start)
    return row | {"trained": True, "mb": path.stat().st_size / 1e6} | reached(backend.made, start)


def lowered(backend, config, model, example):
    start = time.perf_counter()
    captured = capture(model, example, rewrites=backend.rewrites)
    row = facts_of(model, captured)
    try: return row | reached(backend.compile(captured, config), start)
    except CompileError as e: return row | refused(e, start)


def facts_of(model, captured):
    done, plain = count_macs(captured.fixed(1))
    return {"parameters": sum(p.numel() for p in model.parameters()), "rewrites": captured.rewrites, "macs": plain,
            "macs_factor": done / max(1, plain)}


def refused(e, start): return {"level": "", "refused": str(e), "seconds": time.perf_counter() - start}


def reached(payload, start):
    c, text = payload.choices, payload.files["batch1/cirh.mlir"].numpy().tobytes().decode()
    census = parse_cirh(text).census()
    return {"level": payload.placement.level, "refused": "", "weights": len(payload.tensors),
            "operators": sum(census.values()), "census": census, "functions_changed": c["functions changed"],
            "off_fp32": c["off in fp32"], "off_fp16": c["off in fp16"],
            "largest_output": c["largest output"], "seconds": time.perf_counter() - start}


def _of_largest(row, key): return f"{row[key] / max(row['largest_output'], 1e-9):.1e}" if key in row else ""


def _line(name, r):
    forms = {**r.get("rewrites", {}), **r.get("functions_changed", {})}
    return {"model": name, "level": r["level"] or "refused", "off in fp32, of the largest output": _of_largest(r, "off_fp32"),
            "in fp16": _of_largest(r, "off_fp16"), "arithmetic": f"x{r['macs_factor']:.1f}" if "macs_factor" in r else "",
            "equal forms": ", ".join(f"{k.removeprefix('cerebras_')} {v}" for k, v in forms.items()),
            "weights": r.get("weights", ""), "operators": r.get("operators", ""), "seconds": f"{r['seconds']:.0f}",
            "refused": r["refused"][:500]}


def describe(data):
    "The table of a result"
    rows = [_line(name, r) for name, r in data["models"].items()]
    trained = " and ".join(f"`{name}`" for name, r in data["models"].items() if r.get("trained"))
    made = f"Trained for two epochs by `vision_learner` and written by `learn.export`: {trained}. The others have random weights."
    worker = ", ".join(f"{k} {v}" for k, v in data["run"]["worker"].items())
    return "\n\n".join([table(rows), made, f"Lowered with {worker}. The last run: {where(data['run'])}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS),
                        help="what is not run keeps its last result")
    parser.add_argument("--one", help=argparse.SUPPRESS) # one model in this process, its row on the last line
    args = parse(parser, OUT, describe)
    if args is None: return 0
    warnings.simplefilter("ignore")
    if args.one: return print("ROW" + json.dumps(lower(args.one))) or 0
    data = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    data["run"] = facts() | {"worker": (worker_info("cerebras") or {"versions": {}})["versions"]}
    for name in args.models:
        told = {k: data["run"][k] for k in ("date", "commit", "command")}
        data["models"][name] = in_a_process(name) | {"run": told | {"versions": data["run"]["worker"]}}
        data["models"] = {k: data["models"][k] for k in MODELS if k in data["models"]}
        write(args.out, data)
        print(name, data["models"][name]["level"] or data["models"][name]["refused"][:200], flush=True)
        gc.collect()
    print(describe(data))
    return 0


def in_a_process(name):
    "A process for each model: what one of them leaves in memory is gone before the next"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, env=child_env())
    rows = [l[3:] for l in done.stdout.splitlines() if l.startswith("ROW")]
    if rows: return json.loads(rows[-1])
    return {"level": "", "refused": (done.stderr.strip().splitlines() or ["?"])[-1][:600], "seconds": time.perf_counter() - start}


if __name__ == "__main__": sys.exit(main())
