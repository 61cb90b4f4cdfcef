"""OpenVINO, ExecuTorch, a plain ONNX file, Core ML: what each does wrong in silence, provoked with the real package."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.vision.all import nn

from fastai_compile import BackendError, BackendUnavailable, ConfigError, FallbackError, VerificationError
from fastai_compile.backends import coreml, executorch, inductor, onnx_file, openvino
from fastai_compile.backends.base import check_placement, get_backend
from fastai_compile.backends.nan import keep_nan, nan_rows
from fastai_compile.capture import capture
from fastai_compile.config import make_config
from fastai_compile.example import Example
from helpers import assert_close, eager_of, fresh, items_of

RUN = ["openvino", "executorch"]
ALL = [*RUN, "openvino:gpu", "openvino:npu", "onnx", "coreml"]


def backend_of(name, level="compiled"):
    "The adapter, or a skip with the reason of its probe"
    b = get_backend(name)
    p = b.probe("cpu")
    if not p.usable and (level == "executed" or not p.level): pytest.skip(f"{name}: {p.reason} ({p.mend})")
    return b


def captured_of(model, *xs, max_bs=20):
    torch.manual_seed(0)
    return capture(model.eval(), Example(xs, (), (torch.Tensor,) * len(xs), "a test", [0, 1]), max_bs)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture(scope="module")
def net(): return captured_of(small_net(), torch.randn(2, 3, 16, 16))


_made = {}


def payload_of(name, cap):
    if name not in _made: _made[name] = backend_of(name).compile(cap, make_config(name))
    return _made[name]


class Svd(nn.Module):
    def forward(self, x): return torch.linalg.svdvals(x)


class Two(nn.Module):
    "Whole numbers and fp32 in; a view of an input, a number of the batch and whole numbers out"
    def forward(self, a, x): return x[:, :2], (x * 2).relu(), a + 1


# ---- probes

def test_probing_loads_nothing():
    code = """
