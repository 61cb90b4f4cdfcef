"""Which backend is taken and how it is told; wrapped models; bad paths; what a compiled learner refuses."""
import contextlib
import copy
import dataclasses
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.all import CrossEntropyLossFlat, Learner, load_learner, nn, noop

from fastai_compile import (BackendError, BackendUnavailable, CaptureError, CompiledModel, ConfigError,
                            GraphBreakError, InputError, NotTrainable, Report, VerificationError, WriteError,
                            available_backends, choose, export, inspect_artifact, open_learner, register_backend)
from fastai_compile.backends.base import Payload, Placement, Probe, backends, get_backend, torch_version
from fastai_compile.example import Example
from fastai_compile.summary import loads_slowly
from fastai_compile.timing import Timing
from helpers import (Files, Wrapped, assert_close, eager_of, make_learner, needs_backend, only, random_inputs, registered, run,
                     small_cnn, table_learner)

needs_onnx = needs_backend("onnxruntime")


class Missing(Wrapped):
    "Not usable on this machine"
    cost = 50
    def probe(self, device): return Probe(False, "the vendor's runtime is not here", "pip install vendor-runtime")


class Slow(Wrapped):
    "ONNX Runtime, after a nap"
    cost = 40
    def around(self, run, xs): time.sleep(0.02); return run(xs)


class Late(Wrapped):
    cost = 60


class Refuses(Wrapped):
    cost = 61
    def compile(self, captured, config): raise BackendError("this graph is not for me")


def result_of(report, name): return next(r["result"] for r in report.candidates if r["backend"] == name)


@pytest.fixture
def learn(artifacts): return artifacts.learner("table")


# ---- names

def test_an_unusable_name_raises(learn, tmp_path):
    with registered(Missing()) as b:
        for choice in ("missing", ["eager", "missing"], ("missing", "eager")):
            with pytest.raises(BackendUnavailable, match="vendor's runtime is not here.*pip install vendor-runtime"):
                learn.export(tmp_path / "x.pkl", compile=choice)
        row = next(r for r in available_backends() if r["backend"] == "missing")
        assert row["usable"] == "no" and row["reason"] == b.probe("cpu").reason
        assert row["to mend it"] == "pip install vendor-runtime"
    assert not b.compiled and not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice,says", [
    ("onnxruntim", "'onnxruntim'.*Did you mean 'onnxruntime'"), (["eager", "onxruntime"], "mean 'onnxruntime'"),
    ("OpenVINO", "Did you mean 'openvino'"), ("ONNXRUNTIME", "Did you mean 'onnxruntime'"), ("ort", "Did you mean 'onnxruntime'"),
    ("tensorrt9000", "Known: .*onnxruntime"), (3, "compile=3"), ([], r"compile=\[\]"), (["eager", 3], "compile="), ("", "''"),
], ids=str)
def test_a_misspelt_name_suggests(choice, says, learn, tmp_path):
    with pytest.raises(ConfigError, match=says): learn.export(tmp_path / "x.pkl", compile=choice)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("choice,says", [
    ({"max_bz": 3}, "'max_bz'.*Did you mean 'max_bs'"), ({"treads": 1}, "Did you mean 'threads'"), ({"max_bs": 0}, "max_bs=0"),
    ({"verify": False}, "nothing unverified"), ({"verify": "number"}, "Did you mean 'numbers'"), ({"device": "cuda"}, "cpu"),
    ({"options": {"sesion": {}}}, "Did you mean|no option"), ({"bs": 0}, "bs="), ({"threads": "two"}, "threads='two'"),
    ({"max_metric_change": -1}, "max_metric_change"), ({"tolerance": 0}, "tolerance"), ({"budget_s": -1}, "budget_s"),
    ({"budget_s": "x"}, "budget_s='x': must be"), ({"tolerance": "a"}, "tolerance='a': must be"),
    ({"max_metric_change": None}, "max_metric_change=None: must be"), ({"tolerance": float("nan")}, "tolerance=nan"),
    ({"tolerance": True}, "tolerance=True"), ({"bs": None}, "bs=.*whole numbers"), ({"bs": 2.5}, "bs=.*whole numbers"),
    ({"bs": "8"}, "bs=.*whole numbers"), ({"keep_eager": "no"}, "keep_eager='no': choose True or False"),
    ({"dynamic_size": "yes"}, "dynamic_size='yes': choose True or False"), ({"isolate": 1}, "isolate=1"),
    ({"backends": "onnxruntime"}, "compile='eager' and backends='onnxruntime'"), ({"complie": True}, "Did you mean 'compile'"),
], ids=str)
def test_a_wrong_choice_is_named(choice, says, learn, tmp_path):
    with pytest.raises(ConfigError, match=says): learn.export(tmp_path / "x.pkl", compile="eager", **choice)
    assert not list(tmp_path.iterdir())


