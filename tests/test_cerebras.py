"""Cerebras: the lowered graph is calculated, counted and compared; what was planted in it, or lowered wrongly, is found."""
import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

import fastai_compile.backends.cerebras as adapter
import fastai_compile.backends.cerebras_checks as checks
import fastai_compile.backends.cerebras_dynamo  # noqa: F401 - the name in torch.compile
import fastai_compile.backends.cerebras_rewrites as rewrites
from cirh_data import FOLDER, Small, small
from fastai_compile import BackendError, BackendUnavailable, CaptureError, ConfigError, available_backends, open_learner
from fastai_compile.backends.base import get_backend
from fastai_compile.backends.cirh import parse_cirh, without_places
from fastai_compile.backends.cirh_run import run_cirh
from fastai_compile.capture import capture
from fastai_compile.choose import unwrap
from fastai_compile.config import make_config
from fastai_compile.example import Example
from fastai_compile.neutral import run_graph
from fastai_compile.worker_env import install_command, why_no_worker
from helpers import Files, eager_of, fresh, image_learner, run

missing = why_no_worker("cerebras")
def worker(test):
    "A test that needs the vendor's programs, in their worker"
    return pytest.mark.workers(pytest.mark.skipif(bool(missing), reason=f"{missing}: `{install_command('cerebras')}`")(test))



@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    "A machine that has a cluster is treated as one that has none"
    monkeypatch.delenv(adapter.ADDRESS, raising=False)
    monkeypatch.setattr(adapter, "CLUSTER_FILE", tmp_path / "config_v2")


def example_of(*xs): return Example(xs, (), (torch.Tensor,) * len(xs), "a test", list(range(len(xs[0]))), True)


def captured_of(net, *xs): return capture(net.eval(), example_of(*xs), rewrites=get_backend("cerebras").rewrites)


class Flat(Small):
    "A network whose one output comes in a tuple, under the names that it has itself"
    def __init__(self, net):
        super().__init__()
        self.load_state_dict(net.state_dict())
        self.eval()
    def forward(self, x): return (super().forward(x),)


def compiled(net, *xs): return get_backend("cerebras").compile(captured_of(net, *xs), make_config("cerebras"))


# ---- a stored graph, which the vendor's software made

STORED = {n: (FOLDER / n).read_bytes() for n in ("graph.py", "graph.json", "weights.safetensors")}
TEXT, INFO = (FOLDER / "cirh.mlir").read_text(), json.loads(STORED["graph.json"])
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def judge(text):
    "All the checks that a lowered graph has to pass"
    lowered = parse_cirh(text)
    checks.check_census(lowered, INFO)
    return checks.check_lowered(lowered, load(STORED["weights.safetensors"]), [[X]], lambda x: run_graph(STORED, [x]), INFO)


def test_stored_graph_gives_the_models_answers():
    want = small()(X)
    weights = {f"state.model.{n}": t for n, t in load(STORED["weights.safetensors"]).items()}
    got, = run_cirh(parse_cirh(TEXT), weights, [X])
    assert torch.allclose(got, want, atol=1e-5)
    found = judge(TEXT)
    assert found["off in fp32"] < 1e-5 < found["off in fp16"] < checks.FP16_TOLERANCE * found["largest output"]


def replaced(pattern, new):
    text, n = re.subn(pattern, new, TEXT)
    assert n, f"nothing in the stored graph looks like {pattern}"
    return text


def without(name):
    "The stored graph without one operator: what it gave is what it got"
    made, got = re.search(rf"(%\w+) = cirh\.{name} (%\w+).*\n", TEXT).groups()
    text = re.sub(rf" *{made} = .*\n", "", TEXT)
    return re.sub(rf"{made}\b", got, text)


