"""What is random never reaches a file unnoticed: `export` freezes it or names it; and nothing runs elsewhere unnoticed."""
import json
import re

import pytest
import torch
from fastai.learner import load_learner
from fastai.vision.all import get_image_files

from fastai_compile import (ConfigError, FallbackError, FreezeTransforms, RandomTransformError, VerificationError,
                            inspect_artifact)
from fastai_compile.backends.base import Placement, register_backend, _registry
from fastai_compile.backends.onnxruntime import OnnxRuntimeBackend
from fastai_compile.reach import difference
import random_mistakes as cases
from helpers import make_images
from test_freeze import predicted_afresh, preds

each_unsettled = pytest.mark.parametrize("case", [c for c in cases.MISTAKES if c.auto == "raises"], ids=lambda c: c.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_images(tmp_path_factory.mktemp("pixels"), n=20)


def case_of(name): return next(c for c in cases.MISTAKES if c.name == name)


# ---- random transforms

@each_unsettled
def test_export_names_what_it_does_not_freeze(case, folder, tmp_path):
    learn, path = case.make(folder), tmp_path / "model.pkl"
    path.write_bytes(b"what was there")
    dls, cbs = learn.dls, list(learn.cbs)
    with pytest.raises(RandomTransformError, match=re.escape(case.finds)) as e:
        learn.export(path, compile="eager")
    for p in ("skip", "seed"):
        told = f"learn.export(path, compile=True, freeze={p!r})" in str(e.value)
        assert told == (getattr(case, p) != "raises"), "a way out is named where it is one"
    assert path.read_bytes() == b"what was there" and learn.dls is dls and list(learn.cbs) == cbs


def test_frozen_survives_a_compiled_export_and_a_fresh_process(folder, tmp_path):
    wanted, tried = {}, {}
    for case in cases.MISTAKES[::4]: # `benchmarks/diagnose.py` does all, tests/test_freeze.py all with a stock export
        policy = next((p for p in ("seed", "skip", "auto") if getattr(case, p) not in ("raises", "in order")), None)
        if policy is None: continue
        learn = case.make(folder)
        dls, items = learn.dls, cases.items_of(learn, folder)
        if isinstance(items[0] if isinstance(items, list) else 0, str): continue # these models take one length of text
        report = learn.export(tmp_path / f"{case.name}.pkl", compile="eager", freeze=policy, verify="numbers")
        assert learn.dls is dls and [r["frozen"] for r in report.frozen] == [getattr(case, policy)]
        torch.save(items, tmp_path / f"{case.name}.items")
        again = load_learner(tmp_path / f"{case.name}.pkl")
        wanted[case.name] = preds(again, 1, dl=again.dls.test_dl(items, num_workers=0)).tolist()
        tried[case.name] = policy
    assert len(wanted) >= 8
    got = predicted_afresh(tmp_path)
    assert got.keys() == wanted.keys()
    wrong = {n: tried[n] for n in wanted for p in got[n] if difference(torch.tensor(p),
                                                                       torch.tensor(wanted[n])) is not None}
    assert not wrong


def test_what_was_frozen_is_in_the_report_and_in_the_file(folder, tmp_path):
    learn = case_of("augmentation_of_a_raw_dataset").make(folder)
    report = learn.export(tmp_path / "model.pkl", compile="onnxruntime")
    rows = [(r["transform"].split(" ")[0], r["frozen"]) for r in report.frozen]
    assert rows == [("Flip", "valid")] and "Flip" in repr(report) and "Flip" in report._repr_html_()
    assert json.loads(report.to_json())["frozen"][0]["frozen"] == "valid"
    assert inspect_artifact(tmp_path / "model.pkl")["frozen"][0]["frozen"] == "valid"
    assert difference(preds(learn, 1), preds(learn, 2)) is not None, "the live learner is as it was"


def test_nothing_random_nothing_listed(folder, tmp_path):
    report = cases.images(folder).export(tmp_path / "model.pkl", compile="eager")
    assert report.frozen == [] and inspect_artifact(tmp_path / "model.pkl")["frozen"] == []


def test_the_policy_of_a_callback_counts(folder, tmp_path):
    learn = cases.images(folder, batch=[cases.torch_noise])
    learn.add_cb(FreezeTransforms("skip"))
    assert [r["frozen"] for r in learn.export(tmp_path / "model.pkl", compile="eager").frozen] == ["skip"]
    assert [r["frozen"] for r in learn.export(tmp_path / "model.pkl", compile="eager", freeze="seed").frozen] == ["seed"]
    with pytest.raises(RandomTransformError, match="torch_noise"):
        learn.export(tmp_path / "model.pkl", compile="eager", freeze="raise")


def test_a_learner_without_data(folder, tmp_path):
    cases.images(folder, batch=[cases.torch_noise]).export(tmp_path / "stock.pkl")
    learn = load_learner(tmp_path / "stock.pkl")
    with pytest.raises(RandomTransformError, match="torch_noise"): learn.export(tmp_path / "model.pkl", compile="eager")
    report = learn.export(tmp_path / "model.pkl", compile="eager", freeze="seed")
    assert [r["frozen"] for r in report.frozen] == ["seed"]
    again, files = load_learner(tmp_path / "model.pkl"), get_image_files(folder).sorted()[:5]
    first, turned = [preds(again, s, dl=again.dls.test_dl(f)) for s, f in ((1, files), (2, files[::-1]))]
    torch.testing.assert_close(first, turned.flip(0), rtol=1e-4, atol=1e-5)


def test_a_failing_export_puts_the_loaders_back(folder, tmp_path):
    learn = cases.images(folder, batch=[cases.torch_noise])
    dls = learn.dls
    with pytest.raises(VerificationError):
        learn.export(tmp_path / "model.pkl", compile="onnxruntime", freeze="seed", tolerance=1e-30)
    assert learn.dls is dls and not (tmp_path / "model.pkl").exists()


def test_export_of_a_compiled_learner_freezes_nothing_twice(folder, tmp_path):
    cases.images(folder, batch=[cases.torch_noise]).export(tmp_path / "one.pkl", compile="eager", freeze="skip")
    learn = load_learner(tmp_path / "one.pkl")
    assert learn.export(tmp_path / "two.pkl", compile="onnxruntime").frozen == []
    again, files = load_learner(tmp_path / "two.pkl"), get_image_files(folder).sorted()[:5]
    first, second = [preds(o, 1, dl=o.dls.test_dl(files)) for o in (learn, again)]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_unknown_policy(folder, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'valid'"):
        cases.images(folder).export(tmp_path / "model.pkl", compile="eager", freeze="vaild")


def test_explain_says_what_would_be_frozen(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    said = {r["part"]: r["found"] for r in learn.explain("onnxruntime").rows}
    assert said["freeze"].startswith("would raise: torch_noise")
    rows = [r for r in learn.explain("onnxruntime", freeze="seed").rows if r["part"] == "freeze"]
    assert [r["found"] for r in rows] == ["would be frozen: seed"]


# ---- placement

class Partly(OnnxRuntimeBackend):
    "ONNX Runtime, which says that it left operators to somebody else"
    name, says = "partly", Placement("a chip", "executed", {"chip": 3}, {"aten.relu.default": "the CPU: no kernel"})
    def load(self, payload, device, threads):
        run = super().load(payload, device, threads)
        run.placement = self.says
        return run


@pytest.fixture
def partly():
    b = Partly()
    yield register_backend(b)
    _registry.pop(b.name)


def test_an_operator_elsewhere_is_an_error(partly, folder, tmp_path):
    learn = cases.images(folder)
    with pytest.raises(FallbackError, match=r"aten.relu.default: the CPU.*allow_fallback=\['aten.relu.default'\]"):
        learn.export(tmp_path / "model.pkl", compile="partly")
    with pytest.raises(FallbackError): learn.export(tmp_path / "model.pkl", compile="partly", allow_fallback="aten.add.Tensor")
    assert not (tmp_path / "model.pkl").exists()
    report = learn.export(tmp_path / "model.pkl", compile="partly", allow_fallback="aten.relu.default")
    assert "aten.relu.default elsewhere: the CPU" in report.placement
    assert "aten.relu.default elsewhere" in inspect_artifact(tmp_path / "model.pkl")["placement"]
    assert "allow_fallback=('aten.relu.default',)" in report.pinned


def test_an_operator_elsewhere_on_the_host_that_opens(partly, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Partly, "says", Placement("a chip", "executed", {"chip": 3}))
    cases.images(folder).export(tmp_path / "model.pkl", compile="partly")
    load_learner(tmp_path / "model.pkl")
    monkeypatch.undo()
    with pytest.raises(FallbackError, match="aten.relu.default"): load_learner(tmp_path / "model.pkl")


def test_what_does_not_run_is_not_believed(partly, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Partly, "says", Placement("a chip", "compiled"))
    with pytest.raises(FallbackError, match="not that it runs"): cases.images(folder).export(tmp_path / "m.pkl", compile="partly")


def test_answers_on_another_device(partly, folder, tmp_path, monkeypatch):
    def load(self, payload, device, threads):
        run = OnnxRuntimeBackend.load(self, payload, device, threads)
        def elsewhere(xs): return [o.to("meta") for o in run(xs)]
        elsewhere.placement = run.placement
        return elsewhere
    monkeypatch.setattr(Partly, "load", load)
    with pytest.raises(FallbackError, match="answered on meta"): cases.images(folder).export(tmp_path / "m.pkl", compile="partly")


def test_true_lists_the_one_that_fell_back(partly, folder, tmp_path):
    report = cases.images(folder).export(tmp_path / "model.pkl", compile=["partly", "onnxruntime"])
    said = {r["backend"]: r["result"] for r in report.candidates}
    assert report.backend in ("onnxruntime", "eager") and said["partly"].startswith("FallbackError: 1 operators did not land")