def test_choices_without_compile(learn, tmp_path):
    with pytest.raises(ConfigError, match="add `compile=True`"): learn.export(tmp_path / "x.pkl", max_bs=8)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_compile_is_named(learn, tmp_path):
    "Not taken for a choice that lacks `compile=True`"
    says = "no choice 'complie'. Did you mean 'compile'"
    with pytest.raises(ConfigError, match=says): learn.export(tmp_path / "x.pkl", complie=True)
    assert not list(tmp_path.iterdir())


def test_one_way_to_name_the_backends_is_enough(learn, tmp_path):
    for compile in (True, "eager"): assert learn.export(tmp_path / "x.pkl", compile=compile, backends="eager").backend == "eager"


def test_positional_use_stays(learn, tmp_path):
    import pickle
    report = learn.export(tmp_path / "x.pkl", pickle, 4, compile="eager")
    assert isinstance(report, Report) and isinstance(load_learner(tmp_path / "x.pkl").model, CompiledModel)
    learn.export(tmp_path / "s.pkl", pickle, 4)
    assert not isinstance(load_learner(tmp_path / "s.pkl").model, CompiledModel)


# ---- choosing

@needs_onnx
def test_true_lists_what_it_skips(learn, tmp_path):
    with only("eager", "onnxruntime"), registered(Missing()) as b:
        report = learn.export(tmp_path / "x.pkl", compile=True)
        row = next(r for r in available_backends() if r["backend"] == "missing")
    assert result_of(report, "1 more").startswith("not usable here: `available_backends()` says which") and not b.compiled
    assert (row["reason"], row["to mend it"]) == ("the vendor's runtime is not here", "pip install vendor-runtime")


@needs_onnx
def test_no_budget_lists_what_it_did_not_try(learn, tmp_path):
    late = Late()
    with only("eager", "onnxruntime"), registered(late):
        report = learn.export(tmp_path / "x.pkl", compile=True, budget_s=0)
    assert "not tried" in result_of(report, "late") and "budget_s=0" in result_of(report, "late") and not late.compiled
    assert result_of(report, "onnxruntime") in ("chosen", "passed")


@needs_onnx
def test_a_named_list_has_no_budget(learn, tmp_path):
    late = Late()
    with registered(late): learn.export(tmp_path / "x.pkl", compile=["onnxruntime", "late"], budget_s=0)
    assert late.compiled == 1


def test_nothing_usable(learn, tmp_path):
    with only("eager"), registered(Missing()):
        with pytest.raises(BackendUnavailable, match="vendor-runtime"): learn.export(tmp_path / "x.pkl", compile=True)
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("how", ["True", "list"])
def test_eager_wins_when_nothing_is_faster(how, learn, tmp_path):
    slow = Slow("onnxruntime", key="table")
    with only("eager"), registered(slow):
        report = learn.export(tmp_path / "x.pkl", compile=True if how == "True" else ["slow", "eager"])
        assert report.backend == "eager" and report.headline.startswith("eager: nothing was faster")
        assert result_of(report, "slow") == "passed" and inspect_artifact(tmp_path / "x.pkl")["backend"] == "eager"
    opened = load_learner(tmp_path / "x.pkl")
    xs = random_inputs(opened.model, 5)
    assert torch.equal(run(opened.model, xs), run(eager_of(learn), xs))


@needs_onnx
def test_slow_by_name_is_told(learn, tmp_path):
    with registered(Slow("onnxruntime", key="table")): report = learn.export(tmp_path / "x.pkl", compile="slow")
    assert report.backend == "slow" and "slower than eager" in report.headline and "asked for by name" in report.headline


@needs_onnx
def test_the_faster_of_a_list_is_taken(learn, tmp_path):
    with registered(Slow("onnxruntime", key="table"), Late("onnxruntime", key="table")):
        for choice in (["slow", "late"], ["late", "slow"]):
            report = learn.export(tmp_path / "x.pkl", compile=choice)
            assert report.backend == "late" and result_of(report, "slow") == "passed"


@pytest.mark.parametrize("load_s, failed, says", [
    ((3.3, .2), "", "a takes 3.3 s to load; b 0.2 s, and 1.50 times the time of a call: .*compile='b'"),
    ((.9, .01), "", None), ((3.3, .9), "", None), ((3.3, .2), "refused", None)])