FAULTS = {
    "a mask of ones": (replaced(r"cirh.Compare %3, %4", "cirh.Compare %3, %3"), "other answers"),
    "a mask of another kind": (replaced('"EQ"', '"GE"'), "other answers"),
    "a missing stride": (replaced(r"strides = dense<\[1, 1, 1, 2, 2\]>", "strides = dense<1>"), "lowered wrongly"),
    "a pool of another kind": (replaced('"MAX"', '"AVERAGE"'), "other answers"),
    "a dropped bias": (without("BiasAdd"), "does not use 1 of the"),
    "a dropped normalization": (without("LayerNorm"), "does not use 2 of the"),
    "a dropped activation": (without("Relu"), "other answers"),
    "a swapped scale and shift": (replaced("%arg8, %arg9 {eps", "%arg9, %arg8 {eps"), "other answers"),
    "another epsilon": (replaced("9.99999974E-6", "1.0E-1"), "other answers"),
    "an unknown operator": (replaced("cirh.Relu", "cirh.Mystery"), "cannot be calculated here"),
    "an unknown attribute": (replaced("is_training = false", "is_training = false, mystery = 1 : i64"), "unexpected keyword"),
    "an unknown type": (replaced("tensor<2x3x8x8xf32>", "tensor<2x3x8x8xq4>"), "not known"),
    "an empty file": ("", "empty"),
    "a cut file": (TEXT[:TEXT.index("cirh.Convolution") + 60], "cut off|cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    text, says = FAULTS[fault]
    with pytest.raises(BackendError, match=says): judge(text)


def test_fault_behind_a_scale_near_zero_is_found():
    weights = load(STORED["weights.safetensors"])
    weights["depthwise.bias"], weights["scale.weight"] = torch.zeros(8), torch.full((8,), 1e-6)
    assert list(checks.raised_scales(weights)) == ["scale.weight"]
    net = small()
    net.load_state_dict(weights, strict=False)
    for text, found in ((TEXT, False), (FAULTS["a mask of ones"][0], True)):
        lowered = parse_cirh(text)
        checks.check_lowered(lowered, weights, [[X]], lambda x: (net(x),), INFO)  # sees neither
        if not found: checks.check_behind_scales(lowered, weights, [X], Flat(net), INFO)
        else:
            with pytest.raises(BackendError, match="raised"):
                checks.check_behind_scales(lowered, weights, [X], Flat(net), INFO)


def test_places_are_taken_out():
    text = TEXT + '#loc1 = loc("a"("secret/graph.py":3:0))\n'
    assert "secret" not in without_places(text) and parse_cirh(without_places(text)).census() == parse_cirh(TEXT).census()


def test_the_layer_that_loses_most_in_fp16_is_named():
    "Scales that only fp16 cannot hold: far beyond its largest number, and near enough to it to round away the rest"
    lowered, weights = parse_cirh(TEXT), load(STORED["weights.safetensors"])
    stem = next(o for o in lowered.operations if o.name == "Convolution") # places are taken out of the stored graph
    placed = [dataclasses.replace(o, line=INFO["lines"][0]["line"]) if o is stem else o for o in lowered.operations]
    lowered = dataclasses.replace(lowered, operations=placed)
    weights["stem.weight"] = weights["stem.weight"] * 1e6
    weights["norm.running_var"] = weights["norm.running_var"] * 1e12
    net = Flat(small())
    net.load_state_dict(weights, strict=False)
    said = r"rounded to fp16.*\. Most is lost at Convolution \(layer stem .*: 0.00% becomes inf%"
    with pytest.raises(BackendError, match=said):
        checks.check_lowered(lowered, weights, [[X]], net, INFO)
    named = {f"state.model.{n}": t for n, t in load(STORED["weights.safetensors"]).items()}
    said = checks.lost_at(lowered, named, [X], INFO["lines"])
    assert re.fullmatch(r"Most is lost at \w+.*: 0\.\d\d% becomes 0\.\d\d%", said), said


def test_fp16_loss_of_the_model_itself_is_told():
    class Large(nn.Module):
        def forward(self, x): return ((x * 1e4 + 1e3).exp2().log2() - 1e3,)
    net, x = nn.Linear(3, 2).eval(), torch.full((2, 3), 300.)
    assert checks.lost_in_fp16(lambda_module(net), [x], (net(x),)) < 1
    assert not checks.lost_in_fp16(lambda_module(Large()), [x], Large()(x)) < 1


def lambda_module(net):
    "A module that gives a tuple"
    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, *xs):
            out = self.net(*xs)
            return out if isinstance(out, tuple) else (out,)
    return Tuple()


# ---- equal forms

def test_wrong_mask_never_leaves_capture(monkeypatch):
    monkeypatch.setattr(rewrites, "block_mask", lambda weight, groups: torch.ones(()))
    with pytest.raises(CaptureError, match="cerebras_dense_conv"):
        captured_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("layer", [
    nn.Conv1d(6, 4, 3, groups=2), nn.Conv2d(6, 12, (3, 1), groups=6, stride=2, padding="valid"),
    nn.Conv3d(4, 4, 2, groups=2, dilation=2),
    nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d((3, 2), (2, 1), (1, 0), count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True, divisor_override=3),
    nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 2, 1, ceil_mode=True), nn.PixelShuffle(2), nn.Hardswish(),
    nn.Hardsigmoid()],
    ids=lambda m: re.sub(r"\W+", " ", str(m)))
