"""Targets whose hardware is absent: a reason, a command, an error, nothing written; and what can be tested without it."""
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from fastai_compile import BackendError, BackendUnavailable, ConfigError, FallbackError
from fastai_compile.backends.base import Placement, check_placement, get_backend
from fastai_compile.backends.cuda import PRECISIONS, CudaBackend, Sized, no_gpu, on_cpu, recast, settings, sizes_up_to
from fastai_compile.backends.neuron import NeuronBackend, NeuronxBackend, buckets, product
from fastai_compile.backends.tensorrt import TensorRTBackend, _placement, census, ranges
from fastai_compile.capture import TensorSpec, capture
from fastai_compile.config import make_config
from fastai_compile.example import Example
from helpers import assert_close, needs_backend

TARGETS = ["inductor:cuda", "tensorrt", "neuron", "neuronx", "onnxruntime:cuda"]
GPU = CudaBackend().probe("cpu")


def _probe(name):
    probe = get_backend(name).probe("cpu")
    if probe.usable: pytest.skip(f"{name} can be used here: {probe.reason}")
    return probe


@pytest.mark.parametrize("name", TARGETS)
def test_export_raises_with_the_reason_and_the_command(name, artifacts, tmp_path):
    probe = _probe(name)
    assert probe.reason and probe.mend
    (tmp_path / "x.pkl").write_bytes(b"what was there")
    with pytest.raises(BackendUnavailable, match=re.escape(probe.reason)) as e:
        artifacts.learner("table").export(tmp_path / "x.pkl", compile=name)
    assert probe.mend in str(e.value)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.pkl", b"what was there")]


@pytest.mark.parametrize("name", ["inductor:cuda", "tensorrt", "neuron", "neuronx"])
def test_the_adapter_itself_refuses_too(name, cnn):
    probe, backend = _probe(name), get_backend(name)
    with pytest.raises(BackendUnavailable, match=re.escape(probe.reason)): backend.compile(cnn, make_config(name))
    coverage = backend.coverage(cnn, make_config(name))
    assert coverage.level == "lowered" and sum(coverage.operators.values()) > 3


def test_probing_starts_no_cuda():
    for name in TARGETS: get_backend(name).probe("cpu")
    assert not torch.cuda.is_initialized()


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return capture(net.eval(), Example((torch.randn(2, 3, 16, 16),), (), (torch.Tensor,), "this test", [0, 1]), 16)


# ---- CUDA

@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_precision_keeps_types_and_the_model(precision, cnn):
    program, x = recast(cnn, precision), torch.randn(5, 3, 16, 16)
    out, want = program.module()(x)[0], cnn.module(x)[0]
    assert out.dtype == torch.float32
    half = precision in ("fp16", "bf16")
    assert_close(out, want, 0.03 if half else 1e-6)
    assert torch.equal(out, want) != half
    weights = {t.data_ptr() for t in cnn.module.parameters()}
    assert weights.isdisjoint(t.data_ptr() for t in program.state_dict.values())
    assert all(p.dtype == torch.float32 for p in cnn.module.parameters())


def test_integers_are_not_cast():
    class Ids(nn.Module):
        def __init__(self): super().__init__(); self.emb = nn.Embedding(50, 4)
        def forward(self, i, x): return self.emb(i) * x, i + 1
    xs = (torch.tensor([[49], [7]]), torch.randn(2, 1, 4))
    cap = capture(Ids().eval(), Example(xs, (), (torch.Tensor,) * 2, "this test", [0, 1]), 8)
    outs = recast(cap, "bf16").module()(*xs)
    assert [o.dtype for o in outs] == [torch.float32, torch.int64] and torch.equal(outs[1], xs[0] + 1)


def test_moving_leaves_the_captured_program_where_it_is(cnn):
    from torch.export.passes import move_to_device_pass
    moved = move_to_device_pass(recast(cnn, "fp32"), "meta")
    assert {t.device.type for t in moved.state_dict.values()} == {"meta"}
    assert {t.device.type for t in cnn.program.state_dict.values()} == {"cpu"}