import sys, time
from fastai_compile.backends import coreml, executorch, onnx_file, openvino
from fastai_compile.backends.base import get_backend
start = time.perf_counter()
probes = [get_backend(n).probe('cpu') for n in {names}]
heavy = [m for m in ('openvino', 'executorch', 'coremltools', 'onnx', 'onnxruntime') if m in sys.modules]
answer([heavy, [[p.usable, p.reason, p.mend, p.level] for p in probes]])
"""
    heavy, probes = fresh(code.format(names=ALL))
    assert not heavy
    for usable, reason, mend, level in probes:
        assert reason and (usable or mend) and level in ("", "lowered", "compiled")
        assert not (usable and level)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_package_is_named(name, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: None)
    p = get_backend(name).probe("cpu")
    assert not p.usable and not p.level and "not installed" in p.reason and "pip install" in p.mend


# ---- numbers

@pytest.mark.parametrize("name", RUN)
def test_every_batch_agrees_with_eager(name, net):
    run = backend_of(name, "executed").load(payload_of(name, net), "cpu", 2)
    assert run.placement.level == "executed" and not run.placement.elsewhere
    for n in (1, 2, 3, 15, 16, 20):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad(): assert_close(run([x])[0], net.module(x)[0])


@pytest.mark.parametrize("name", RUN)
def test_types_views_and_several_outputs(name):
    b, cap = backend_of(name, "executed"), captured_of(Two(), torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 4))
    run = b.load(b.compile(cap, make_config(name, allow_fallback=())), "cpu", 1)
    a, x = torch.arange(9).reshape(3, 3), torch.randn(3, 4)
    kept = x.clone()
    outs = run([a, x])
    for got, want in zip(outs, cap.module(a, x), strict=True): assert got.dtype == want.dtype and torch.equal(got, want)
    for o in outs: o.add_(7)
    assert torch.equal(x, kept) and torch.equal(run([a, x])[2], a + 1), "an output shares memory with an input or a later call"


@pytest.mark.parametrize("name", RUN)
def test_many_threads(name, net):
    run, wrong = backend_of(name, "executed").load(payload_of(name, net), "cpu", 1), []
    def work(seed):
        x = torch.randn(1 + seed % 5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(): want = net.module(x)[0]
        for _ in range(10):
            if not torch.allclose(run([x])[0], want, atol=1e-5): wrong.append(seed)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)


@pytest.mark.parametrize("name", RUN)
def test_a_nan_stays_one_and_an_infinity_passes(name, net):
    run = backend_of(name, "executed").load(payload_of(name, net), "cpu", 1)
    x = torch.randn(4, 3, 16, 16)
    x[2, 0, 3, 3] = float("nan")
    got = run([x])[0]
    assert got[2].isnan().all() and not got[[0, 1, 3]].isnan().any()


def test_nan_rows():
    a, b = torch.zeros(3, 2), torch.tensor([[1], [2], [3]])
    assert nan_rows([a, b]) is None
    a[0, 0], a[1, 1] = float("inf"), -float("inf")
    assert nan_rows([a, b]) is None
    a[1, 0] = float("nan")
    assert nan_rows([a, b]).tolist() == [False, True, False]
    rows, whole, ints = keep_nan([a, b], [torch.zeros(3, 1), torch.zeros(()), torch.zeros(3, dtype=torch.int64)])
    assert rows.isnan().flatten().tolist() == [False, True, False] and whole.isnan() and not ints.any()


@pytest.mark.parametrize("name", RUN)
def test_two_models_with_other_thread_counts(name, net):
    "ExecuTorch's pool belongs to the process: replacing it under a loaded method ends the process, unless it is loaded again"
    b, payload, x = backend_of(name, "executed"), payload_of(name, net), torch.randn(5, 3, 16, 16)
    with torch.no_grad(): want = net.module(x)[0]
    one, two = b.load(payload, "cpu", 1), b.load(payload, "cpu", 2)
    for run in (one, two, one, one, two): assert_close(run([x])[0], want)


# ---- refusals

@pytest.mark.parametrize("name", [n for n in ALL if not n.endswith("pu")])
def test_a_refused_operator_is_named_before_compiling(name):
    b, cap = backend_of(name), captured_of(Svd(), torch.randn(2, 3, 3), max_bs=4)
    placement = b.coverage(cap, make_config(name))
    assert any("svd" in op for op in placement.elsewhere) and placement.level == "lowered"
    with pytest.raises(BackendError, match="svd"): b.compile(cap, make_config(name))


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_option_is_refused(name, net):
    with pytest.raises(ConfigError, match="no option 'speed'"):
        backend_of(name).compile(net, make_config(name, options={"speed": 1}))


@pytest.mark.parametrize("name", RUN)
def test_a_damaged_payload_is_a_typed_error(name, net):
    b, payload = backend_of(name, "executed"), payload_of(name, net)
    for k, t in payload.files.items():
        broken = dict(payload.files)
        broken[k] = t[:t.numel() // 2]
        with pytest.raises(BackendError): b.load(type(payload)(name, broken, payload.tensors, placement=payload.placement,
                                                               choices=payload.choices), "cpu", 1)


# ---- OpenVINO

def test_openvino_auto_falls_back_in_silence_and_we_do_not(net):
    b = backend_of("openvino", "executed")
    payload = payload_of("openvino", net)
    core = openvino._openvino().Core()
    constants = openvino._openvino().Tensor(openvino._joined(payload))
    model = core.read_model(payload.files["model.xml"].numpy().tobytes(), constants)
    missing = [d for d in ("GPU", "NPU") if d not in [o.split(".")[0] for o in core.available_devices]]
    if not missing: pytest.skip("this machine has every device of OpenVINO")
    silent = core.compile_model(model, "AUTO")
    assert silent.get_property("EXECUTION_DEVICES") == ["CPU"]
    for device in missing:
        with pytest.raises(FallbackError, match=f"asked for {device} and chose"): openvino._landed(silent, device)
        gpu = get_backend(f"openvino:{device.lower()}")
        assert not gpu.probe("cpu").usable and gpu.probe("cpu").level == "lowered"
        prepared = gpu.compile(net, make_config(gpu.name))
        assert prepared.placement.level == "lowered"
        with pytest.raises(BackendUnavailable, match=f"no {device}"): gpu.load(prepared, "cpu", 1)
    assert b.load(payload, "cpu", 1).placement.target == "openvino on CPU"


def test_openvino_refuses_another_precision(net):
    b = backend_of("openvino", "executed")
    low = b.compile(net, make_config("openvino", options={"properties": {"INFERENCE_PRECISION_HINT": "bf16"}}))
    with pytest.raises(FallbackError, match="bf16"): b.load(low, "cpu", 1)
    assert not b.load(payload_of("openvino", net), "cpu", 1).placement.elsewhere


def test_openvino_holds_weights_once(net):
    payload = payload_of("openvino", net)
    own = {t.data_ptr() for t in net.eager.state_dict().values()}
    assert payload.tensors and {t.data_ptr() for t in payload.tensors.values()} <= own
    shared = sum(t.nbytes for t in payload.tensors.values())
    whole = openvino._joined(payload)
    assert len(whole) == payload.files["model.bin"].numel() + shared


def test_openvino_takes_text_through_onnx():
    backend_of("openvino", "executed")
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
    from fastai.text.models.core import get_text_classifier
    config = {**awd_lstm_clas_config, "emb_sz": 12, "n_hid": 16, "n_layers": 2}
    torch.manual_seed(0)
    model, x = get_text_classifier(AWD_LSTM, 40, 2, config=config), torch.randint(2, 40, (2, 20))
    x[1, :7] = 1
    cap, b = captured_of(model, x, max_bs=4), get_backend("openvino")
    payload = b.compile(cap, make_config("openvino"))
    assert payload.choices["converted from"] == "ONNX" and "mkldnn_rnn_layer" in payload.choices["why ONNX"]
    with pytest.raises(BackendError, match="fixed sizes"): get_backend("openvino:npu").compile(cap, make_config("openvino:npu"))
    run = b.load(payload, "cpu", 1)
    for n in (1, 2, 4):
        xs = x.repeat(2, 1)[:n]
        with torch.no_grad(): assert_close(run([xs])[0], cap.module(xs)[0])


def test_openvino_is_imported_without_its_telemetry(tmp_path):
    backend_of("openvino")
    code = """
