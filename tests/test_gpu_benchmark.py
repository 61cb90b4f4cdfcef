"""benchmarks/gpu.py and gpu_predict.py, as far as they can be tested without a GPU."""
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, gpu_predict
from fastai_compile.backends.cuda import no_gpu
from helpers import ROOT


def test_on_the_cpu_it_says_so_and_writes_nothing(tmp_path):
    before = gpu.OUT.read_bytes() if gpu.OUT.exists() else None
    run = subprocess.run([sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path / "x.json")],
                         cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "This is no GPU measurement" in run.stdout and "no GPU;" in run.stdout
    for name in ("eager", "torch.compile(mode='default')", "inductor AOT"): assert f"| {name} |" in run.stdout
    assert not list(tmp_path.iterdir()) and (gpu.OUT.read_bytes() if gpu.OUT.exists() else None) == before


def test_end_to_end_on_the_cpu(tmp_path, monkeypatch, capsys):
    words = ["gpu_predict.py", "--device", "cpu", "--model", "resnet18", "--pictures", "6", "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_predict.main() == 0
    said = capsys.readouterr().out
    assert "This is no GPU measurement" in said and "| ours, fp32 | 6 |" in said and "100.00%" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [gpu, gpu_predict])
def test_without_a_gpu_nothing_is_measured(script, tmp_path, monkeypatch, capsys):
    if not no_gpu()[0]: pytest.skip("a GPU is here")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "x.json")])
    assert script.main() == 1 and "Nothing was measured" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wrong_candidate_is_not_timed():
    x = torch.ones(2, 3)
    makers = {"eager": lambda: lambda x: x * 2, "wrong": lambda: lambda x: x * 2 + 1, "nan": lambda: lambda x: x * float("nan")}
    fns, made, missing = gpu.make(makers, x, x * 2, 1e-3, "cpu")
    assert list(fns) == ["eager"] and "wrong by 1" in missing["wrong"] and "wrong by nan" in missing["nan"]


def test_percentiles():
    rounds = [[1.0] * 100] * 9 + [[1.0] * 90 + [7.0] * 10]
    s = gpu.summary(rounds, [[2.0] * 100] * 10)
    assert s["p50_ms"] == 1 and s["p99_ms"] == 7 and s["calls"] == 1000 and s["times_eager"] == 2
    assert gpu.summary(rounds[:4], rounds[:4])["p99_ms"] is None  # 400 calls say nothing about one in a hundred