def test_what_the_generated_code_runs_on_the_cpu_is_named(tmp_path):
    "The notebook of the adapter reads code of the real compiler; this is its shape"
    def package(name, source):
        with zipfile.ZipFile(tmp_path / name, "w") as z: z.writestr("m/data/aotinductor/model/x.wrapper.cpp", source)
        return tmp_path / name
    kernels = 'extern "C" void cpp_fused_0(const float* in);\n    call_triton_poi_fused_add_0(a, b, stream);\n'
    assert on_cpu(package("gpu.pt2", kernels + "    aoti_torch_cuda_convolution(x, w);\n")) == {}
    left = "    cpp_fused_0(p);\n    CHECK(aoti_torch_cpu_cumsum(x, 1));\n    cpp_fused_0(q);\n"
    found = on_cpu(package("mixed.pt2", kernels + left))
    assert found == {"cpp_fused_0": "2 on the CPU", "aoti_torch_cpu_cumsum": "1 on the CPU"}
    with pytest.raises(FallbackError, match="did not land on inductor on CUDA"):
        check_placement(Placement("inductor on CUDA", "executed", {"CUDA": 3}, found))
    with pytest.raises(BackendError, match="no source"): on_cpu(package("bare.pt2", ""))


def test_batches_go_to_the_next_size():
    calls = []
    def fixed(n):
        def run(xs):
            assert len(xs[0]) == n
            calls.append(n)
            return [xs[0].cumsum(1), xs[0].new_full((), n)]
        return run
    def plain(xs):
        calls.append("plain")
        return [xs[0].cumsum(1), xs[0].new_full((), len(xs[0]))]
    def first(f): return lambda xs: f(xs)[:1]
    rows = Sized(first(plain), {n: first(fixed(n)) for n in sizes_up_to(6)}, [True])
    for n in range(1, 10):
        x = torch.randn(n, 4)
        assert torch.equal(rows([x])[0], x.cumsum(1))
    assert calls == [1, 2, 4, 4, 6, 6, "plain", "plain", "plain"]
    calls.clear()
    whole = Sized(plain, {n: fixed(n) for n in sizes_up_to(6)}, [True, False])  # one output belongs to the batch
    assert [whole([torch.randn(n, 4)])[1].item() for n in (2, 3, 4, 5)] == [2, 3, 4, 5]
    assert calls == [2, "plain", 4, "plain"]


@pytest.mark.parametrize("options,says", [
    ({"precision": "fp17"}, "Did you mean 'fp1"), ({"cuda_graphs": 1}, "True or False"), ({"graph_up_to": 65}, "0 to max_bs=64"),
    ({"graph_up_to": True}, "graph_up_to=True"), ({"settings": {"max_autotun": True}}, "Did you mean 'max_autotune'"),
    ({"graphs": True}, "has no option 'graphs'"),
], ids=str)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ConfigError, match=says): settings(make_config("inductor:cuda", options=options), "inductor:cuda", 64)


def test_a_device_file_is_no_gpu(tmp_path):
    reason, mend = no_gpu((str(tmp_path / "none"),))
    assert reason if not GPU.usable else not reason
    if not torch.cuda.device_count() and torch.version.cuda:
        assert "no NVIDIA GPU" in reason and torch.version.cuda in mend
        (tmp_path / "nvidia0").touch()
        assert "sees no GPU" in no_gpu((str(tmp_path / "nvidia0"),))[0]


@needs_backend("inductor:cuda")
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("precision,off", [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.02)])
def test_on_a_gpu_every_batch_is_right(precision, off, graphs, cnn):
    backend = CudaBackend()
    options = {"precision": precision, "cuda_graphs": graphs, "graph_up_to": 4}
    run = backend.load(backend.compile(cnn, make_config("inductor:cuda", options=options)), "cpu", 1)
    assert not run.placement.elsewhere and torch.cuda.get_device_name() in run.placement.target
    for n in (1, 2, 3, 4, 5, 16, 1):
        x = torch.randn(n, 3, 16, 16)
        assert_close(run([x])[0], cnn.module(x)[0], off)


# ---- TensorRT

class Parts(Tracer):
    def is_leaf_module(self, m, name): return "_run_on_acc" in name


class Partly(nn.Module):
    "As Torch-TensorRT leaves a graph that it could not take as a whole"
    def __init__(self):
        super().__init__()
        self._run_on_acc_0, self._run_on_gpu_1 = nn.Linear(4, 4), nn.Sequential(nn.ReLU())
    def forward(self, x): return self._run_on_gpu_1(torch.cumsum(self._run_on_acc_0(x), 1))


def test_what_stays_with_pytorch_is_found(cnn):
    parts = Partly()
    engines, loose = census(GraphModule(parts, Parts().trace(parts)))
    assert engines == 1 and any("cumsum" in k for k in loose)
    unchanged = _placement(cnn.program.graph_module, "executed")  # what comes back where TensorRT takes nothing
    assert unchanged.operators == {"TensorRT engines": 0} and "aten.conv2d.default" in unchanged.elsewhere
    with pytest.raises(FallbackError, match="conv2d"): check_placement(unchanged)