from fastai_compile.backends import openvino
ours = openvino._openvino()
import sys
from pathlib import Path
answer(['openvino_telemetry' in sys.modules, (Path.home()/'intel').exists(), hasattr(ours, 'Core')])
"""
    assert fresh(code, env={"HOME": str(tmp_path)}) == [False, False, True]


TWO_CORES = '''
import os, signal, torch
from torch import nn
from fastai_compile.backends.base import get_backend
from fastai_compile.backends.openvino import _openvino
from fastai_compile.capture import capture
from fastai_compile.config import make_config
from fastai_compile.example import Example
xs = (torch.ones(2, 3),)
b, cap = get_backend("openvino"), capture(nn.Linear(3, 2).eval(), Example(xs, (), (torch.Tensor,), "a test", [0, 1]), 4)
payload = b.compile(cap, make_config("openvino"))
def ours(): return b.load(payload, "cpu", 1)
xml, rest = payload.files["model.xml"].numpy().tobytes(), _openvino().Tensor(payload.files["model.bin"].numpy())
def theirs(): return (core := _openvino().Core()), core.compile_model(core.read_model(xml, rest), "CPU")
def comes_and_goes(make):
    first, second = make(), make()
    del first
    del second
    try: signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt: return "interrupted"
answer(comes_and_goes(ours))
answer(comes_and_goes(theirs))
'''


def test_openvino_leaves_a_process_that_the_next_signal_ends_and_we_do_not():
    "Two cores that go in the order in which they came, then a Ctrl-C: by us an interrupt, by plain OpenVINO the end"
    backend_of("openvino", "executed")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    code = "def answer(o): print('ANSWER', o, flush=True)\n" + TWO_CORES
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=300)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers[:1] == ["ANSWER interrupted"], done.stderr[-2000:]
    if done.returncode == 0: pytest.skip("this OpenVINO survives two cores too")
    assert done.returncode == -signal.SIGSEGV and len(answers) == 1


FORKS = """
import os, signal, threading, time, torch
from fastai_compile import CompileError
from fastai_compile.backends import openvino
from fastai_compile.backends.base import get_backend
payload, x, want = torch.load({path!r}, weights_only=False)
b, stop, calls = get_backend("openvino"), [], [0, 0, 0]
run = b.load(payload, "cpu", 2)
def ended(pid, seconds=20):
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"
def forked():
    "A child that loads the model itself, as `CompiledModel` does"
    pid = os.fork()
    if pid: return pid
    torch.set_num_threads(1)
    try: os._exit(0 if torch.allclose(b.load(payload, "cpu", 1)([x])[0], want, atol=1e-4) else 3)
    except CompileError as e: print(e, flush=True); os._exit(4)
    except BaseException as e: print(repr(e), flush=True); os._exit(5)