def test_a_winner_that_loads_slowly_is_told(load_s, failed, says):
    a, b = (SimpleNamespace(name=n, load_s=s, failed="") for n, s in zip("ab", load_s))
    b.failed = failed
    times = {"eager": Timing((9., 9., 9.), 1), "a": Timing((2., 2., 2.), 1)} | ({} if failed else {"b": Timing((3., 3., 3.), 1)})
    note = loads_slowly(a, [b, a], {1: times})
    assert re.search(says, note) if says else note == ""


CLOSE = {"eager": (10, 9), "a": (5, 5.1), "b": (4, 5.2)}    # b is the faster, but for one round
CLEAR = {"eager": (10, 9), "a": (5, 5.1), "b": (4, 4.2)}
ALIKE = {"eager": (10, 9), "a": (5, 5.1), "b": (4.9, 5.2)}  # less than 5%: a tie, whatever the noise


@pytest.mark.parametrize("found, times, n", [(CLOSE, 2, 2), (CLEAR, 1, 2), (ALIKE, 1, 2), (CLOSE, 1, 1)])
def test_what_few_rounds_leave_open_is_timed_again(found, times, n, learn, tmp_path, monkeypatch):
    "A large model gets few rounds, and one slow call would hide that it is the faster"
    from fastai_compile import choose
    budgets, cands = [], [SimpleNamespace(name=k, model=None) for k in "ab"[:n]]
    def interleave(fns, more_s):
        budgets.append(more_s)
        return {k: Timing((v[0],) * 8 + (v[1],), 1) for k, v in found.items() if k in fns}
    monkeypatch.setattr(choose, "interleave", interleave)
    xb = (torch.ones(2, 3),)
    captured = SimpleNamespace(example=Example(xb, (), (torch.Tensor,), "a test", [0, 1]), eager=None)
    config = SimpleNamespace(bs=(1,), backends=["a", "b"])
    res = choose.time_candidates(captured, cands, config, lambda *args: contextlib.nullcontext())
    assert len(budgets) == times and budgets == sorted(set(budgets)) and list(res[1]) == ["eager", *"ab"[:n]]


@needs_onnx
def test_eager_is_not_taken_behind_the_back(learn, tmp_path):
    "A list that does not name eager never ends in eager"
    with registered(Slow("onnxruntime", key="table"), Slow("onnxruntime", "slow_too", key="table")):
        assert learn.export(tmp_path / "x.pkl", compile=["slow", "slow_too"]).backend in ("slow", "slow_too")


@needs_onnx
def test_the_pinned_call_repeats_the_choice(learn, tmp_path):
    with only("eager", "onnxruntime"): report = learn.export(tmp_path / "x.pkl", compile=True, max_bs=32)
    assert report.pinned.startswith(f"learn.export({str(tmp_path / 'x.pkl')!r}, compile=") and "max_bs=32" in report.pinned
    again = eval(report.pinned.replace("x.pkl", "y.pkl"), {"learn": learn})
    assert again.backend == report.backend and inspect_artifact(tmp_path / "y.pkl")["batch"] == [1, 32]


@needs_onnx
def test_the_pinned_call_keeps_the_options_of_the_backend(learn, tmp_path):
    options = {"session": {"graph_optimization_level": "basic"}}
    report = learn.export(tmp_path / "x.pkl", compile="onnxruntime", options=options, threads=1, freeze="valid", bs=[1, 8])
    assert "graph_optimization_level" in report.pinned
    pinned = report.pinned.replace("x.pkl", "y.pkl")
    again = eval(pinned, {"learn": learn})
    assert again.pinned == pinned
    config = open_learner(again.path).model.config
    assert (config.options, config.threads, config.freeze, config.bs) == (options, 1, "valid", (1, 8))


def test_a_refused_export_leaves_the_old_file(learn, tmp_path):
    "Whatever stood there, and nothing beside it"
    class Wrong(Wrapped):
        def around(self, run, xs): return [t + 1 for t in run(xs)]
    (tmp_path / "x.pkl").write_bytes(b"what was there")
    before = Files.of(tmp_path)
    with registered(Wrong()), pytest.raises(VerificationError): learn.export(tmp_path / "x.pkl", compile="wrong")
    assert Files.of(tmp_path) == before


def test_the_report(learn, tmp_path):
    report = learn.export(tmp_path / "x.pkl", compile="eager")
    data = json.loads(report.to_json())
    assert data["backend"] == "eager" and data["path"] == str(tmp_path / "x.pkl") and data["stages"]
    assert abs(report.size_mb - (tmp_path / "x.pkl").stat().st_size / 1e6) < 1e-9
    assert "load_learner" in repr(report) and "load_learner" in report._repr_html_()
    assert isinstance(eval(report.next_call.split("=", 1)[1], {"load_learner": load_learner}), Learner)


