"""`learn.explain`: what an export would meet, and the learner is as it was."""
import pytest
import torch
from torch import nn

import fastai_compile.explain  # noqa: F401 - patches Learner
from fastai_compile.backends.base import Placement, Probe
from fastai_compile.errors import ConfigError
from helpers import Wrapped, make_learner, registered


@pytest.fixture
def learn(tmp_path): return make_learner("table", tmp_path, epochs=0)


def found(told, part): return [r for r in told.rows if r["part"] == part]


def test_a_learner_that_exports(learn):
    model, state, modes = learn.model, torch.get_rng_state(), [m.training for m in learn.model.modules()]
    told = learn.explain(["eager"])
    assert told.ok and not told.breaks
    assert [r["found"] for r in found(told, "break")] == ["no graph break"]
    assert "batch 1 to 64" in found(told, "sizes")[0]["found"]
    assert {r["what"] for r in found(told, "backend")} == {"eager"}
    assert learn.model is model and torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in learn.model.modules()]
    assert "<table>" in told._repr_html_() and "no graph break" in repr(told)


class Loud(nn.Module):
    def forward(self, x):
        if x.sum() > 1e9: x = x * 0
        return x


class Noisy(nn.Module):
    def forward(self, x):
        print("noisy")
        return x


def test_a_break_that_stops_an_export(learn):
    learn.model.layers.append(Loud())
    told = learn.explain(["eager"])
    assert not told.ok and [(r.layer.split(".")[0], r.cls) for r in told.breaks] == [("layers", "Loud")]
    assert "CaptureError" in found(told, "capture")[0]["found"] or "GraphBreakError" in found(told, "capture")[0]["found"]
    assert [r["found"] for r in found(told, "backend")] == ["can run here; not asked, because the capture failed"]


def test_a_break_that_does_not(learn):
    learn.model.layers.append(Noisy())
    told = learn.explain(["eager"])
    assert told.ok and told.breaks[0].cls == "Noisy"
    assert "does not stop an export" in found(told, "break")[0]["found"]


class Refuses(Wrapped):
    def coverage(self, captured, config): return Placement("a chip", "lowered", elsewhere={"aten.linear.default": "unknown"})

class Absent(Wrapped):
    def probe(self, device): return Probe(False, "no such package", "pip install it")

class Crashes(Wrapped):
    def coverage(self, captured, config): raise ZeroDivisionError("bad day")


def test_what_backends_say(learn):
    with registered(Refuses(), Absent(), Crashes()):
        told = learn.explain(["refuses", "absent", "crashes"])
    rows = {r["what"]: r for r in found(told, "backend")}
    assert "would refuse aten.linear.default: unknown" in rows["refuses"]["found"]
    assert rows["absent"]["what to do"] == "pip install it" and "ZeroDivisionError: bad day" in rows["crashes"]["found"]
    assert not told.ok


def test_images_whose_size_could_vary(tmp_path):
    told = make_learner("image", tmp_path, epochs=0).explain(["eager"])
    assert any("could vary" in r["found"] for r in found(told, "sizes"))


def test_wrong_choices(learn):
    with pytest.raises(ConfigError, match="max_bs"): learn.explain(True, max_bz=3)
    with pytest.raises(ConfigError, match="onnxruntime"): learn.explain("onnxruntim")