def work(k):
    while not stop:
        if k < 2: run([x])
        else: b.load(payload, "cpu", 1)
        calls[k] += 1
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    "Code that has loaded a model whose calls take a while, with functions that fork"
    b, path, x = backend_of("openvino", "executed"), tmp_path_factory.mktemp("forks") / "model", torch.randn(64, 3)
    if not hasattr(os, "fork"): pytest.skip("this system has no fork")
    model = nn.Sequential(nn.Linear(3, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    cap = captured_of(model, x, max_bs=64)
    with torch.no_grad(): torch.save((b.compile(cap, make_config("openvino")), x, model(x)), path)
    return FORKS.format(path=str(path))


@pytest.mark.parametrize("kinds", ["call", "call and load"])
def test_openvino_forked_while_threads_are_inside_hangs_in_no_child(forks, kinds):
    "OpenVINO keeps locks while it runs, and the child would wait for a thread that it does not have; 4 is a typed error"
    ends, calls = fresh(forks + f"""
threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in {[0, 1, 2] if "load" in kinds else [0, 1]}]
for t in threads: t.start()
ends = []
for i in range(12):
    time.sleep(0.01)
    ends.append(ended(forked()))
    if ends[-1] == "hangs": break
before = list(calls)
time.sleep(1)
more = [now - then for now, then in zip(calls, before)]
stop.append(1)
for t in threads: t.join(60)
answer([ends, more])
""")
    assert len(ends) == 12 and set(ends) <= {0, 4} and ends.count(0) > 6, ends
    assert all(calls[:2 if kinds == "call" else 3]), "the parent's threads stand still after a fork"


def test_openvino_calls_run_side_by_side(forks):
    "Each waits inside for the other"
    assert fresh(forks + """
both = threading.Barrier(2, timeout=30)
def inside():
    with openvino._Fork():
        both.wait()
        with openvino._Fork(): run([x])
threads = [threading.Thread(target=inside) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join(60)
answer([both.broken, [t.is_alive() for t in threads], len(openvino._Fork.inside), len(openvino._Fork.forking)])
""") == [False, [False, False], 0, 0]


def test_openvino_forked_inside_a_call_does_not_wait_for_itself(forks):
    "As a signal handler may do; two threads at once, each within a call of its own, a third one goes on calling"
    res = fresh(forks + """
third = threading.Thread(target=work, args=(0,), daemon=True)
third.start()
both, ends = threading.Barrier(2, timeout=30), []
def inside():
    with openvino._Fork():
        both.wait()
        pid = forked()
    ends.append(ended(pid))
threads = [threading.Thread(target=inside, daemon=True) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join(60)
stop.append(1)
third.join(60)
answer([ends, third.is_alive(), len(openvino._Fork.inside), len(openvino._Fork.forking), ended(forked())])
""")
    assert res == [[0, 0], False, 0, 0, 0]


def test_openvino_forked_in_the_middle_of_a_long_call_raises_in_the_child(forks):
    "Where the fork would wait too long: the child gets an error, and does not hang"
    code = forks + """
openvino._Fork.wait_s = 0.2
inside, go_on = threading.Event(), threading.Event()
def long():
    with openvino._Fork():
        inside.set()
        go_on.wait(60)
t = threading.Thread(target=long, daemon=True)
t.start()
inside.wait(30)
pid = os.fork()
if not pid:
    said = []
    for f in (lambda: b.load(payload, "cpu", 1), lambda: run([x])):
        try: f()
        except CompileError as e: said.append(f'{type(e).__name__}: {e}')
    answer(said)
    os._exit(0)
end = ended(pid)
go_on.set()
t.join(30)
run([x]) # The parent goes on
answer([end, ended(forked())])
"""
    code = "import json\ndef answer(o): print('ANSWER ' + json.dumps(o), flush=True)\n" + code
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=300)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert done.returncode == 0 and len(answers) == 2, done.stdout + done.stderr[-2000:]
    said, ends = answers
    assert len(said) == 2 and all(s.startswith("BackendError: openvino: this process was forked") and "spawn" in s for s in said)
    assert ends == [0, 0]


def test_openvino_forked_while_its_threads_do_not_rest_raises_in_the_child(forks):
    "After a call OpenVINO's own threads are on their way out for a moment, with locks of their own"
    code = """
import torch
from fastai_compile.backends import openvino
def seen(wanted, seconds=60):
    end = time.time() + seconds
    while openvino._asleep() != wanted and time.time() < end: time.sleep(0.001)
    return openvino._asleep() == wanted or time.time() < end
torch.set_num_threads(2)
many, x2 = [], torch.randn(1500, 1500)
def multiply():
    while not many: x2 @ x2
t = threading.Thread(target=multiply, daemon=True)
t.start()
looks = [seen(False)]
many.append(1)
t.join(60)
looks.append(seen(True))
torch.set_num_threads(1)
before = ended(forked())
openvino._asleep, stock = (lambda: False), openvino._asleep
torn = ended(forked())
openvino._asleep = stock
answer([looks, before, torn, ended(forked())])
"""
    assert fresh(forks + code) == [[True, True], 0, 4, 0]


# ---- ExecuTorch

class MadeKernel(nn.Module):
    "A convolution whose weights depend on the input"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
    def forward(self, x):
        kernel = x.mean((0, 2, 3))[None, :, None, None].expand(8, -1, 3, 3)
        return self.head(nn.functional.conv2d(x, kernel).mean((2, 3)))


class NothingToDelegate(nn.Module):
    def forward(self, x): return x.cumsum(1)


def test_executorch_runs_slow_kernels_in_silence_and_we_do_not():
    b, cap = backend_of("executorch", "executed"), captured_of(MadeKernel(), torch.randn(2, 3, 8, 8), max_bs=4)
    run = b.load(b.compile(cap, make_config("executorch")), "cpu", 1)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad(): assert_close(run([x])[0], cap.module(x)[0])
    assert run.placement.operators["XNNPACK"] and "convolution" in run.placement.elsewhere
    with pytest.raises(FallbackError, match="convolution"): check_placement(run.placement)
    check_placement(run.placement, ("convolution",))


@pytest.mark.parametrize("version, usable", [("2.11.0", False), ("2.9.1", False), ("2.15.0", True), ("2.12.0a0", True)])
def test_executorch_beside_a_torch_that_it_fails_with(version, usable, monkeypatch):
    backend_of("executorch")
    monkeypatch.setattr(executorch, "torch_version", lambda: version)
    p = get_backend("executorch").probe("cpu")
    assert p.usable == usable and (usable or f"torch {version}" in p.reason and "--upgrade torch" in p.mend)


def test_executorch_with_nothing_for_xnnpack_is_a_fallback():
    b, cap = backend_of("executorch", "executed"), captured_of(NothingToDelegate(), torch.randn(2, 3), max_bs=4)
    placement = b.coverage(cap, make_config("executorch"))
    assert placement.operators["XNNPACK"] == 0 and "cumsum" in placement.elsewhere


def test_executorch_alone_stops_at_15_rows():
    "The range that its lowering of a batch norm loses, with the real package: put back by us"
    b, net = backend_of("executorch", "executed"), captured_of(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), torch.randn(2, 3))
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    with torch.no_grad(): edge = to_edge_transform_and_lower(net.program, partitioner=[XnnpackPartitioner()])
    size = executorch._batch_of(edge.exported_program())
    upper = size.node.shape_env.var_to_range[size.node.expr].upper
    if upper == net.max_bs: pytest.skip("this executorch keeps the range")
    assert upper < net.max_bs
    run, x = b.load(b.compile(net, make_config("executorch")), "cpu", 1), torch.randn(net.max_bs, 3)
    with torch.no_grad(): assert_close(run([x])[0], net.module(x)[0])