def test_both_programs_for_tensorrt_give_the_same(cnn):
    backend, config = TensorRTBackend(), make_config("tensorrt", bs=4)
    (one, first), (many, second) = backend._programs(cnn, backend._choice(config), config)
    assert first == [{"shape": (1, 3, 16, 16)}]
    assert second == [{"min_shape": (2, 3, 16, 16), "opt_shape": (4, 3, 16, 16), "max_shape": (16, 3, 16, 16)}]
    for program, n in ((one, 1), (many, 2), (many, 7)):
        x = torch.randn(n, 3, 16, 16)
        assert_close(program.module()(x)[0], cnn.module(x)[0])
    assert ranges([TensorSpec("x0", torch.float32, (None, 3), True)], 2, 64)[0]["opt_shape"] == (2, 3)
    with pytest.raises(ConfigError, match="precision='int8'"):
        backend._choice(make_config("tensorrt", options={"precision": "int8"}))


def test_the_torch_compile_route_is_not_in_the_adapter():
    import inspect
    from fastai_compile.backends import tensorrt
    assert "torch.compile(" not in inspect.getsource(tensorrt)


# ---- Neuron

def test_the_placeholder_is_recognised(monkeypatch):
    from fastai_compile.backends import neuron
    for version, says in (("1.0", "placeholder"), ("2.9.0.2.13", "the other product .PyTorch/XLA"), (None, "not installed")):
        monkeypatch.setattr(neuron, "_version", lambda v=version: v)
        assert re.search(says, NeuronBackend().probe("cpu").reason)
    monkeypatch.setattr(neuron, "_version", lambda: "2.14.3.0")
    assert "TorchNeuron" in NeuronxBackend().probe("cpu").reason and product("2.14.3.0") == "neuron"
    for b in (NeuronBackend(), NeuronxBackend()): assert "pip.repos.neuron.amazonaws.com" in b.probe("cpu").mend


def test_without_the_device_the_older_product_can_still_compile(monkeypatch):
    from fastai_compile.backends import neuron
    monkeypatch.setattr(neuron, "_version", lambda: "2.9.0.2.13")
    probe = NeuronxBackend().probe("cpu")
    assert not probe.usable and probe.level == "compiled" and "/dev/neuron0" in probe.reason


def test_neuron_batch_sizes(cnn):
    assert buckets((1, 8, 100), 64) == (1, 8, 64) and buckets((1,), 1) == (1,)
    for own in ((1, 8), (0, 64), (True, 64), (64, 65)):
        with pytest.raises(ConfigError, match="buckets="): buckets((1,), 64, own)
    with pytest.raises(ConfigError, match="target='trn'"):
        NeuronxBackend().compile(cnn, make_config("neuronx", options={"target": "trn"}))


def test_sizes_that_vary_are_refused_before_anything_else(cnn):
    from fastai_compile.errors import CaptureError
    words = SimpleNamespace(inputs=(TensorSpec("x0", torch.int64, (None, None), True, ((1, 2, 9),)),), max_bs=4)
    for b in (NeuronBackend(), NeuronxBackend()):
        with pytest.raises(CaptureError, match="x0"): b.compile(words, make_config(b.name))


# ---- prepared for a machine that has it

def test_an_onnx_file_can_be_prepared_for_a_provider(artifacts, tmp_path):
    _probe("onnxruntime:cuda")
    from fastai_compile import HostMismatch, inspect_artifact, open_learner
    learn, path = artifacts.learner("table"), tmp_path / "cuda.pkl"
    report = learn.export(path, compile="onnxruntime:cuda", level="lowered")
    assert "lowered" in repr(report)
    assert "deferred" in repr(inspect_artifact(path))
    with pytest.raises((HostMismatch, BackendUnavailable), match="onnxruntime-gpu"):
        learn2 = open_learner(path)
        learn2.model(*artifacts.learner("table").dls.valid.one_batch()[:2])
    assert open_learner(path, on_mismatch="eager").model is not None


@pytest.mark.parametrize("name", ["inductor:cuda", "tensorrt", "neuron"])
def test_what_cannot_be_prepared_says_so(name, artifacts, tmp_path):
    _probe(name)
    with pytest.raises(BackendUnavailable): artifacts.learner("table").export(tmp_path / "x.pkl", compile=name, level="lowered")
    assert not list(tmp_path.iterdir())