@needs_onnx
def test_the_table_of_candidates_is_filled(learn, tmp_path):
    "What passed the gate has every figure, what did not has its reason, and both forms of the report show them"
    with registered(Late("onnxruntime", key="table"), Refuses()):
        report = learn.export(tmp_path / "x.pkl", compile=["late", "refuses", "onnxruntime"])
    rows = {r["backend"]: r for r in report.candidates}
    assert list(rows) == ["eager", "late", "refuses", "onnxruntime"]
    for name in ("late", "onnxruntime"):
        r = rows[name]
        assert r["result"] in ("chosen", "passed") and "executed" in r["placement"]
        p50, faster, *others = (float(re.match(r"[\d.e-]+", str(r[k]))[0]) for k in
                                ("p50 ms", "times eager", "largest difference", "compile s", "load s", "MB"))
        assert p50 > 0 and faster > 0 and all(v >= 0 for v in others)
        calls = [t for t in report.candidates if t["backend"] == name][0]["p99 ms"]
        assert calls == "" or float(calls.split()[0]) >= p50, "the 99th percentile is there where there were enough calls"
    assert "not for me" in rows["refuses"]["result"] and rows["refuses"]["p50 ms"] == ""
    for shown in (repr(report), report._repr_html_()):
        for column in ("p50 ms", "p99 ms", "times eager", "largest difference", "compile s", "load s", "MB", "placement"):
            assert column in shown
        assert "not for me" in shown


# ---- wrapped models

@pytest.fixture
def other(tmp_path):
    "A learner of its own for each test, which may be changed"
    (tmp_path / "t").mkdir()
    return make_learner("table", tmp_path / "t", epochs=1)


def _check(path, learn, plain):
    opened = load_learner(path)
    xs = random_inputs(opened.model, 5)
    assert_close(run(opened.model, xs), run(plain.eval(), xs))
    assert list(opened.model.state_dict()) == list(plain.state_dict())
    assert type(opened.to_eager().model) is type(plain)
    return opened


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "DataParallel", "both"])
def test_wrapped_models_are_unwrapped(how, other, tmp_path):
    plain, path = other.model, tmp_path / "x.pkl"
    if how == "torch.compile": other.model = torch.compile(plain, backend="aot_eager")
    elif how == "model.compile": plain.compile(backend="aot_eager")
    elif how == "DataParallel": other.model = nn.DataParallel(plain)
    else: other.model = torch.compile(nn.DataParallel(plain), backend="aot_eager")
    before = other.model
    other.export(path, compile="eager")
    assert other.model is before, "the learner keeps its wrapper"
    opened = _check(path, other, plain)
    assert getattr(opened.model, "_compiled_call_impl", None) is None
    torch._dynamo.reset()


def test_a_torch_compiled_model_is_exported_for_its_own_backend(other, tmp_path):
    class Mine(Late):
        def compile(self, captured, config):
            self.options = config.options
            return super().compile(captured, config)
    def mine(gm, inputs): return gm
    with registered(Mine()) as b:
        b.name = "mine"
        register_backend(b)
        for wrap in (lambda m: torch.compile(m, backend="mine"), lambda m: m.compile(backend="mine") or m):
            plain = other.model
            if "mine" not in torch._dynamo.list_backends(()): torch._dynamo.register_backend(mine, "mine")
            other.model = wrap(plain)
            report = other.export(tmp_path / "x.pkl", compile=True)
            assert report.backend == "mine" and result_of(report, "mine") == "chosen"
            other.model = plain
        assert b.compiled == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_a_torch_compile_backend_without_a_file_format(how, other, tmp_path):
    if how == "torch.compile": other.model = torch.compile(other.model, backend="aot_eager")
    else: other.model.compile(backend="aot_eager")
    with pytest.raises(BackendUnavailable, match="aot_eager.*compile='onnxruntime'"):
        other.export(tmp_path / "x.pkl", compile=True)
    assert not (tmp_path / "x.pkl").exists()


@needs_backend("inductor")
def test_a_torch_compiled_model_keeps_its_options(other, tmp_path, monkeypatch):
    "Backend and options of `torch.compile` go into the export; nothing was compiled by `torch.compile` itself"
    b, seen = get_backend("inductor"), []
    def compile(captured, config):
        seen.append(dict(config.options))
        return dataclasses.replace(get_backend("eager").compile(captured, dataclasses.replace(config, options={})))
    monkeypatch.setattr(b, "compile", compile)
    plain = other.model
    for kw in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False}}, {"dynamic": True}):
        other.model = torch.compile(plain, **kw)
        other.export(tmp_path / "x.pkl", compile=True)
    assert len(seen) == 4 and not seen[0] and not seen[3]
    assert seen[1].get("max_autotune") is True or seen[1].get("mode") == "max-autotune-no-cudagraphs"
    assert seen[2].get("epilogue_fusion") is False
    other.model = torch.compile(plain, mode="max-autotune-no-cudagraphs")
    other.export(tmp_path / "x.pkl", compile="eager")
    assert len(seen) == 4
    torch._dynamo.reset()