def test_executorch_refuses_more_rows_than_planned(net):
    run = backend_of("executorch", "executed").load(payload_of("executorch", net), "cpu", 1)
    with pytest.raises(BackendError, match="21"): run([torch.randn(21, 3, 16, 16)])


# ---- the plain ONNX file

def test_onnx_file_describes_itself(net):
    payload = payload_of("onnx", net)
    import onnx
    described = get_backend("onnx").describe(payload, {"task": "classification", "vocabulary": ["a", "b"]})
    proto = onnx.load_from_string(described.files["model.onnx"].numpy().tobytes())
    onnx.checker.check_model(proto, full_check=True)
    props = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(props["vocabulary"]) == ["a", "b"] and json.loads(props["batch"]) == [1, 20]
    assert list(json.loads(props["inputs"]).values()) == [{"dtype": "float32", "shape": ["batch", 3, 16, 16]}]
    assert not any(i.external_data for i in proto.graph.initializer), "the weights belong inside"
    text = described.files["model.onnx"].numpy().tobytes()
    assert str(Path(__file__).parent.parent).encode() not in text, "a path of this machine is in the file"


def test_onnx_file_with_wrong_numbers_is_refused(net):
    import onnx
    from onnx import numpy_helper
    data = payload_of("onnx", net).files["model.onnx"].numpy().tobytes()
    assert onnx_file.check_file(data, net, None) < 1e-5
    proto = onnx.load_from_string(data)
    weight = next(i for i in proto.graph.initializer if len(i.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 0.5, weight.name))
    with pytest.raises(VerificationError, match="off by"): onnx_file.check_file(proto.SerializeToString(), net, None)


