"""A backend in a page: the PyTorch model, its images and weights kept in `channels_last` memory format.

The arithmetic is PyTorch's own and the answers are the same within rounding; on a CPU the convolutions often run faster.
"""
import copy

import torch

from fastai_compile.backends.base import Payload, Placement, Probe, backend_options, torch_threads
from fastai_compile.errors import BackendError

TARGET = "PyTorch on CPU, channels_last"


def convolutions(module):
    "The layers that gain: 2-d convolutions"
    return [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]


class Runner:
    "A list of contiguous CPU tensors in, another one out; called from many threads"
    def __init__(self, module, placement, threads):
        self.module, self.placement, self.threads = module, placement, threads

    def __call__(self, xs):
        xs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in xs]
        with torch.no_grad(), torch_threads(self.threads): return [o.contiguous() for o in self.module(*xs)]


class ChannelsLast:
    "The PyTorch model in channels_last memory format"
    name = "channels_last"  # what users write
    rewrites = ()           # equal forms of layers that this backend asks for
    shapes = "dynamic"      # one graph serves any batch
    cost = 5                # rank by compile cost: the cheap ones are tried first

    def probe(self, device):
        "Can it be used here? Cheap: no heavy import"
        return Probe(True, f"PyTorch {torch.__version__}")

    def coverage(self, captured, config):
        "What would land where, before anything is compiled"
        return Placement(TARGET, "lowered", {"channels_last": len(convolutions(captured.module))})

    def compile(self, captured, config):
        "All that `load` needs. Raises `BackendError` for a model that has nothing to gain"
        backend_options(config, self.name, ())  # it has none, so any option is refused by name
        if not convolutions(captured.module):
            raise BackendError("channels_last changes 2-d convolutions only, and this model has none: choose another backend")
        return Payload(self.name, {}, placement=self.coverage(captured, config), module=captured.module)

    def load(self, payload, device, threads):
        "A function of tensors. The weights stay as they are in the file; the copy that runs is reordered"
        module = copy.deepcopy(payload.module).to(memory_format=torch.channels_last).eval()
        kept = [m for m in convolutions(module) if m.weight.is_contiguous(memory_format=torch.channels_last)]
        lost = len(convolutions(module)) - len(kept)
        elsewhere = {"Conv2d": f"{lost} not in channels_last"} if lost else {}  # what did not land on the target, by name
        return Runner(module, Placement(TARGET, "executed", {"channels_last": len(kept)}, elsewhere), threads)
