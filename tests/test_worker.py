"""Workers: what a child in another interpreter may do wrong, and that nothing of it is left running."""
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fastai_compile.backends.xla  # noqa: F401 - registers its targets
import fastai_compile.worker_env as worker_env
from fastai_compile import BackendError, BackendUnavailable, CompileConfig, ConfigError, FallbackError
from fastai_compile.backends.base import get_backend
from fastai_compile.capture import Flat, capture, structure_of
from fastai_compile.example import Example
from fastai_compile.model import CompiledModel
from fastai_compile.neutral import graph_files, run_graph
from fastai_compile.worker import Session, main, run_job
from fastai_compile.worker_env import (Stack, find_python, install_command, install_worker, list_workers, remove_worker, stacks,
                                       why_no_worker, worker_python)
from helpers import items_of

HERE = Path(sys.executable)


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / f"script{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return path
    return write


def needs(name):
    why = why_no_worker(name)
    return pytest.mark.skipif(bool(why), reason=f"{why}: `{install_command(name)}`")


def gone(*pids, within=60):
    "Whether all these processes end in time"
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(_runs(p) for p in pids): return True
        time.sleep(0.05)
    return False


def _runs(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


# ---- jobs

ECHO = """
import json, sys
folder = sys.argv[1]
job = json.load(open(folder + '/job.json'))
data = [open(folder + '/' + n, 'rb').read() for n in job['names']]
import os; os.makedirs(folder + '/out/deep')
open(folder + '/out/deep/all', 'wb').write(b''.join(data))
json.dump({'job': job, 'path': sys.path, 'argv': sys.argv}, open(folder + '/result.json', 'w'))
"""


def test_job(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    big = tmp_path / "big"
    big.write_bytes(b"x" * 1000)
    done = run_job(HERE, script(ECHO), {"names": ["a", "in/b"], "π": [1.5, None]}, {"a": b"\0\1", "in/b": big})
    assert done.files == {"deep/all": b"\0\1" + b"x" * 1000} and done.result["job"]["π"] == [1.5, None] and done.seconds > 0
    assert str(tmp_path) not in done.result["path"], "the parent's PYTHONPATH or the script's folder reached the child"
    assert not Path(done.result["argv"][1]).exists(), "the job's folder was left"


def test_job_names_stay_in_their_folder(script):
    with pytest.raises(BackendError, match="no name of a file"): run_job(HERE, script("pass"), {}, {"../evil": b""})


HANG = """
import os, subprocess, sys, time
other = subprocess.Popen(['sleep', '1000'])
open({pids!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}')
print('compiling layer 3', flush=True)
time.sleep(1000)
"""


def test_a_hanging_job_is_ended_with_all_it_started(script, tmp_path):
    pids = tmp_path / "pids"
    with pytest.raises(BackendError, match=r"did not finish in 2 s(?s:.*)compiling layer 3"):
        run_job(HERE, script(HANG.format(pids=str(pids))), {}, timeout_s=2)
    assert gone(*map(int, pids.read_text().split()))


def test_what_a_finished_job_started_is_ended(script, tmp_path):
    pids = tmp_path / "pids"
    text = HANG.format(pids=str(pids)).replace("time.sleep(1000)", "open(sys.argv[1] + '/result.json', 'w').write('{}')")
    assert run_job(HERE, script(text), {}).result == {}
    assert gone(int(pids.read_text().split()[1]))


@pytest.mark.parametrize("text,says", [
    ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
    ("import os; os.kill(os.getpid(), 6)", "died of SIGABRT"),
    ("import os; os.kill(os.getpid(), 9)", "SIGKILL.*frees memory"),
    ("x = bytearray(4 << 30)", "ran out of memory .its limit was 300 MB"),
    ("raise KeyError('no such layer')", "ended with code 1(?s:.*)no such layer"),
    ("import sys; sys.exit(3)", "ended with code 3"),
    ("print('fine')", "without a result(?s:.*)fine"),
    ("import sys; open(sys.argv[1]+'/result.json', 'w').write('<html>')", "wrote rubbish"),
    ("import sys; open(sys.argv[1]+'/result.json', 'w').write('[1]')", "wrote a list"),
    ("import sys; open(sys.argv[1]+'/result.json', 'wb').write(bytes([255, 0, 1]))", "wrote rubbish"),
], ids=lambda t: "" if " " in t else t)
def test_what_a_job_does_wrong_has_a_name(script, text, says):
    with pytest.raises(BackendError, match=says): run_job(HERE, script(text), {}, memory_mb=300)


# ---- sessions

TALK = """
import os, socket, subprocess, sys, time
state = {'n': 0}
def start(args, tensors):
    state['by'] = args['by']
    return {'pid': os.getpid()}, []
def times(args, tensors):
    print('a vendor says hello'); os.write(1, b'not even here')
    state['n'] += 1
    return {'n': state['n']}, [(d, s, bytes(v*state['by'] % 256 for v in b)) for d, s, b in tensors]
def grandchild(args, tensors):
    p = subprocess.Popen(['sleep', '1000'])
    return {'pids': [os.getpid(), os.getppid(), p.pid]}, []
def sleep(args, tensors): time.sleep(1000)
def die(args, tensors): os.kill(os.getpid(), 11)
def fill(args, tensors): return {'n': len(bytearray(4 << 30))}, []
def fail(args, tensors): raise ValueError('layer 3 has no such form')
def rubbish(args, tensors):
    for fd in range(3, 30):
        try: socket.socket(fileno=os.dup(fd)).send(b'Warning: this vendor speaks to every descriptor')
        except OSError: pass
    time.sleep(1000)
"""


@pytest.fixture
def talk(script):
    s = Session(HERE, script(TALK), ("start", {"by": 3}, []), timeout_s=120)
    yield s
    s.close()


XS = torch.arange(5, dtype=torch.uint8)


def test_a_session_answers_while_the_vendor_prints(talk):
    for _ in range(3): assert torch.equal(talk.call("times", tensors=[XS])[1][0], XS * 3)


@pytest.mark.parametrize("call,says", [("sleep", "did not answer `sleep` in 0.5 s"), ("die", "died of SIGSEGV"),
                                       ("rubbish", "rubbish(?s:.*)vendor says hello")])
def test_a_broken_session_is_told_and_the_next_call_starts_anew(talk, call, says):
    talk.call("times", tensors=[XS])
    first = talk.started[0]["pid"]
    with pytest.raises(BackendError, match=says): talk.call(call, timeout_s=120 if call != "sleep" else 0.5)
    assert gone(first)
    assert talk.call("times", tensors=[XS])[0] == {"n": 1} and talk.started[0]["pid"] != first


def test_an_error_is_an_answer(talk):
    talk.call("times", tensors=[XS])
    with pytest.raises(BackendError, match="`fail`: ValueError: layer 3"): talk.call("fail")
    with pytest.raises(BackendError, match="AttributeError"): talk.call("no_such_function")
    assert talk.call("times", tensors=[XS])[0] == {"n": 2}, "the child was not the same"


def test_a_session_without_memory(script):
    s = Session(HERE, script(TALK), memory_mb=300)
    with pytest.raises(BackendError, match="MemoryError"): s.call("fill")
    s.close()


def test_many_threads_one_session(talk):
    wrong = []
    def work(i):
        x = torch.full((1000 + i,), i, dtype=torch.uint8)
        for _ in range(20):
            if not torch.equal(talk.call("times", tensors=[x])[1][0], x * 3): wrong.append(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_a_session_made_in_a_thread_outlives_it(talk):
    t = threading.Thread(target=lambda: talk.call("times", tensors=[XS]))
    t.start()
    t.join()
    time.sleep(0.3)
    assert talk.call("times", tensors=[XS])[0] == {"n": 2}


def test_a_forked_process_gets_a_child_of_its_own(talk):
    talk.call("times", tensors=[XS])
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    def work():
        theirs.send((talk.call("times", tensors=[XS])[0]["n"], talk.started[0]["pid"]))
    p = multiprocessing.get_context("fork").Process(target=work)
    p.start()
    assert ours.poll(120)
    n, pid = ours.recv()
    p.join(30)
    assert n == 1 and pid != talk.started[0]["pid"] and gone(pid), "the forked process left its child"
    assert talk.call("times", tensors=[XS])[0] == {"n": 2}, "the fork disturbed the parent's child"


PARENT = """
import sys, time
from pathlib import Path
from fastai_compile.worker import Session
s = Session(Path(sys.executable), {script!r})
print(*s.call('grandchild')[0]['pids'], flush=True)
if {stay}: time.sleep(1000)
"""


@pytest.mark.parametrize("stay", [True, False], ids=["killed", "ended"])
def test_a_parent_that_is_gone_leaves_nothing(script, stay):
    code = PARENT.format(script=str(script(TALK)), stay=stay)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as p:
        pids = [int(s) for s in p.stdout.readline().split()]
        assert len(pids) == 3
        if stay:
            assert all(map(_runs, pids))
            p.send_signal(signal.SIGKILL)
    assert gone(*pids)


# ---- environments

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, and a stack that needs no download"
    import platform
    monkeypatch.setenv("FASTAI_COMPILE_CACHE", str(tmp_path / "cache"))
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tiny = Stack((here,), ("pip",), "import pip", ("pip",), 0.1, ((platform.system(), platform.machine()),))
    monkeypatch.setitem(stacks, "tiny", tiny)
    return tmp_path / "cache" / "workers" / "tiny"


@pytest.fixture
def quick(monkeypatch):
    "Without pip's own work"
    monkeypatch.setattr(worker_env, "_run", lambda cmd, say, what: _pretend(cmd))


def _pretend(cmd):
    if "venv" in cmd:
        (Path(cmd[-1]) / "bin").mkdir(parents=True)
        (Path(cmd[-1]) / "bin" / "python").symlink_to(sys.executable)
    return ["{}"]


def test_a_missing_environment_names_its_command(cache):
    for call in (lambda: worker_python("xla"), lambda: run_job("xla", "x.py", {}), lambda: Session("xla", "x.py")):
        with pytest.raises(BackendUnavailable, match=re.escape("python -m fastai_compile.worker install xla")): call()
    probe = get_backend("xla").probe("cpu")
    assert not probe.usable and "worker install xla" in probe.mend


def test_an_environment_for_real(cache):
    said = []
    made = install_worker("tiny", said.append)
    assert made["versions"]["pip"] and made["size_mb"] > 1 and any("checking" in s for s in said)
    assert next(r for r in list_workers() if r["worker"] == "tiny")["state"] == "ready"
    remove_worker("tiny", said.append)
    assert not cache.exists() and "not installed" in why_no_worker("tiny")


def test_a_half_environment_is_made_anew(cache, quick):
    install_worker("tiny", str)
    (cache / ".complete").unlink()
    (cache / "rest").write_text("")
    assert "not installed" in why_no_worker("tiny")
    install_worker("tiny", str)
    assert not (cache / "rest").exists() and not why_no_worker("tiny")


def test_other_versions_are_made_anew(cache, quick, monkeypatch):
    install_worker("tiny", str)
    monkeypatch.setitem(stacks, "tiny", dataclasses.replace(stacks["tiny"], requirements=("pip>1",)))
    assert "other versions" in why_no_worker("tiny")
    install_worker("tiny", str)
    assert not why_no_worker("tiny")


@pytest.mark.parametrize("error", [KeyboardInterrupt, BackendUnavailable])
def test_an_interrupted_installation_leaves_nothing(cache, monkeypatch, error):
    def run(cmd, say, what):
        if "pip" in cmd: raise error("stop")
        return _pretend(cmd)
    monkeypatch.setattr(worker_env, "_run", run)
    with pytest.raises(error): install_worker("tiny", str)
    assert not cache.exists()


def test_a_failing_installation_shows_pips_last_lines(cache, monkeypatch):
    monkeypatch.setitem(stacks, "tiny", dataclasses.replace(stacks["tiny"], requirements=("./no such folder",)))
    with pytest.raises(BackendUnavailable, match="installing the tiny worker failed(?s:.*)no such folder"):
        install_worker("tiny", str)
    assert not cache.exists()


def test_two_installations_at_once(cache, quick):
    said = []
    threads = [threading.Thread(target=install_worker, args=("tiny", said.append)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sum("making" in s for s in said) == 1 and sum("is there" in s for s in said) == 2


def test_what_is_missing_is_named(cache, quick, monkeypatch):
    tiny = stacks["tiny"]
    for stack, says in ((Stack(("2.4",), (), "", (), 0.1, tiny.systems), "no Python 2.4"),
                        (Stack(tiny.pythons, (), "", (), 1e6, tiny.systems), "1000000.0 GB"),
                        (Stack(tiny.pythons, (), "", (), 0.1, (("Amiga", "m68k"),)), "Amiga m68k only")):
        monkeypatch.setitem(stacks, "tiny", stack)
        with pytest.raises(BackendUnavailable, match=says): install_worker("tiny", str)
        assert not cache.exists()
    with pytest.raises(ConfigError, match="Did you mean 'xla'"): install_worker("xlaa")
    with pytest.raises(ConfigError): remove_worker("../..")


def test_a_shim_with_nothing_behind_it_is_no_python(tmp_path, monkeypatch):
    fake = tmp_path / "python9.9"
    fake.write_text("#!/bin/sh\nexit 127\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BackendUnavailable, match="no Python 9.9"): find_python(("9.9",))


def test_the_command(cache, capsys):
    assert main(["list"]) == 0 and "not installed" in capsys.readouterr().out
    assert main(["install", "xlaa"]) == 1 and "Did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit): main(["--help"])
    assert "install | list | remove" in capsys.readouterr().out


# ---- graphs for another PyTorch

def small_model():
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.LayerNorm(8), nn.Linear(8, 4)).eval()


def exported(model, *xs):
    flat = Flat(model, structure_of(model(*xs))).eval()
    return torch.export.export(flat, xs, strict=False)


RUN = """
import json, sys
folder = sys.argv[1]
import torch
from safetensors.torch import load_file, save_file
scope = {}
exec(compile(open(folder + '/graph.py').read(), 'graph.py', 'exec'), scope)
with torch.no_grad(): ys = scope['forward'](load_file(folder + '/weights.safetensors'), [load_file(folder + '/xs')['x']])
save_file({'y': ys[0].contiguous()}, folder + '/out/ys')
json.dump({'torch': torch.__version__}, open(folder + '/result.json', 'w'))
"""


@pytest.mark.workers
@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("stack", [pytest.param("cerebras", marks=needs("cerebras")), pytest.param("xla", marks=needs("xla"))])
def test_a_graph_in_an_older_pytorch(stack, decompose, script):
    from safetensors.torch import load, save
    model, x = small_model(), torch.randn(2, 3, 16, 16)
    files = graph_files(exported(model, x), decompose)
    with torch.no_grad(): want = model(x)
    assert torch.allclose(run_graph(files, [x])[0], want, atol=1e-6)
    done = run_job(stack, script(RUN), {}, {**files, "xs": save({"x": x})})
    assert done.result["torch"].split("+")[0] == {"cerebras": "2.4.0", "xla": "2.9.0"}[stack]
    assert (load(done.files["ys"])["y"] - want).abs().max() < 1e-5


def test_a_graph_names_layers_and_shares_weights():
    lin = torch.nn.Linear(4, 4)
    files = graph_files(exported(torch.nn.Sequential(lin, torch.nn.ReLU(), lin).eval(), torch.randn(2, 4)))
    info = json.loads(files["graph.json"])
    assert {l["layer"] for l in info["lines"]} >= {"1 (ReLU)"} and len(info["weights"]) == 2
    assert len(files["weights.safetensors"]) < 2 * 20 * 4 + 400, "a shared weight was written twice"


def test_a_state_that_changes_is_refused():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1))
        def forward(self, x):
            self.n.add_(1)
            return x + self.n
    with pytest.raises(BackendError, match="changes .*n while it runs"): graph_files(exported(Counts(), torch.randn(2, 3)))


# ---- XLA and TPU, for real

def captured_of(model, x, max_bs=4):
    return capture(model, Example((x,), (), (torch.Tensor,), "made up", list(range(len(x))), True), max_bs=max_bs)


def compiled_by(name, captured, **kwargs):
    payload = get_backend(name).compile(captured, CompileConfig(backends=name, **kwargs))
    return CompiledModel(payload, captured.inputs, captured.outputs, captured.structure, captured.max_bs, captured.eager)


@pytest.fixture(scope="module")
def on_xla():
    captured = captured_of(small_model(), torch.randn(3, 3, 16, 16))
    return compiled_by("xla", captured), captured


@pytest.mark.workers
@needs("xla")
def test_xla_runs_what_its_file_holds(on_xla):
    model, captured = on_xla
    for n in (1, 3, 4, 9):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad(): assert (model(x) - captured.eager(x)).abs().max() < 1e-5
    assert model.placement.level == "executed" and list(model.placement.operators) == ["XLA:CPU"]


@pytest.mark.workers
@needs("xla")
def test_xla_refuses_a_file_whose_stablehlo_is_another(on_xla):
    import copy
    payload = copy.deepcopy(on_xla[0].payload)
    payload.files["1.mlirbc"], payload.files["4.mlirbc"] = payload.files["4.mlirbc"], payload.files["1.mlirbc"]
    run = get_backend("xla").load(payload, "cpu", 1)
    with pytest.raises(BackendError, match="StableHLO traced here is not the one in the file"): run([torch.randn(1, 3, 16, 16)])


@pytest.mark.workers
@needs("xla")
@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_xla_own_silent_fallback_is_named(name):
    "torch_xla calculates what it has no form of on the CPU while it traces, and freezes the values into the graph"
    class LogFactorial(torch.nn.Module):
        def forward(self, x): return torch.lgamma(x.abs() + 1)
    captured = captured_of(torch.nn.Sequential(torch.nn.Flatten(), LogFactorial()).eval(), torch.randn(2, 3))
    with pytest.raises(FallbackError, match=r"aten::lgamma.*layer 1 \(LogFactorial\).*test_worker.py"):
        compiled_by(name, captured, allow_fallback=("aten::lgamma",), level="lowered" if name == "tpu" else "executed")


@pytest.mark.workers
@needs("xla")
def test_a_learner_through_xla(artifacts):
    art = artifacts("xla", "table")
    learn, items = art.open(), items_of("table", None)
    with art.learn.no_bar(), learn.no_bar():
        want, got = [l.get_preds(dl=l.dls.test_dl(items))[0] for l in (art.learn, learn)]
    assert (got - want).abs().max() < 1e-5 and learn.model.placement.level == "executed"


@pytest.mark.workers
@needs("xla")
def test_a_learner_for_a_tpu(artifacts, tmp_path):
    from fastai_compile.backends.xla import tpu_chips
    if tpu_chips(): pytest.skip("this machine has a TPU: what is tested is its absence")
    learn, path = artifacts.learner("table"), tmp_path / "t.pkl"
    with pytest.raises(BackendUnavailable, match="no TPU on this machine"): learn.export(path, compile="tpu")
    assert not path.exists()
    report = learn.export(path, compile="tpu", level="compiled", max_bs=4)
    assert "compiled" in str(report) and path.exists()
    from fastai_compile import inspect_artifact
    assert "deferred" in str(inspect_artifact(path))


@pytest.mark.workers
@needs("xla")
def test_the_tpu_compiler_refuses_an_unknown_tpu():
    captured = captured_of(torch.nn.Linear(3, 2).eval(), torch.randn(2, 3), 2)
    with pytest.raises(BackendError, match="v99:2x2"):
        compiled_by("tpu", captured, level="compiled", options={"topology": "v99:2x2"})