def test_equal_form(layer):
    size = (2, 12 if isinstance(layer, nn.PixelShuffle) else getattr(layer, "in_channels", 5), 9, 8, 7)
    dims = {nn.Conv1d: 3, nn.Conv3d: 5}.get(type(layer), 4)
    x = torch.randn(size[:dims])
    captured = captured_of(nn.Sequential(layer), x)
    assert len(captured.rewrites) == 1
    with torch.no_grad(): assert torch.allclose(captured.module(x)[0], layer(x), atol=1e-5)
    if names := list(nn.Sequential(layer).state_dict()): assert list(captured.module.model.state_dict()) == names


def test_layers_of_another_forward_stay():
    class Own(nn.Conv2d):
        def forward(self, x): return super().forward(x) * 2
    assert not captured_of(nn.Sequential(Own(4, 4, 3, groups=4)), torch.randn(2, 4, 5, 5)).rewrites


def test_arithmetic_is_counted():
    xs = torch.randn(2, 8, 6, 6)
    captured = captured_of(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), xs)
    assert rewrites.count_macs(captured.fixed(2)) == (2 * 64 * 9 * 16, 2 * 8 * 9 * 16)


# ---- what the machine lacks

def test_probe_names_what_is_missing(monkeypatch):
    probe = get_backend("cerebras").probe("cpu")
    assert not probe.usable and "mgmt_address" in probe.reason and probe.level == ("" if missing else "lowered")
    assert (install_command("cerebras") if missing else adapter.ADDRESS) in probe.mend
    assert any(r["backend"] == "cerebras" for r in available_backends())
    monkeypatch.setenv(adapter.ADDRESS, "cluster:443")
    assert get_backend("cerebras").probe("cpu").usable == (not missing)


def test_without_a_worker(monkeypatch):
    monkeypatch.setattr(adapter, "why_no_worker", lambda name: "the cerebras worker is not installed")
    captured, backend = captured_of(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)), get_backend("cerebras")
    assert backend.probe("cpu").level == ""
    for f in (backend.compile, backend.coverage):
        with pytest.raises(BackendUnavailable, match="worker install cerebras"): f(captured, make_config("cerebras"))