def test_onnx_file_above_the_limit_is_refused(net, monkeypatch):
    monkeypatch.setattr(onnx_file, "_LIMIT", 1000)
    with pytest.raises(BackendError, match="onnxruntime"): backend_of("onnx").compile(net, make_config("onnx"))


def test_onnx_file_is_not_run_by_us(net):
    payload = payload_of("onnx", net)
    with pytest.raises(BackendUnavailable, match="compile='onnxruntime'"): get_backend("onnx").load(payload, "cpu", 1)


def test_onnx_export_writes_one_plain_file(artifacts, tmp_path):
    import onnxruntime as ort
    backend_of("onnx")
    learn = artifacts.learner("table")
    learn.export(tmp_path / "model.onnx", compile="onnx", level="compiled")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    xs = [x.as_subclass(torch.Tensor).contiguous() for x in learn.dls.valid.one_batch()[:2]]
    got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), xs)})[0]
    with torch.no_grad(): assert_close(torch.from_numpy(got), eager_of(learn)(*xs))
    with pytest.raises(ConfigError, match=r"\.onnx"): learn.export(tmp_path / "model.pkl", compile="onnx", level="compiled")


# ---- inductor

CUSTOM = '''
import torch
@torch.library.custom_op("fastai_compile_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor: return torch.from_numpy(x.numpy() * 2)
@double.register_fake
def _(x): return torch.empty_like(x)
'''


class Doubles(nn.Module):
    def forward(self, x): return torch.ops.fastai_compile_tests.double(x.relu()) + 1


def test_inductor_calls_python_in_silence_and_we_do_not(tmp_path):
    "An operator of the user's own, which calculates in Python"
    exec(CUSTOM, {})
    b, cap = backend_of("inductor", "executed"), captured_of(Doubles(), torch.randn(2, 3), max_bs=4)
    found = b.coverage(cap, make_config("inductor")).elsewhere
    payload = b.compile(cap, make_config("inductor", options={"freezing": False}))
    run, x = b.load(payload, "cpu", 1), torch.randn(4, 3)
    with torch.no_grad(): assert_close(run([x])[0], cap.module(x)[0])  # it works, and nothing said that this is not compiled
    op = "fastai_compile_tests.double.default"
    assert list(run.placement.elsewhere) == [op] == list(found)
    assert list(get_backend("inductor:cuda").coverage(cap, make_config("inductor:cuda")).elsewhere) == [op]
    with pytest.raises(FallbackError, match=f"{op}: a custom operator"): check_placement(run.placement)
    check_placement(run.placement, (op,))
    torch.save(payload, tmp_path / "payload.pt")
    code = f'''
import torch
from fastai_compile.backends.base import get_backend
from fastai_compile import BackendError
import fastai_compile
payload = torch.load({str(tmp_path / "payload.pt")!r}, weights_only=False)
x = torch.ones(1, 3)
def opened():
    try: return get_backend("inductor").load(payload, "cpu", 1)([x])[0].tolist()
    except BackendError as e: return str(e)
before = opened()
exec({CUSTOM!r})
answer([before, opened()])
'''
    before, after = fresh(code)
    assert "fastai_compile_tests::double" in before and after == [[3., 3., 3.]]


