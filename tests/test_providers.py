"""ONNX Runtime's other providers: the silent ways to the CPU with the real package, and ours raising."""
import dataclasses
import importlib.util
import platform
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastai_compile.backends.base import check_placement, get_backend
from fastai_compile.backends.onnxruntime import OnnxRuntimeBackend
from fastai_compile.backends.providers import (PROVIDERS, Provider, ProviderBackend, _proto, assigned, installed, profiles,
                                               without_batch_arithmetic)
from fastai_compile.capture import TensorSpec, capture
from fastai_compile.config import make_config
from fastai_compile.errors import BackendError, BackendUnavailable, ConfigError, FallbackError
from fastai_compile.example import Example
from helpers import assert_close, needs_backend

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install 'fastai_compile[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is missing: pip install 'fastai_compile[onnx]'")
AZURE = "AzureExecutionProvider"  # in the stock wheel: it calls a web service, and computes no operator
needs_azure = pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason=f"this onnxruntime has no {AZURE}")


def captured(net, *xs, max_bs=16):
    return capture(net.eval(), Example(xs, (), (torch.Tensor,) * len(xs), "this test", [0, 1]), max_bs)


def small(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return captured(small(), torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def payload(cnn):
    "What every provider makes of it, but TensorRT, which adds its profile"
    return get_backend("onnxruntime:cuda").compile(cnn, make_config("onnxruntime:cuda"))


def allowing(payload, *ops): return dataclasses.replace(payload, choices={**payload.choices, "allowed_on_cpu": ops})


@pytest.fixture(scope="module")
def azure(): return ProviderBackend(Provider("azure", AZURE, "onnxruntime", "no machine", 19))


def plain_session(payload, provider, **entries):
    "As anybody would open it"
    so = ort.SessionOptions()
    so.log_severity_level = 4
    for k, v in entries.items(): so.add_session_config_entry(f"session.{k}", v)
    values = [ort.OrtValue.ortvalue_from_numpy(t.detach().numpy()) for t in payload.tensors.values()]
    if values: so.add_external_initializers(list(payload.tensors), values)
    return ort.InferenceSession(payload.files["model.onnx"].numpy().tobytes(), so, providers=[provider])


ABSENT = [p for p in PROVIDERS.values() if p.provider not in ort.get_available_providers() and not p.plugin]


@pytest.mark.parametrize("provider", ABSENT, ids=lambda p: p.name)
def test_an_absent_provider_runs_on_the_cpu_unless_we_open_it(provider, payload):
    backend = get_backend(f"onnxruntime:{provider.name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert plain_session(payload, provider.provider).get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(BackendUnavailable, match=f"would run this model on the CPU.*{re.escape(provider.provider)}"):
        backend.load(payload, "cpu", 1)


@needs_azure
def test_a_provider_that_takes_nothing_is_named_first_and_computes_nothing(payload, azure):
    session = plain_session(payload, AZURE, record_ep_graph_assignment_info="1")
    assert session.get_providers()[0] == AZURE and set(assigned(session)) == {"CPUExecutionProvider"}
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        plain_session(payload, AZURE, disable_cpu_ep_fallback="1")
    with pytest.raises(FallbackError, match="Conv: 1 on CPUExecutionProvider"): azure.load(payload, "cpu", 1)


@needs_azure
def test_only_operators_allowed_by_name_may_stay(cnn, payload, azure):
    assert not payload.choices["allowed_on_cpu"]
    ops = sorted({n.op_type for n in _proto(payload).graph.node} - {"Constant"})
    run = azure.load(allowing(payload, *ops), "cpu", 1)
    assert set(run.placement.elsewhere) <= set(ops) and AZURE not in run.placement.operators
    check_placement(run.placement, ops)
    x = torch.randn(3, 3, 16, 16)
    assert_close(run([x])[0], cnn.module(x)[0])
    run = azure.load(allowing(payload, "Conv"), "cpu", 1)
    with pytest.raises(FallbackError, match="Gemm"): check_placement(run.placement, ["Conv"])


@needs_azure
def test_the_retry_of_the_python_class_is_off(payload, azure):
    assert plain_session(payload, AZURE)._enable_fallback
    assert not azure.load(allowing(payload, "Conv"), "cpu", 1).session._enable_fallback


@pytest.mark.parametrize("name", [f"onnxruntime:{n}" for n in PROVIDERS])
def test_the_probe_says_what_is_missing_and_what_to_do(name):
    probe = get_backend(name).probe("cpu")
    if probe.usable: pytest.skip(f"{name} is usable here: {probe.reason}")
    assert probe.reason and get_backend(name).provider.hardware in probe.mend
    assert not get_backend(name).provider.package or "pip install" in probe.mend
    assert probe.level == "lowered"


def test_the_installed_distribution_is_read_without_an_import(tmp_path, monkeypatch):
    assert installed()[1] == ort.__version__
    folder = tmp_path / "fakeruntime" / "capi"
    folder.mkdir(parents=True)
    (folder / "build_and_package_info.py").write_text("package_name = 'onnxruntime-openvino'\n__version__ = '1.24.1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("fakeruntime") == ("onnxruntime-openvino", "1.24.1") and installed("no_such_package") == ("", "")


def test_an_unknown_option_is_refused(cnn):
    with pytest.raises(ConfigError, match="has no option 'providers'.*Did you mean 'provider'"):
        get_backend("onnxruntime:cuda").compile(cnn, make_config("onnxruntime:cuda", options={"providers": {}}))


def test_tensorrt_gets_its_profile(cnn):
    backend = get_backend("onnxruntime:tensorrt")
    opts = backend.compile(cnn, make_config(backend.name, bs=(1, 4))).choices["options"]["provider"]
    assert opts["trt_profile_min_shapes"].endswith(":1x3x16x16") and opts["trt_profile_max_shapes"].endswith(":16x3x16x16")
    assert opts["trt_profile_opt_shapes"].endswith(":4x3x16x16")
    words = TensorSpec("x0", torch.int64, (None, None), True, ((1, 16, 512),))
    assert profiles(["ids"], [words], 8)["trt_profile_max_shapes"] == "ids:8x512"


# ---- the reshapes

class TwoFree(nn.Module):
    "Both sizes of the reshape follow the input: nothing may be fixed"
    def forward(self, x): return x.reshape(x.shape[0], 2, x.shape[1] // 2).transpose(1, 2).reshape(x.shape[0] * 2, -1).sum(1)


class Grouped(nn.Module):
    def forward(self, x):
        n = x.shape[0]
        x = x.reshape(n, 4, 2, 9).transpose(1, 2).reshape(n, 8, 3, 3)
        return x.flatten(1) @ torch.ones(72, 3) + torch.arange(3)


def on_cpu(proto, payload, x):
    so = ort.SessionOptions()
    so.log_severity_level = 4
    values = [ort.OrtValue.ortvalue_from_numpy(t.detach().numpy()) for t in payload.tensors.values()]
    if values: so.add_external_initializers(list(payload.tensors), values)
    session = ort.InferenceSession(proto.SerializeToString(), so, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))


@pytest.mark.parametrize("net,shape,gone", [(small(), (3, 16, 16), True), (Grouped(), (8, 3, 3), True), (TwoFree(), (8,), False)],
                         ids=["cnn", "grouped", "two free sizes"])
def test_reshapes_without_arithmetic_give_the_same(net, shape, gone):
    import onnx
    cap = captured(net, torch.randn(2, *shape))
    payload = OnnxRuntimeBackend().compile(cap, make_config("onnxruntime"))
    before, after = _proto(payload), without_batch_arithmetic(_proto(payload))
    assert "Shape" in [n.op_type for n in before.graph.node]
    if gone: assert "Shape" not in [n.op_type for n in after.graph.node]
    if not payload.tensors: onnx.checker.check_model(after)
    for n in (1, 2, 7):
        x = torch.randn(n, *shape)
        assert torch.equal(on_cpu(after, payload, x), on_cpu(before, payload, x))
        assert_close(on_cpu(after, payload, x), cap.module(x)[0])


# ---- a provider that needs no special hardware, where it is installed

class Det(nn.Module):
    def forward(self, x): return torch.linalg.det(x.reshape(-1, 2, 2))


@needs_backend("onnxruntime:openvino")
def test_openvino_runs_everything_or_nothing(cnn):
    backend = get_backend("onnxruntime:openvino")
    run = backend.load(backend.compile(cnn, make_config(backend.name)), "cpu", 1)
    assert set(run.placement.operators) == {"OpenVINOExecutionProvider"} and not run.placement.elsewhere
    for n in (1, 2, 7, 16):
        x = torch.randn(n, 3, 16, 16)
        assert_close(run([x])[0], cnn.module(x)[0])
    with pytest.raises(BackendError): run([torch.randn(2, 3, 16, 17)])
    odd = captured(Det(), torch.randn(2, 4))
    with pytest.raises(FallbackError, match="Det: 1 on CPUExecutionProvider"):
        backend.load(backend.compile(odd, make_config(backend.name)), "cpu", 1)
    allowed = backend.load(backend.compile(odd, make_config(backend.name, allow_fallback=["Det"])), "cpu", 1)
    x = torch.randn(3, 4)
    assert_close(allowed([x])[0], Det()(x))
    check_placement(allowed.placement, ["Det"])


QNN = importlib.util.find_spec("onnxruntime_qnn")


@pytest.mark.skipif(QNN is None, reason="onnxruntime_qnn is missing: pip install onnxruntime-qnn")
def test_a_plugin_without_its_device_takes_nothing(payload):
    if get_backend("onnxruntime:qnn").probe("cpu").usable: pytest.skip(f"{platform.machine()} may have a Snapdragon's processor")
    with pytest.raises(FallbackError, match="Conv: 1 on CPUExecutionProvider"):
        get_backend("onnxruntime:qnn").load(payload, "cpu", 1)


def test_a_plugin_needs_its_processor():
    if platform.machine() in PROVIDERS["qnn"].machines: pytest.skip(f"QNN is for {platform.machine()}")
    assert f"this is {platform.machine()}, not aarch64" in get_backend("onnxruntime:qnn").probe("cpu").reason