def test_buckets_are_checked():
    captured = captured_of(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    backend = get_backend("cerebras")
    assert backend._buckets(captured, make_config("cerebras", options={"buckets": [8, 1]})) == (1, 8)
    for options, says in (({"buckets": [1000]}, "max_bs"), ({"bucket": [1]}, "buckets")):
        with pytest.raises(ConfigError, match=says): backend._buckets(captured, make_config("cerebras", options=options))


# ---- torch.compile

def test_the_articles_lines():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    wrapped = torch.compile(net, backend="cerebras", mode="reduce-overhead")
    assert unwrap(wrapped)[:2] == (net, "cerebras")
    with pytest.raises(BackendUnavailable, match=f"mgmt_address.*{adapter.ADDRESS}"): wrapped(torch.randn(2, 3))
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(BackendUnavailable):
        torch.compile(nn.Linear(3, 2), backend="cerebras", options={"buckets": [1]})(torch.randn(2, 3))


def test_the_name_costs_no_import():
    said = fresh("""
import fastai.vision.all
brought = set(sys.modules) # torchvision brings torch._dynamo
import fastai_compile.backends.cerebras, fastai_compile.backends.cerebras_dynamo
before = [m for m in ('torch._dynamo', 'cerebras', 'safetensors') if m in set(sys.modules) - brought]
import torch
torch.compile(torch.nn.Linear(2, 2), backend='cerebras')
answer([before, 'cerebras' in torch._dynamo.list_backends(), len([f for f in sys.meta_path if 'cerebras' in type(f).__module__])])
""")
    assert said == [[], True, 0]


# ---- the vendor's software

@worker
def test_lowered_and_checked():
    captured = captured_of(small(), X)
    payload = get_backend("cerebras").compile(captured, make_config("cerebras", options={"buckets": [1, 4]}))
    assert payload.placement.level == "lowered" and payload.buckets == (1, 4)
    assert payload.choices["off in fp32"] < 1e-5 and payload.choices["functions changed"] == {"max_pool2d: explicit stride": 1}
    assert captured.rewrites == {"cerebras_dense_conv": 1, "cerebras_hardswish": 1}
    text = payload.files["batch4/cirh.mlir"].numpy().tobytes().decode()
    assert "tensor<4x3x8x8xf32>" in text and "/" not in re.sub(r"->", "", text)
    with pytest.raises(BackendUnavailable, match="mgmt_address"): get_backend("cerebras").load(payload, "cpu", 1)


class Unfolds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x): return F.unfold(self.conv(x), 2).sum(1)


@worker
def test_refusal_names_layer_and_line():
    with pytest.raises(BackendError, match=r"im2col\S* in 1 \(Unfolds\).*test_cerebras\.py"):
        compiled(nn.Sequential(nn.ReLU(), Unfolds()), X)


@worker
@pytest.mark.parametrize("call, says", [
    (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "other answers"),
    (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), "lowered wrongly")], ids=["count_include_pad", "ceil_mode"])
def test_what_the_vendor_lowers_wrongly_is_found(call, says):
    class Calls(nn.Module):
        def forward(self, x): return call(x).flatten(1)
    with pytest.raises(BackendError, match=says): compiled(Calls(), X)


@worker
@pytest.mark.parametrize("call, says", [
    (lambda x: F.max_pool2d(x, 2).flatten(1), "lowered wrongly"),
    (lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2).flatten(1), "Cerebras refuses")],
    ids=["stride", "pixel_shuffle"])
def test_without_our_forms_it_is_found(call, says, monkeypatch):
    monkeypatch.setattr(checks, "plain_calls", lambda program: {})
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
        def forward(self, x): return call(self.conv(x))
    with pytest.raises(BackendError, match=says): compiled(Calls(), X)


# ---- a file

@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    from helpers import make_images
    return image_learner(make_images(tmp_path_factory.mktemp("images")), epochs=0)


@worker
def test_file_for_a_cluster(learn, tmp_path):
    path = tmp_path / "model.pkl"
    old, learn.model = learn.model, torch.compile(learn.model, backend="cerebras", mode="reduce-overhead")
    try:
        with pytest.raises(BackendUnavailable, match="mgmt_address"): learn.export(path, compile=True)
        assert not Files.of(tmp_path).found
        report = learn.export(path, compile="cerebras", level="lowered")
    finally: learn.model = old
    assert report.backend == "cerebras" and "not run" in str(report)
    with pytest.raises(BackendUnavailable, match="mgmt_address"): open_learner(path)
    eager, xs = open_learner(path, on_mismatch="eager").model.eval(), X.repeat(1, 1, 4, 4)
    assert torch.equal(run(eager, [xs]), run(eager_of(learn), [xs]))
