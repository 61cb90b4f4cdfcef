"""A file for a machine that is not here: how far it goes, what is checked later, and what is refused."""
import json

import numpy as np
import pytest
import torch
from torch import nn

from fastai_compile import (BackendUnavailable, ConfigError, FallbackError, VerificationError, WriteError, available_backends,
                            inspect_artifact, open_learner)
from fastai_compile.backends.base import Payload, Placement, Probe
from fastai_compile.prepare import write_open_format
from helpers import make_learner, registered


class Device:
    "Stands for hardware that this machine lacks until `here` is set: it runs linear models in batches of 1 and 8"
    name, rewrites, shapes, cost = "device", (), "static", 990
    reason = "no device on the bus"

    def __init__(self, level="lowered", reached="lowered"):
        self.level, self.reached, self.here, self.off = level, reached, False, 0.
    def probe(self, device): return Probe(True, "a device") if self.here else Probe(False, self.reason, "plug one in", self.level)
    def coverage(self, captured, config):
        return Placement("device", "lowered", {"device": 1}, {"aten.fancy": "no kernel"})
    def compile(self, captured, config):
        w, b = captured.module.state_dict().values()
        data = np.concatenate([w.numpy().ravel(), b.numpy()]).astype("float32").tobytes()
        files = {"w": torch.frombuffer(bytearray(data), dtype=torch.uint8)}
        return Payload(self.name, files, placement=Placement("device", self.reached), buckets=(1, 8))
    def load(self, payload, device, threads):
        if not self.here: raise BackendUnavailable(f"device: {self.reason}")
        flat = torch.frombuffer(bytearray(payload.files["w"].numpy().tobytes()), dtype=torch.float32)
        w, b, off, seen = flat[:12].view(4, 3), flat[12:], self.off, self.seen
        def run(xs):
            seen.append(len(xs[0]))
            return [xs[0] @ w.T + b + off]
        run.placement = Placement("device", "executed")
        return run
    seen: list = []


@pytest.fixture
def learn(tmp_path):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    torch.manual_seed(0)
    rows = [(torch.randn(3), torch.tensor(i % 4)) for i in range(20)]
    dls = DataLoaders(DataLoader(rows, bs=5), DataLoader(rows, bs=5))
    return Learner(dls, nn.Linear(3, 4), loss_func=nn.CrossEntropyLoss(), path=tmp_path)


def test_without_level_nothing_is_written_and_the_error_tells_how_far_it_went(learn, tmp_path):
    with registered(Device()), pytest.raises(BackendUnavailable) as e: learn.export("m.pkl", compile="device")
    for part in ("no device on the bus", "plug one in", "level='lowered'", "aten.fancy", "no kernel"): assert part in str(e.value)
    assert not (tmp_path / "m.pkl").exists()


def test_a_level_that_is_out_of_reach_is_refused(learn, tmp_path):
    with registered(Device()), pytest.raises(BackendUnavailable, match="plug one in"):
        learn.export("m.pkl", compile="device", level="compiled")
    with registered(Device("compiled", reached="lowered")), pytest.raises(BackendUnavailable, match="level='compiled'"):
        learn.export("m.pkl", compile="device", level="compiled")
    with registered(Device(level="")), pytest.raises(BackendUnavailable, match="no device"):
        learn.export("m.pkl", compile="device", level="lowered")
    assert not (tmp_path / "m.pkl").exists()


@pytest.mark.parametrize("how", [dict(compile=True), dict(compile=["device", "eager"])])
def test_level_wants_one_named_backend(learn, how):
    with registered(Device()), pytest.raises(ConfigError, match="name it"): learn.export("m.pkl", level="lowered", **how)


def test_a_misspelt_level(learn):
    with pytest.raises(ConfigError, match="Did you mean 'lowered'"): learn.export("m.pkl", compile="device", level="lowerd")


def test_true_never_considers_it(learn):
    with registered(Device()):
        report = learn.export("m.pkl", compile=True, budget_s=0)
        assert not [r for r in report.candidates if r["backend"] == "device"]
        assert next(r for r in report.candidates if r["backend"].endswith(" more"))["result"].startswith("not usable here")
        row = next(r for r in available_backends() if r["backend"] == "device")
    assert (row["usable"], row["as far as"]) == ("no", "lowered")


def test_what_is_only_by_name_is_not_tried(learn):
    d = Device()
    d.here, d.by_name = True, "it is slow"
    with registered(d):
        report = learn.export("m.pkl", compile=True, budget_s=0)
        assert next(r for r in report.candidates if r["backend"] == "device")["result"] == "only by name: it is slow"
        assert learn.export("n.pkl", compile="device").backend == "device"


def test_the_gate_is_deferred_to_the_target(learn, tmp_path):
    d = Device()
    with registered(d):
        report = learn.export("m.pkl", compile="device", level="lowered")
        assert "not run" in report.headline and json.loads(report.to_json())["gate"][0]["result"] == "not run here"
        facts = inspect_artifact(tmp_path / "m.pkl")
        assert facts["gate"] == "deferred: no device on the bus" and facts["level"] == "lowered" and not facts["timings_ms"]
        with pytest.raises(BackendUnavailable, match="no device"): open_learner(tmp_path / "m.pkl")
        with pytest.warns(UserWarning, match="the PyTorch model runs instead"):
            eager = open_learner(tmp_path / "m.pkl", on_mismatch="eager")
        x = torch.randn(21, 3)
        assert torch.equal(eager.model(x), learn.model(x))
        d.here = True
        opened = open_learner(tmp_path / "m.pkl")
        d.seen.clear()
        assert torch.allclose(opened.model(x), learn.model(x), atol=1e-6)
        assert d.seen == [8, 8, 8], "21 rows are two whole batches of 8 and one that is padded"
        d.off = .5
        with pytest.raises(VerificationError, match="made where its target is not"): open_learner(tmp_path / "m.pkl")