def test_cuda_graphs_of_torch_compile_are_not_dropped_in_silence(other, tmp_path, monkeypatch):
    'mode="reduce-overhead": CUDA graphs where there is a GPU, else a note that this file has none'
    seen = []
    def stands_in(name):
        def compile(captured, config):
            seen.append((name, dict(config.options)))
            return dataclasses.replace(get_backend("eager").compile(captured, dataclasses.replace(config, options={})))
        monkeypatch.setattr(get_backend(name), "compile", compile)
    for name in ("inductor", "inductor:cuda"): stands_in(name)
    other.model = torch.compile(other.model, mode="reduce-overhead")
    if not get_backend("inductor:cuda").probe("cpu").usable:
        report = other.export(tmp_path / "x.pkl", compile=True)
        assert seen == [("inductor", {})] and any("CUDA graphs" in n and "inductor:cuda cannot" in n for n in report.notes)
    monkeypatch.setattr(get_backend("inductor:cuda"), "probe", lambda device: Probe(True, "a GPU that this test made up"))
    report = other.export(tmp_path / "y.pkl", compile=True)
    assert seen[-1] == ("inductor:cuda", {"settings": {}}) and not any("CUDA graphs" in n for n in report.notes)
    torch._dynamo.reset()


def test_sizes_vary_only_of_images(learn, tmp_path):
    with pytest.raises(ConfigError, match="4-d"): learn.export(tmp_path / "x.pkl", compile="eager", dynamic_size=True)
    assert not list(tmp_path.glob("*.pkl"))


def test_distributed_data_parallel(other, tmp_path):
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain = other.model
        other.model = nn.parallel.DistributedDataParallel(plain)
        other.export(tmp_path / "x.pkl", compile="eager")
        _check(tmp_path / "x.pkl", other, plain)
    finally: dist.destroy_process_group()


