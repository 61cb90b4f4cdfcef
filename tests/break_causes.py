"""What makes dynamo leave a graph: one small layer for each cause, `# here` on the line at fault."""
import copy
import inspect
import logging
import random
import threading
import time
import traceback
import warnings

import numpy as np
import torch
from fastai.torch_core import TensorImage
from torch import nn

log = logging.getLogger("break_causes")
seen = []


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.found, self.kept, self.calls = nn.Linear(4, 4), {}, [], 0


class Print(Layer):
    def forward(self, x):
        x = self.lin(x)
        print("shape", x.shape)  # here
        return x


class Item(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x * x.sum().item()  # here


class Tolist(Layer):
    def forward(self, x):
        rows = x.sum(1).tolist()  # here
        return self.lin(x) + len(rows)


class FloatOf(Layer):
    def forward(self, x):
        scale = float(x.max())  # here
        return self.lin(x) * scale


class Branch(Layer):
    def forward(self, x):
        x = self.lin(x)
        if x.sum() > 0:  # here
            x = x + 1
        return x


class WhileLoop(Layer):
    def forward(self, x):
        x = self.lin(x)
        while x.abs().max() > 1:  # here
            x = x / 2
        return x


class Numpy(Layer):
    def forward(self, x):
        x = self.lin(x)
        order = np.random.default_rng(0).permutation(4)  # here
        return x[:, torch.as_tensor(order)]


class NumpyRound(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x + torch.from_numpy(np.round(x.detach().numpy()))  # here


class Nonzero(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x + x.nonzero().shape[1]  # here


class MaskedSelect(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x + x[x > 0].sum()  # here


class Unique(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x + torch.unique(x.round()).sum()  # here


class DictSideEffect(Layer):
    def forward(self, x):
        x = self.lin(x)
        self.found["last"] = x.detach()  # here
        return x


class ListSideEffect(Layer):
    def forward(self, x):
        x = self.lin(x)
        self.kept.append(x.mean())  # here
        return x


class GlobalSideEffect(Layer):
    def forward(self, x):
        x = self.lin(x)
        seen.append(x.shape[0])  # here
        return x


class TryExcept(Layer):
    def forward(self, x):
        try:
            return self.lin(x).view(3, 5)  # here
        except RuntimeError:
            return self.lin(x)


class Logging(Layer):
    def forward(self, x):
        x = self.lin(x)
        log.info("mean of %s", x.shape)  # here
        return x


class Warn(Layer):
    def forward(self, x):
        x = self.lin(x)
        warnings.warn("seldom", stacklevel=1)  # here
        return x


class Random(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x * random.random()  # here


class RandomChoice(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x * random.choice([1.0, 2.0])  # here


class RandomGauss(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x * random.gauss(0, 1)  # here


class Deepcopy(Layer):
    def forward(self, x):
        x = self.lin(x)
        return copy.deepcopy(x) + 1  # here


class DeepcopyLayer(Layer):
    def forward(self, x):
        other = copy.deepcopy(self.lin)  # here
        return other(x)


def _report(module, args, out):
    print("hook", out.shape)  # here


class Hook(Layer):
    source = _report
    def __init__(self):
        super().__init__()
        self.lin.register_forward_hook(_report)
    def forward(self, x): return self.lin(x)


class TensorHook(Layer):
    def forward(self, x):
        x = self.lin(x)
        if x.requires_grad: x.register_hook(lambda g: g * 2)  # here
        return x


class Builtin(Layer):
    def forward(self, x):
        x = self.lin(x)
        return x + (id(seen) % 2)  # here


class Input(Layer):
    def forward(self, x):
        x = self.lin(x)
        scale = eval("2 + 0")  # here
        return x * scale


class Open(Layer):
    def forward(self, x):
        x = self.lin(x)
        with open("/dev/null") as f:  # here
            return x + len(f.read())


class Clock(Layer):
    def forward(self, x):
        start = time.perf_counter()  # here
        return self.lin(x) + 0 * start


class Lock(Layer):
    def forward(self, x):
        lock = threading.Lock()  # here
        with lock: return self.lin(x)


class Traceback(Layer):
    def forward(self, x):
        x = self.lin(x)
        self.where = traceback.extract_stack()[-1].name  # here
        return x


class Seed(Layer):
    def forward(self, x):
        x = self.lin(x)
        torch.manual_seed(1)  # here
        return x + torch.rand_like(x)


class Subclass(Layer):
    def forward(self, x):
        x = TensorImage(x)  # here
        return self.lin(x).as_subclass(torch.Tensor)


class Backward(Layer):
    def forward(self, x):
        with torch.enable_grad():
            y = (self.lin(x)**2).sum()
            y.backward()  # here
        return self.lin(x)


class Disabled(Layer):
    @torch._dynamo.disable
    def secret(self, x): return x + 1
    def forward(self, x):
        x = self.lin(x)
        return self.secret(x)  # here


class LoopPrint(Layer):
    def forward(self, x):
        for i in range(3):
            x = self.lin(x)
            print("step", i)  # here
        return x


class Generator(Layer):
    def forward(self, x):
        x = self.lin(x)
        g = torch.Generator().manual_seed(1)  # here
        return x + torch.rand(x.shape, generator=g)


class Lstm(Layer):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)
    def forward(self, x): return self.rnn(x[:, None])[0][:, 0]  # here


class Grow(Layer):
    "Not a break: a Python number that guards were made for"
    def forward(self, x):
        self.calls += 1  # here
        return self.lin(x) * self.calls


# cause -> layer, and PyTorch's code on torch 2.15; None: it does not break there
CAUSES = {k: v for k, v in globals().items() if inspect.isclass(v) and issubclass(v, Layer) and v is not Layer}


class Block(nn.Module):
    def __init__(self, culprit):
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(4, 4), culprit)
    def forward(self, x): return self.steps(x).relu()


class Model(nn.Module):
    "The culprit sits at `body.1.steps.1`"
    def __init__(self, culprit):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), Block(culprit)), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.body(x))


PATH = "body.1.steps.1"


def line_of(cls):
    "(file, line) of the line marked `# here`"
    lines, first = inspect.getsourcelines(vars(cls).get("source", cls))
    return __file__, first + next(i for i, line in enumerate(lines) if "# here" in line)