def test_padding_changes_no_row(learn, tmp_path):
    d = Device()
    d.here = True
    with registered(d):
        learn.export("m.pkl", compile="device")
        model = open_learner(tmp_path / "m.pkl").model
        assert model.max_bs == 8
        for n in (1, 2, 7, 8, 9, 16, 17):
            x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
            assert torch.allclose(model(x), learn.model(x), atol=1e-6) and model(x).is_contiguous()


def test_a_wrong_answer_here_is_no_file(learn, tmp_path):
    d = Device()
    d.here, d.off = True, .1
    with registered(d), pytest.raises(VerificationError): learn.export("m.pkl", compile="device")
    assert not (tmp_path / "m.pkl").exists()


# ---- open formats

class Plain(Device):
    name, open_format = "plain", "m.txt"
    def compile(self, captured, config):
        files = {"m.txt": torch.tensor(list(b"hello"), dtype=torch.uint8)}
        return Payload(self.name, files, placement=Placement("text", self.reached))


def test_an_open_format_is_a_plain_file(learn, tmp_path):
    with registered(Plain("executed", "executed")):
        with pytest.raises(ConfigError, match="m.txt"): learn.export("m.pkl", compile="plain")
        report = learn.export("m.txt", compile="plain")
    assert (tmp_path / "m.txt").read_bytes() == b"hello" and "plain file" in report.headline and "m.txt" in report.next_call


def test_an_open_format_that_nothing_checked_needs_its_level(learn, tmp_path):
    with registered(Plain("compiled", "compiled")):
        with pytest.raises(BackendUnavailable, match="level='compiled'"): learn.export("m.txt", compile="plain")
        learn.export("m.txt", compile="plain", level="compiled")
    assert (tmp_path / "m.txt").exists()


def _folder(**files):
    return Payload("f", {f"pack/{k}": torch.tensor(list(v), dtype=torch.uint8) for k, v in files.items()})


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.pack"
    write_open_format(path, _folder(a=b"1", b=b"2"), "pack")
    assert sorted(p.name for p in path.iterdir()) == ["a", "b"]
    write_open_format(path, _folder(c=b"3"), "pack")
    assert [p.name for p in path.iterdir()] == ["c"] and [p.name for p in tmp_path.iterdir()] == ["x.pack"]
    from pathlib import Path
    def full(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match="as it was"): write_open_format(path, _folder(d=b"4"), "pack")
    assert [p.name for p in path.iterdir()] == ["c"] and [p.name for p in tmp_path.iterdir()] == ["x.pack"]


def test_a_fallback_on_the_target_is_an_error_unless_allowed(learn, tmp_path):
    class Leaky(Device):
        def load(self, *args):
            run = super().load(*args)
            run.placement = Placement("device", "executed", {"device": 1}, {"aten.addmm": "runs on the CPU"})
            return run
    d = Leaky()
    with registered(d):
        learn.export("m.pkl", compile="device", level="lowered")
        learn.export("n.pkl", compile="device", level="lowered", allow_fallback="aten.addmm")
        d.here = True
        with pytest.raises(FallbackError, match="aten.addmm"): open_learner(tmp_path / "m.pkl")
        open_learner(tmp_path / "n.pkl")


def test_the_report_tells_rewrites_and_what_was_measured(image_folder, tmp_path):
    "fastai's pooling has an equal form that such targets take; what it was rewritten into, and how far off, is not kept quiet"
    class Measures(Device):
        rewrites = ("concat_pool",)
        def compile(self, captured, config):
            return Payload(self.name, {"w": torch.zeros(1, dtype=torch.uint8)}, placement=Placement("device", "lowered"),
                           choices={"off in fp32": 1.25e-7, "off in fp16": 2e-3})
    learn = make_learner("image", tmp_path, epochs=0)
    with registered(Measures()): report = learn.export("m.pkl", compile="device", level="lowered")
    assert "rewritten, proven equal: concat_pool (1)" in report.notes and report.candidates[0]["backend"] == "device"
    assert report.candidates[0]["largest difference"] == "1.2e-07 (off in fp32)"


def test_the_learner_comes_back(learn):
    before, state = dict(vars(learn)), {k: v.clone() for k, v in learn.model.state_dict().items()}
    with registered(Device()): learn.export("m.pkl", compile="device", level="lowered")
    assert all(vars(learn)[k] is v for k, v in before.items()) and learn.model.training
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in state.items())


def test_a_table_learner_too(tmp_path):
    (tmp_path / "t").mkdir()
    learn = make_learner("table", tmp_path / "t")
    with registered(Device()), pytest.raises(BackendUnavailable, match="cannot run here"):
        learn.export("m.pkl", compile="device")
