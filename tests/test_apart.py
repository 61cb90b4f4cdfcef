"""A compiler in a process of its own: the same file, and a crash that stays there."""
import os
import signal
import time

import pytest
import torch

from fastai_compile import BackendError, ConfigError, open_learner
from fastai_compile.backends.base import EagerBackend
from fastai_compile.apart import compile_apart
from fastai_compile.capture import capture
from fastai_compile.config import make_config
from fastai_compile.example import example_batch
from helpers import needs_backend, random_inputs, registered, run


class Crashes(EagerBackend):
    name, cost = "crashes", 991
    def compile(self, captured, config): os.kill(os.getpid(), self.signal)
    signal = signal.SIGSEGV


class Hangs(EagerBackend):
    name, cost = "hangs", 992
    def compile(self, captured, config): time.sleep(1000)


class Wrong(EagerBackend):
    name, cost = "wrong", 993
    def compile(self, captured, config): make_config(treads=1)


@needs_backend("onnxruntime")
def test_the_same_file(artifacts, tmp_path):
    kind = "table"
    learn, near = artifacts.learner(kind), artifacts("onnxruntime", kind)
    report = learn.export(tmp_path / "m.pkl", compile="onnxruntime", isolate=True)
    far = open_learner(tmp_path / "m.pkl").model
    assert abs(report.size_mb - near.report.size_mb) < .05, "weights are in the file once, as without `isolate`"
    xs = random_inputs(far, 3, 0)
    assert torch.equal(run(far, xs), run(near.open().model, xs))
    assert "isolate=True" in report.pinned


def test_a_crash_stays_there(artifacts, tmp_path):
    learn = artifacts.learner("table")
    with registered(Crashes()): report = learn.export(tmp_path / "m.pkl", compile=["crashes", "onnxruntime"], isolate=True)
    told = next(r["result"] for r in report.candidates if r["backend"] == "crashes")
    assert "SIGSEGV" in told and "unharmed" in told and report.backend == "onnxruntime"


@pytest.fixture(scope="module")
def captured(artifacts):
    learn = artifacts.learner("table")
    return capture(learn.model, example_batch(learn), 8)


def test_errors_come_back_as_they_are(captured):
    with pytest.raises(ConfigError, match="Did you mean 'threads'"): compile_apart(Wrong(), captured, make_config())


def test_what_hangs_is_ended(captured):
    with pytest.raises(BackendError, match="did not finish within 1 s"):
        compile_apart(Hangs(), captured, make_config(), timeout_s=1)


def test_isolate_is_yes_or_no(artifacts):
    with pytest.raises(ConfigError, match="isolate"): artifacts.learner("table").export("m.pkl", compile=True, isolate="yes")