def test_children_of_a_distributed_run_write_nothing(other, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert other.export(tmp_path / "x.pkl", compile="eager") is None and not (tmp_path / "x.pkl").exists()
    monkeypatch.setenv("RANK", "0")
    assert other.export(tmp_path / "x.pkl", compile="eager").backend == "eager"


def test_mixed_precision_learner(other, tmp_path):
    plain = eager_of(other)
    other.to_fp16()
    before = list(other.cbs)
    report = other.export(tmp_path / "x.pkl", compile="eager")
    assert any("MixedPrecision" in n for n in report.notes) and list(other.cbs) == before
    opened = _check(tmp_path / "x.pkl", other, plain)
    assert not any(isinstance(cb, MixedPrecision) for cb in opened.cbs)
    assert opened.get_preds(dl=opened.dls.test_dl(_items()))[0].dtype == torch.float32


def _items():
    from helpers import items_of
    return items_of("table", None)


@needs_onnx
def test_channels_last_learner(image_folder, tmp_path):
    learn = make_learner("image", image_folder, epochs=0).to_channelslast()
    learn.model.to(memory_format=torch.channels_last)
    plain = eager_of(learn)
    report = learn.export(tmp_path / "x.pkl", compile="onnxruntime")
    assert next(p for p in learn.model.parameters() if p.ndim == 4).is_contiguous(memory_format=torch.channels_last)
    assert any("ChannelsLast" in n for n in report.notes)
    opened = _check(tmp_path / "x.pkl", learn, plain)
    assert opened.get_preds(dl=opened.dls.test_dl(list(image_folder.glob("*/*.png"))[:5], num_workers=0))[0].shape == (5, 4)


def test_half_weights_are_refused(other, tmp_path):
    other.model.half()
    with pytest.raises(CaptureError, match=r"float16.*\.float\(\)"): other.export(tmp_path / "x.pkl", compile="eager")
    assert not (tmp_path / "x.pkl").exists()


# ---- somebody else's backend

class TorchExport:
    "A whole backend on one page: the graph as PyTorch saves it"
    name, rewrites, shapes, cost = "torch_export", (), "dynamic", 30

    def probe(self, device): return Probe(True, f"PyTorch {torch.__version__}")

    def coverage(self, captured, config): return Placement("PyTorch's graph on CPU", "lowered")

    def compile(self, captured, config):
        buf = io.BytesIO()
        torch.export.save(captured.program, buf)
        data = torch.frombuffer(bytearray(buf.getvalue()), dtype=torch.uint8)
        return Payload(self.name, {"model.pt2": data}, needs={"torch": torch_version()})

    def load(self, payload, device, threads):
        module = torch.export.load(io.BytesIO(payload.files["model.pt2"].numpy().tobytes())).module()
        def run(xs): return list(module(*xs))
        run.placement = Placement("PyTorch's graph on CPU", "executed")
        return run


def test_a_third_party_backend(learn, tmp_path):
    with registered(TorchExport()):
        assert "torch_export" in [r["backend"] for r in available_backends()]
        report = learn.export(tmp_path / "x.pkl", compile="torch_export")
        opened = load_learner(tmp_path / "x.pkl")
        for n in (0, 1, 3, 64, 100):
            xs = random_inputs(opened.model, n)
            if n: assert_close(run(opened.model, xs), run(eager_of(learn), xs))
            else: assert run(opened.model, xs).shape == (0, 2)
    assert report.backend == "torch_export" and "this CPU type only" in report.runs_on
    assert "torch_export" not in backends()


def test_a_third_party_backend_through_its_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint
    from fastai_compile.backends import base
    found = [EntryPoint("good", "test_choose:TorchExport", "fastai_compile.backends"),
             EntryPoint("broken", "no_such_module_of_mine:Backend", "fastai_compile.backends")]
    ours = {"fastai_compile.backends": found}
    monkeypatch.setattr(base.importlib.metadata, "entry_points", lambda group: ours.get(group, []))
    monkeypatch.setattr(base, "_found", [])
    monkeypatch.setattr(base, "_broken", {})
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    rows = {r["backend"]: r for r in available_backends()}
    assert rows["torch_export"]["usable"] == "yes" and rows["broken"]["usable"] == "no"
    assert "no_such_module_of_mine" in rows["broken"]["reason"]
    with pytest.raises(BackendUnavailable, match="no_such_module_of_mine"): get_backend("broken")


def test_half_a_backend_is_refused():
    class Half:
        name, rewrites = "half", ()
        def probe(self, device): return Probe(True, "")
    with pytest.raises(ConfigError, match="shapes, cost, coverage, compile, load"): register_backend(Half())
    assert "half" not in backends()


# ---- paths

@pytest.mark.parametrize("make,says", [
    (lambda d: d, "folder"), (lambda d: d / "none" / "x.pkl", "no folder.*make it first"),
    (lambda d: d / "file" / "x.pkl", "folder"), (lambda d: io.BytesIO(), "path, not to a BytesIO"),
    (lambda d: open(d / "opened.pkl", "wb"), "path, not to a BufferedWriter"),
    (lambda d: Path("/proc/x.pkl"), "/proc"), (lambda d: str(d / "none" / "x.pkl"), "no folder"),
    (lambda d: str(d / "a\0b.pkl"), "null"), (lambda d: d / ("a" * 252 + ".pkl"), "too long"),
    (lambda d: None, "not to a NoneType"), (lambda d: b"x.pkl", "not to a bytes"),
], ids=["folder", "missing folder", "under a file", "BytesIO", "open file", "proc", "text", "NUL", "long", "None", "bytes"])
def test_bad_paths(make, says, learn, tmp_path):
    (tmp_path / "file").write_text("stays")
    path, before = make(tmp_path), sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(WriteError, match=says): learn.export(path, compile="eager")
    if hasattr(path, "close"): path.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "stays"


def test_relative_paths_are_under_the_learners_path(tmp_path):
    learn = table_learner(tmp_path, epochs=0)
    learn.export(compile="eager")
    assert (tmp_path / "export.pkl").exists()
    (tmp_path / "models").mkdir()
    report = learn.export("models/é ü 日本.pkl", compile="eager")
    assert Path(report.path) == tmp_path / "models" / "é ü 日本.pkl" and open_learner(report.path)


def test_two_exports_to_one_path_at_once(learn, tmp_path):
    "Whoever comes last wins; the file is whole at any time, and nothing is left beside it"
    path = tmp_path / "x.pkl"
    learn.export(path, compile="eager")
    learners, errors, done = [open_learner(path) for _ in range(3)], [], threading.Event()
    def write(l):
        try:
            for _ in range(3): l.export(path)
        except Exception as e: errors.append(e)
    def read():
        while not done.is_set():
            try: inspect_artifact(path)
            except Exception as e: errors.append(e)
            time.sleep(0.005)
    ts = [threading.Thread(target=write, args=(l,)) for l in learners]
    reader = threading.Thread(target=read)
    for t in (*ts, reader): t.start()
    for t in ts: t.join()
    done.set()
    reader.join()
    assert not errors, errors
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"] and open_learner(path)


def test_two_whole_exports_at_once(tmp_path):
    "Two learners in two threads take turns: tracing two models at once spoils PyTorch's state for good"
    learners, errors = [], {}
    for i in range(2):
        (tmp_path / f"t{i}").mkdir()
        learners.append(table_learner(tmp_path / f"t{i}", epochs=1, seed=i))
    def export(i):
        try: learners[i].export(tmp_path / "x.pkl", compile="eager")
        except Exception as e: errors[i] = e
    ts = [threading.Thread(target=export, args=(i,)) for i in range(2)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not errors, errors
    opened = open_learner(tmp_path / "x.pkl")
    weights = [list(l.model.state_dict().values()) for l in learners]
    assert any(all(map(torch.equal, opened.model.state_dict().values(), w)) for w in weights)


def test_the_file_is_not_there_before_it_is_whole(learn, tmp_path, monkeypatch):
    "The old file is read by others until the new one is complete"
    path, seen = tmp_path / "x.pkl", []
    learn.export(path, compile="eager")
    old, replace = path.read_bytes(), os.replace
    def spy(a, b):
        seen.append(path.read_bytes() == old and Path(a).parent == path.parent)
        inspect_artifact(a)
        return replace(a, b)
    monkeypatch.setattr(os, "replace", spy)
    learn.export(path, compile="eager", max_bs=32)
    assert seen == [True] and inspect_artifact(path)["batch"] == [1, 32]


# ---- what does not train

@pytest.fixture
def compiled(artifacts, tmp_path):
    "An opened learner, with its data back and weights saved beside it"
    stock = artifacts.learner("table")
    learn = artifacts("eager", "table").open()
    learn.dls, learn.path = stock.dls, tmp_path
    (tmp_path / "models").mkdir()
    torch.save(stock.model.state_dict(), tmp_path / "models" / "weights.pth")
    return learn


TRAINING = {
    "fit": lambda l: l.fit(1), "fit_one_cycle": lambda l: l.fit_one_cycle(1), "fine_tune": lambda l: l.fine_tune(1),
    "fit_flat_cos": lambda l: l.fit_flat_cos(1), "fit_sgdr": lambda l: l.fit_sgdr(1, 1), "unfreeze": lambda l: l.unfreeze(),
    "freeze": lambda l: l.freeze(), "freeze_to": lambda l: l.freeze_to(-1), "lr_find": lambda l: l.lr_find(show_plot=False),
    "create_opt": lambda l: l.create_opt(), "load": lambda l: l.load("weights"),
    "load without opt": lambda l: l.load("weights", with_opt=False),
    "half": lambda l: l.model.half(), "bfloat16": lambda l: l.model.bfloat16(), "double": lambda l: l.model.double(),
    "requires_grad_": lambda l: l.model.requires_grad_(),
    "load_state_dict": lambda l: l.model.load_state_dict(l.model.state_dict()),
    "cuda": lambda l: l.model.cuda(), "to cuda": lambda l: l.model.to("cuda"), "to meta": lambda l: l.model.to("meta"),
    "to float16": lambda l: l.model.to(torch.float16), "to like": lambda l: l.model.to(torch.zeros(1, dtype=torch.float64)),
    "train": lambda l: l.model.train(), "type": lambda l: l.model.type(torch.float16), "zero_grad": lambda l: l.model.zero_grad(),
    "apply": lambda l: l.model.apply(noop), "to_empty": lambda l: l.model.to_empty(device="cpu"), "xpu": lambda l: l.model.xpu(),
}


@pytest.mark.parametrize("what", TRAINING)
def test_not_trainable(what, compiled):
    before = {k: v.clone() for k, v in compiled.model.state_dict().items()}
    xs = random_inputs(compiled.model, 3)
    want = run(compiled.model, xs)
    with pytest.raises(NotTrainable, match="to_eager"): TRAINING[what](compiled)
    assert all(torch.equal(before[k], v) for k, v in compiled.model.state_dict().items())
    assert torch.equal(run(compiled.model, xs), want) and compiled.opt is None and not compiled.model.training


def test_what_stays_allowed(compiled):
    m, xs = compiled.model, random_inputs(compiled.model, 3)
    want = run(m, xs)
    for same in (m.eval(), m.cpu(), m.float(), m.to("cpu"), m.to(torch.float32), m.train(False), m.to("cpu", torch.float32)):
        assert same is m
    m.reset()
    assert torch.equal(run(m, xs), want) and not m.training
    compiled.validate()
    assert torch.equal(run(m, xs), want)


def test_to_eager_trains_again(compiled, artifacts, tmp_path):
    stock = artifacts.learner("table")
    assert compiled.to_eager() is compiled
    assert type(compiled.model) is type(stock.model)
    assert compiled.splitter == stock.splitter and compiled.opt_func == stock.opt_func
    assert [p.requires_grad for p in compiled.model.parameters()] == [p.requires_grad for p in stock.model.parameters()]
    before = [p.detach().clone() for p in compiled.model.parameters()]
    compiled.fit(1, 1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(before, compiled.model.parameters()))
    compiled.unfreeze()
    compiled.fit_one_cycle(1)
    compiled.load("weights", with_opt=False)
    compiled.export(tmp_path / "again.pkl", compile="eager")
    assert compiled.to_eager() is compiled  # already is


def test_frozen_groups_survive(image_folder, tmp_path):
    "A splitter and frozen layers are the same after a round trip"
    def halves(m): return [list(m[:2].parameters()), list(m[2:].parameters())]
    stock = make_learner("image", image_folder, epochs=0, splitter=halves)
    stock.freeze()
    stock.export(tmp_path / "x.pkl", compile="eager")
    learn = load_learner(tmp_path / "x.pkl").to_eager()
    learn.dls = stock.dls
    assert [p.requires_grad for p in learn.model.parameters()] == [p.requires_grad for p in stock.model.parameters()]
    learn.freeze()
    assert len(learn.opt.param_groups) == 2
    learn.fit(1)


@needs_onnx
def test_a_model_trained_elsewhere(image_folder, tmp_path):
    "A plain module in a plain Learner, never fitted"
    stock = make_learner("image", image_folder, epochs=0)
    learn = Learner(stock.dls, small_cnn(), loss_func=CrossEntropyLossFlat())
    learn.create_mbar = False
    report = learn.export(tmp_path / "x.pkl", compile="onnxruntime")
    assert report.backend == "onnxruntime"
    _check(tmp_path / "x.pkl", learn, learn.model)


# ---- images of any size

@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_height_and_width_may_vary(backend, artifacts, tmp_path):
    learn = artifacts.learner("image")
    options = {"freezing": False} if backend == "inductor" else {}
    learn.export(tmp_path / "any.pkl", compile=backend, dynamic_size=True, options=options)
    model, eager = open_learner(tmp_path / "any.pkl").model, eager_of(learn)
    for n, h, w in ((1, 32, 32), (3, 16, 200), (2, 33, 57), (9, 96, 40)):
        x = torch.randn(n, 3, h, w)
        assert_close(run(model, [x]), run(eager, [x]))
    for h, w in ((15, 32), (32, 15), (5000, 16)):
        with pytest.raises(InputError, match="needed is 16 to 4096"): model(torch.zeros(1, 3, h, w))


def test_a_model_of_one_size_refuses_to_vary(artifacts, tmp_path):
    learn = copy.copy(artifacts.learner("image"))
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(CaptureError, match="leave `dynamic_size` out"):
        learn.export(tmp_path / "no.pkl", compile="onnxruntime", dynamic_size=True)
    assert not list(tmp_path.iterdir())


# ---- the second gate

class Tires(Wrapped):
    "Answers the first gate, and raises in the second"
    tired = False
    def around(self, run, xs):
        if self.tired: raise BackendError("no more")
        return run(xs)


def test_a_model_that_fails_in_the_second_gate_makes_room(artifacts, tmp_path, monkeypatch):
    tires, check = Tires("eager", "tires"), choose.check_answers
    def second_gate(*args):
        tires.tired = True
        return check(*args)
    monkeypatch.setattr(choose, "check_answers", second_gate)
    monkeypatch.setattr(export, "rank", lambda timings, cands: ["tires", "onnxruntime"])
    with registered(tires):
        report = artifacts.learner("table").export(tmp_path / "a.pkl", compile=["tires", "onnxruntime"])
    assert report.backend == "onnxruntime" and "BackendError: no more" in str(report.candidates)


# ---- a model that is not one graph

class Sign(nn.Module):
    def forward(self, x): return x if x.sum() > 0 else -x


def test_export_names_the_layer_that_breaks_the_graph(artifacts, tmp_path, capfd):
    learn = copy.copy(artifacts.learner("image"))
    learn.model = nn.Sequential(nn.Flatten(), Sign(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(GraphBreakError, match="Sign") as e: learn.export(tmp_path / "no.pkl", compile="onnxruntime")
    row, = e.value.rows
    assert row.layer == "1" and Path(row.file).name == "test_choose.py" and "x.sum() > 0" in row.source
    assert e.value.__cause__ is not None and not list(tmp_path.iterdir())
    assert "def forward" not in "".join(capfd.readouterr())  # PyTorch would print the graph so far
