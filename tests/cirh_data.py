"""Makes `tests/data/cirh`: a small model as Cerebras's own software lowered it, so that its lowered graph can be read everywhere.

`python tests/cirh_data.py`, where `python -m fastai_compile.worker install cerebras` was run.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn
from torch.nn import functional as F
from fastai_compile.backends.cerebras_checks import lower_program
from fastai_compile.backends.cerebras_rewrites import CEREBRAS_REWRITES
from fastai_compile.backends.cirh import without_places
from fastai_compile.rewrites import apply_rewrites

FOLDER = Path(__file__).parent / "data" / "cirh"


class Small(nn.Module):
    "A depthwise convolution, a pool, a normalization, a matrix product"
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.act = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Hardswish()
        self.scale, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
    def forward(self, x):
        x = F.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        x = self.act(self.depthwise(x)).flatten(2).mean(2)
        return self.head(self.scale(x))


def small():
    torch.manual_seed(0)
    net = Small().eval().requires_grad_(False)
    for m in (net.norm, net.scale): m.weight.uniform_(0.5, 1.5), m.bias.normal_()
    net.norm.running_mean.normal_(), net.norm.running_var.uniform_(0.5, 2)
    return net


def main():
    form, *_ = apply_rewrites(small(), CEREBRAS_REWRITES)
    with torch.no_grad(): program = torch.export.export(form, (torch.randn(2, 3, 8, 8),), strict=False)
    made = lower_program(program)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "cirh.mlir").write_text(without_places(made.text))
    info = {**made.info, "lines": [{**line, "source": ""} for line in made.info["lines"]]}
    (FOLDER / "graph.json").write_text(json.dumps(info, indent=1) + "\n")
    for name in ("graph.py", "weights.safetensors"): (FOLDER / name).write_bytes(made.files[name])
    print(made.versions, made.refused)


if __name__ == "__main__": main()