def test_inductor_on_a_cpu_leaves_cuda_graphs_out_in_silence_and_we_do_not(net):
    "`mode='reduce-overhead'` changes nothing on a CPU; an export for the CPU that asks for it is refused"
    torch._dynamo.reset()
    from torch._dynamo.utils import counters
    counters.clear()
    linear = torch.compile(nn.Linear(3, 2).eval(), mode="reduce-overhead")
    with torch.no_grad(), warnings.catch_warnings(record=True) as told: linear(torch.ones(2, 3))
    print(dict(counters['inductor']), [str(w.message)[:100] for w in told])
    assert counters["inductor"]["cudagraph_skips"] == 1 and not [w for w in told if "graph" in str(w.message).lower()]
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match="CUDA graphs, and nothing on a CPU"):
        backend_of("inductor", "executed").compile(net, make_config("inductor", options={"mode": "reduce-overhead"}))


def _left(folder): return sorted(p.name for p in folder.iterdir() if p.name.startswith(inductor._PREFIX))


def _stale(path):
    path.mkdir()
    (path / "model.so").touch()
    os.utime(path, (0, 0))


def test_inductor_sweeps_what_a_dead_process_of_the_same_number_left(tmp_path, monkeypatch):
    "In a container every server has the number 1: only a lock that ends with its process tells the dead from the living"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, other = (tmp_path / f"{inductor._PREFIX}{n}-left" for n in (os.getpid(), 999_999_999))
    foreign = tmp_path / f"{inductor._PREFIX}apart-left"
    for folder in (ours, other, foreign): _stale(folder)
    with inductor._folder() as living:
        os.utime(living, (0, 0))
        with inductor._folder() as young: assert _left(tmp_path) == sorted(p.name for p in (living, young, foreign))
        assert _left(tmp_path) == sorted([living.name, foreign.name])
    assert _left(tmp_path) == [foreign.name]
    (tmp_path / f"{inductor._PREFIX}{os.getpid()}-young").mkdir()
    inductor._sweep()
    assert f"{inductor._PREFIX}{os.getpid()}-young" in _left(tmp_path), "another process may be about to lock it"


HELD = """
import os, sys, time
from fastai_compile.backends import inductor
with inductor._folder() as folder:
    os.utime(folder, (0, 0))
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_inductor_sweeps_a_killed_process_and_not_a_living_one(tmp_path, monkeypatch):
    if sys.platform != "linux": pytest.skip("inductor compiles on Linux only")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", HELD], env=env, stdout=subprocess.PIPE, text=True)
    try:
        name = run.stdout.readline().strip()
        inductor._sweep()
        assert _left(tmp_path) == [name]
    finally:
        run.kill()
        run.wait(60)
        run.stdout.close()
    inductor._sweep()
    assert _left(tmp_path) == []


def test_inductor_compiles_in_a_folder_that_is_swept_after_a_kill(net, tmp_path, monkeypatch):
    b, seen, stock = backend_of("inductor", "executed"), [], torch._inductor.aoti_compile_and_package
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    def spy(program, package_path, **kwargs):
        seen.append(Path(package_path).parent)
        return stock(program, package_path=package_path, **kwargs)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", spy)
    b.compile(net, make_config("inductor", options={"freezing": False}))
    assert [p.name.startswith(f"{inductor._PREFIX}{os.getpid()}-") and p.parent == tmp_path for p in seen] == [True]
    assert _left(tmp_path) == []


def test_inductor_without_a_temporary_folder_names_tmpdir(net, monkeypatch):
    b = backend_of("inductor", "executed")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    with pytest.raises(BackendError, match="(?s)temporary folder, and that failed.*TMPDIR"):
        b.compile(net, make_config("inductor", options={"freezing": False}))


def test_inductor_does_not_blame_the_folder_for_other_errors(net, monkeypatch):
    def broken(*args, **kwargs): raise OSError("the compiler is gone")
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    with pytest.raises(BackendError, match="could not compile the graph: OSError: the compiler is gone$"):
        backend_of("inductor", "executed").compile(net, make_config("inductor", options={"freezing": False}))


# ---- Core ML

def test_coreml_converts_with_its_batch_range_in_fp32(net):
    payload = payload_of("coreml", net)
    about = coreml._spec({k: t.numpy().tobytes() for k, t in payload.files.items()}).description
    image = about.input[0].type.multiArrayType
    assert payload.placement.level == "compiled" and image.dataType == image.FLOAT32
    assert [(r.lowerBound, r.upperBound) for r in image.shapeRange.sizeRanges] == [(1, 20), (3, 3), (16, 16), (16, 16)]
    weights = next(t for k, t in payload.files.items() if k.endswith("weight.bin")).numpy().tobytes()
    assert dict(net.eager.named_parameters())["7.weight"].detach().numpy().tobytes() in weights


def test_coreml_rounds_to_fp16_in_silence_and_we_do_not(net):
    "coremltools makes fp16 of fp32 unless it is told: the weights of the package, and an option that would do it"
    b, payload = backend_of("coreml"), payload_of("coreml", net)
    weight = dict(net.eager.named_parameters())["7.weight"].detach()
    assert (weight.half().float() - weight).abs().max() > 0
    def held(files):
        return [any(w.numpy().tobytes() in f for k, f in files if k.endswith("weight.bin")) for w in (weight, weight.half())]
    with torch.no_grad(), coreml._silent(), tempfile.TemporaryDirectory() as folder:
        import coremltools as ct
        model = ct.convert(coreml._aten(net), convert_to="mlprogram", minimum_deployment_target=ct.target.macOS14,
                           skip_model_load=True)
        model.save(f"{folder}/stock.mlpackage")
        stock = [(p.name, p.read_bytes()) for p in Path(folder).rglob("*") if p.is_file()]
    assert held(stock) == [False, True] and held([(k, t.numpy().tobytes()) for k, t in payload.files.items()]) == [True, False]
    with pytest.raises(ConfigError, match="no option 'compute_precision'"):
        b.compile(net, make_config("coreml", options={"compute_precision": "FLOAT16"}))


def test_coreml_counts_in_32_bits_and_says_so():
    assert coreml._given(torch.tensor([2**31 - 1, -2**31])).tolist() == [2**31 - 1, -2**31]
    assert coreml._given(torch.zeros(0, dtype=torch.int64)).dtype == "int32"
    with pytest.raises(BackendError, match="32 bits.*2147483648"): coreml._given(torch.tensor([1, 2**31]))


def test_coreml_opens_on_a_mac_only(net):
    if sys.platform == "darwin": pytest.skip("this is a Mac")
    payload = payload_of("coreml", net)
    with pytest.raises(BackendUnavailable, match="macOS only"): get_backend("coreml").load(payload, "cpu", 1)


def test_coreml_options_are_checked(net):
    for bad in ({"compute_units": "GPU"}, {"minimum_deployment_target": "macOS1"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            backend_of("coreml").compile(net, make_config("coreml", options=bad))


def test_coreml_export_writes_a_package(artifacts, tmp_path):
    backend_of("coreml")
    artifacts.learner("table").export(tmp_path / "model.mlpackage", compile="coreml", level="compiled")
    assert [p.name for p in tmp_path.iterdir()] == ["model.mlpackage"]
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert "model.mlpackage/Manifest.json" in found and not any("debug" in n for n in found)


# ---- real files

OPEN = """
from fastai_compile.backends import {module}
from fastai.vision.all import *
from fastai.tabular.all import *
learn = load_learner({path!r})
learn.remove_cb(ProgressCallback)
items = pd.read_pickle({items!r})
preds = learn.get_preds(dl=learn.dls.test_dl(items, num_workers=0))[0]
answer([preds.tolist(), str(learn.model.placement), len(learn.predict(items.iloc[0] if hasattr(items, 'iloc') else items[0]))])
"""


@pytest.mark.parametrize("name,kind", [("openvino", "image"), ("executorch", "table")])
def test_a_file_opens_in_a_fresh_process(name, kind, artifacts, tmp_path):
    backend_of(name, "executed")
    made = artifacts(name, kind)
    items = items_of(kind, made.learn.path)
    pd.to_pickle(items, tmp_path / "items")
    preds, placement, n = fresh(OPEN.format(module=name, path=str(made.path), items=str(tmp_path / "items")))
    with made.learn.no_bar(): want = made.learn.get_preds(dl=made.learn.dls.test_dl(items, num_workers=0))[0]
    assert torch.allclose(torch.tensor(preds), want.as_subclass(torch.Tensor), atol=1e-5) and n == 3
    assert placement.startswith(f"{name} ") and "executed" in placement
