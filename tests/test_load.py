"""Opening a file: in a bare process, on another host, without a definition, without data; and writing it again."""
import copy
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pickle
import platform
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.vision.all import (CategoryBlock, ClassificationInterpretation, DataBlock, ImageBlock, Learner, Resize, accuracy,
                               get_image_files, load_learner, nn, noop)

from fastai_compile import (ArtifactError, BackendUnavailable, CompiledModel, CompileError, ConfigError, HostMismatch,
                            MissingDefinition, NotTrainable, inspect_artifact, open_learner)
from fastai_compile.artifact import _blob_of, read_blob, write_artifact
from fastai_compile.backends.base import Probe, get_backend, torch_version
from helpers import (RUNS, KINDS, Wrapped, assert_close, contents, eager_of, fresh, items_of, make_frame, make_images,
                     make_learner, needs_backend, random_inputs, registered, run, small_cnn, table_learner)

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
LOADERS = {"open_learner": open_learner, "load_learner": load_learner}
both = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def preds_of(learn, kind, folder):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(items_of(kind, folder), num_workers=0))[0]


def parts(path):
    "(manifest, inner file) of a compiled file"
    manifest, inner = read_blob(_blob_of(path))
    return dict(manifest), bytes(inner)


def rewritten(path, out, **changes):
    "The file at `path` with another manifest, soundly hashed"
    manifest, inner = parts(path)
    write_artifact(out, {**manifest, **changes}, inner)
    return out


@pytest.fixture(scope="session")
def table(artifacts):
    "A compiled table file that every machine can make, its learner and its folder"
    return artifacts("eager", "table")


# ---- a bare process

BARE = """
import os, sys
import numpy as np
from fastai.vision.all import *
from fastai.tabular.all import *
started = []
WATCHED = ('subprocess.Popen', 'os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.startfile')
sys.addaudithook(lambda event, args: started.append(f'{{event}} {{args}}'[:200]) if event in WATCHED else None)
assert 'fastai_compile' not in sys.modules
import shutil, torch
assert not any(map(shutil.which, ('g++', 'gcc', 'cc', 'c++', 'clang', 'clang++', 'ninja', 'ld')))
wrong, backends = [], []
for path, kind, items, want in {files!r}:
    learn = load_learner(path)
    learn.remove_cb(ProgressCallback)
    its = [Path(i) for i in items] if kind == 'image' else pd.read_csv(items)
    preds = learn.get_preds(dl=learn.dls.test_dl(its, num_workers=0))[0].numpy()
    ones = [learn.predict(its[0] if kind == 'image' else its.iloc[0])]
    good = np.load(want)
    off = float(np.abs(preds - good['preds']).max())
    if off > 1e-5: wrong.append(f'{{path}}: get_preds is off by {{off}}')
    if (preds.argmax(1) != good['preds'].argmax(1)).any(): wrong.append(f'{{path}}: other labels')
    if np.abs(ones[0][2].numpy() - good['one']).max() > 1e-5: wrong.append(f'{{path}}: predict is off')
    backends.append(type(learn.model).__name__ + ' ' + learn.model.payload.backend)
from torch._dynamo.utils import counters
compiled = {{k: dict(v) for k, v in counters.items() if v}}
if 'torch._inductor.metrics' in sys.modules:
    from torch._inductor import metrics
    if metrics.generated_kernel_count: compiled['kernels'] = metrics.generated_kernel_count
answer(dict(wrong=wrong, backends=backends, compiled=compiled, started=started))
"""


def test_bare_process(artifacts, tmp_path):
    """Stock `load_learner`, no compiler on PATH, no home, no cache: nothing compiles, no process starts, nothing is left behind,
    and the predictions are those of the process that exported"""
    files = []
    for backend in RUNS:
        for kind in KINDS:
            art = artifacts(backend, kind)
            items, want = items_of(kind, art.learn.path), tmp_path / f"{backend}-{kind}.npz"
            np.savez(want, preds=preds_of(art.learn, kind, art.learn.path),
                     one=art.learn.predict(items[0] if kind == "image" else items.iloc[0])[2])
            if kind == "image": names = [str(o) for o in items]
            else: items.to_csv(names := str(tmp_path / "items.csv"), index=False)
            files.append((str(art.path), kind, names, str(want)))
    cache, tmp = tmp_path / "cache", tmp_path / "tmp"
    for d in (cache, tmp): d.mkdir()
    nowhere = "/proc/nowhere"
    env = {**dict.fromkeys(("PATH", "HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_HOME"), nowhere),
           "TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(tmp), "MPLCONFIGDIR": str(tmp_path), "CXX": None, "CC": None,
           "PYTHONDONTWRITEBYTECODE": "1"}
    got = fresh(BARE.format(files=files), env)
    assert not got["wrong"] and not got["compiled"] and not got["started"], got
    assert got["backends"] == [f"CompiledModel {Path(f[0]).stem.split('-')[1]}" for f in files]
    assert not list(cache.iterdir()), "something was compiled into the cache"
    assert not list(tmp.iterdir()), "unpacked files were left in TMPDIR"


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("kind", KINDS)
@both
def test_same_predictions(backend, kind, load, artifacts):
    art = artifacts(backend, kind)
    learn = load(art.path)
    assert type(learn) is type(art.learn) and isinstance(learn.model, CompiledModel)
    assert_close(preds_of(learn, kind, art.learn.path), preds_of(art.learn, kind, art.learn.path))
    assert list(learn.dls.vocab) == list(art.learn.dls.vocab)
    items = items_of(kind, art.learn.path)
    a, b = (o.predict(items[0] if kind == "image" else items.iloc[0]) for o in (learn, art.learn))
    assert torch.equal(a[1], b[1]) and (kind == "table" or a[0] == b[0])


# ---- what fastai does with a learner

@pytest.fixture(scope="session")
def with_data(artifacts):
    "An opened learner that was given its loaders back"
    art = artifacts("onnxruntime" if get_backend("onnxruntime").probe("cpu").usable else "eager", "image")
    learn = art.open()
    learn.dls = art.learn.dls
    return learn, art.learn


def test_predict_warns_nothing(table):
    learn, item = table.open(), make_frame(3).drop(columns="label").iloc[0]
    table.learn.predict(item)
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        learn.predict(item)
    with warnings.catch_warnings(record=True) as stock:
        warnings.simplefilter("always")
        table.learn.predict(item)
    assert {str(w.message) for w in ours} <= {str(w.message) for w in stock}


def test_validate(with_data):
    learn, stock = with_data
    a, b = learn.validate(), stock.validate()
    assert len(a) == len(b) == 2 and np.allclose(a, b, atol=1e-5)


def test_get_preds_in_all_its_forms(with_data):
    learn, stock = with_data
    for kw in ({}, {"with_input": True}, {"with_loss": True}, {"with_decoded": True}, {"act": noop}, {"inner": True},
               {"dl": stock.dls.test_dl(get_image_files(stock.path)[:13], with_labels=True, num_workers=0)}):
        a, b = learn.get_preds(**kw), stock.get_preds(**kw)
        for x, y in zip(a, b, strict=True):
            if isinstance(y, torch.Tensor): assert_close(*[t.as_subclass(torch.Tensor) for t in (x, y)])


def test_interpretation(with_data):
    learn, stock = with_data
    a, b = (ClassificationInterpretation.from_learner(o).confusion_matrix() for o in (learn, stock))
    assert (a == b).all()


def test_show_results_tta_and_summary(with_data, capsys):
    learn, stock = with_data
    learn.show_results(max_n=2)
    with learn.no_bar(): preds, _ = learn.tta(n=1)
    assert preds.shape == stock.get_preds()[0].shape
    text = repr(learn.summary())
    total = sum(p.numel() for p in stock.model.parameters())
    assert f"{total:,}" in text, text


def test_saved_weights_load_into_the_pytorch_model(with_data, tmp_path):
    learn, stock = with_data
    learn.save(tmp_path / "weights")
    other = Learner(stock.dls, small_cnn(), loss_func=stock.loss_func)
    other.load(tmp_path / "weights")
    weights = [o.model.state_dict().values() for o in (other, stock)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_stock_export_is_stock(table, tmp_path):
    "`compile=None` writes what fastai writes, and what it loads is no compiled learner"
    assert table.learn.export(tmp_path / "stock.pkl") is None
    assert type(load_learner(tmp_path / "stock.pkl").model) is type(table.learn.model)
    with pytest.raises(ArtifactError, match="load_learner"): open_learner(tmp_path / "stock.pkl")
    with pytest.raises(ArtifactError): inspect_artifact(tmp_path / "stock.pkl")


def test_no_file(tmp_path):
    with pytest.raises(ArtifactError, match="no file"): open_learner(tmp_path / "none.pkl")
    with pytest.raises(ArtifactError): open_learner(tmp_path)
    (tmp_path / "empty.pkl").touch()
    with pytest.raises(ArtifactError): open_learner(tmp_path / "empty.pkl")


# ---- definitions

MODULE = """
def label(path): return path.parent.name
def score(preds, targs): return (preds.argmax(1) == targs).float().mean()
class Block:
    @staticmethod
    def label(path): return path.parent.name
"""


def _block_learner(folder, get_y, metrics=accuracy):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=get_y, item_tfms=Resize(32))
    learn = Learner(block.dataloaders(folder, bs=8, num_workers=0), small_cnn(), metrics=metrics, loss_func=nn.CrossEntropyLoss())
    learn.logger = noop
    return learn


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A user's module, importable until the function that comes with it is called"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "labels_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    module = importlib.import_module("labels_of_mine")
    def gone():
        sys.path.remove(str(tmp_path / "src"))
        sys.modules.pop("labels_of_mine", None)
        importlib.invalidate_caches()
    yield module, gone
    sys.modules.pop("labels_of_mine", None)


@pytest.mark.parametrize("name", ["label", "Block.label", "score"])
@both
def test_missing_module(mine, name, load, image_folder, tmp_path):
    module, gone = mine
    if name == "score": learn = _block_learner(image_folder, lambda p: p.parent.name, module.score)
    else: learn = _block_learner(image_folder, module.Block.label if "." in name else module.label)
    path = tmp_path / "x.pkl"
    learn.export(path, compile="eager")
    assert isinstance(load(path), Learner)
    assert any(n.startswith("labels_of_mine.") for n in inspect_artifact(path)["not_installed"])
    gone()
    with pytest.raises(MissingDefinition, match="from labels_of_mine import " + name.split(".")[0]) as e: load(path)
    assert "PYTHONPATH" in str(e.value)


def _export_with_copied_function(module, image_folder, path):
    "A file with a function of the script, which uses `module`"
    f = types.FunctionType(_labelled.__code__, {"labels_of_mine": module, "__name__": "__main__"}, "labelled")
    f.__module__, f.__qualname__ = "__main__", "labelled"
    _block_learner(image_folder, f).export(path, compile="eager")


@both
def test_missing_module_of_a_copied_function(mine, load, image_folder, tmp_path):
    "A function of the script travels in the file; the module that it uses does not"
    module, gone = mine
    _export_with_copied_function(module, image_folder, tmp_path / "x.pkl")
    assert isinstance(load(tmp_path / "x.pkl"), Learner)
    gone()
    with pytest.raises(MissingDefinition, match="`import labels_of_mine` works here"): load(tmp_path / "x.pkl")


def test_a_module_of_a_copied_function_is_in_the_manifest(mine, image_folder, tmp_path, monkeypatch):
    "It is missed before anything inside is unpickled"
    module, gone = mine
    _export_with_copied_function(module, image_folder, tmp_path / "x.pkl")
    seen = inspect_artifact(tmp_path / "x.pkl")
    assert ["labels_of_mine", ""] in seen["definitions"] and seen["not_installed"] == ["labels_of_mine"]
    assert seen["modules"]["labels_of_mine"] == "not an installed package"
    gone()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("something inside was unpickled"))
    with pytest.raises(MissingDefinition, match="`import labels_of_mine` works here"): open_learner(tmp_path / "x.pkl")


def test_a_module_that_travels_by_value_is_not_needed(mine, image_folder, tmp_path):
    module, gone = mine
    f = types.FunctionType(_labelled.__code__, {"labels_of_mine": module, "__name__": "__main__"}, "labelled")
    f.__module__, f.__qualname__ = "__main__", "labelled"
    cloudpickle.register_pickle_by_value(module)
    try: _block_learner(image_folder, f).export(tmp_path / "x.pkl", compile="eager")
    finally: cloudpickle.unregister_pickle_by_value(module)
    gone()
    assert not inspect_artifact(tmp_path / "x.pkl")["not_installed"] and isinstance(open_learner(tmp_path / "x.pkl"), Learner)


@both
@pytest.mark.parametrize("body,says", [
    ("def label(p: return 1", "SyntaxError"), ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ("1/0", "ZeroDivisionError"), ("import package_of_theirs", "`import package_of_theirs` works here"),
], ids=["syntax", "raises", "divides", "its own dependency"])
def test_a_module_that_cannot_be_imported(mine, load, body, says, image_folder, tmp_path):
    "Whatever the user's module raises is a `MissingDefinition` with the reason"
    module, gone = mine
    _block_learner(image_folder, module.label).export(tmp_path / "x.pkl", compile="eager")
    gone()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "labels_of_mine.py").write_text(body)
    sys.path.insert(0, str(tmp_path / "broken"))
    try:
        with pytest.raises(MissingDefinition, match=says) as e: load(tmp_path / "x.pkl")
    finally: sys.path.remove(str(tmp_path / "broken"))
    assert "labels_of_mine" in str(e.value)


def _labelled(path): return labels_of_mine.label(path)  # noqa: F821 - a global of the function that is made of it


@both
def test_missing_function(mine, load, image_folder, tmp_path):
    module, _ = mine
    _block_learner(image_folder, module.label).export(tmp_path / "x.pkl", compile="eager")
    del module.label
    with pytest.raises(MissingDefinition, match="'label' from module 'labels_of_mine'"): load(tmp_path / "x.pkl")


def test_main_function_by_reference(image_folder, tmp_path, monkeypatch):
    "With `pickle` instead of cloudpickle the script's own functions are needed where the file is opened"
    main = sys.modules["__main__"]
    f = types.FunctionType(_label.__code__, {}, "label_of_mine")
    f.__module__, f.__qualname__ = "__main__", "label_of_mine"
    monkeypatch.setattr(main, "label_of_mine", f, raising=False)
    learn = _block_learner(image_folder, f)
    learn.export(tmp_path / "pickle.pkl", pickle, compile="eager")
    learn.export(tmp_path / "cloudpickle.pkl", compile="eager")
    for name in ("pickle", "cloudpickle"): assert isinstance(open_learner(tmp_path / f"{name}.pkl"), Learner)
    assert ["__main__", "label_of_mine"] in inspect_artifact(tmp_path / "pickle.pkl")["definitions"]
    monkeypatch.delattr(main, "label_of_mine")
    for load in LOADERS.values():
        with pytest.raises(MissingDefinition, match="define `label_of_mine` in your script"): load(tmp_path / "pickle.pkl")
        assert isinstance(load(tmp_path / "cloudpickle.pkl"), Learner)


def _label(path): return path.parent.name


SCRIPT = """
from fastai.vision.all import *
from fastai_compile import *
THRESHOLD = 100
def bright(path): return 'bright' if np.array(PILImage.create(path)).max() > THRESHOLD + offset() else 'dark'
def offset(): return 80
class Half(Transform):
    def encodes(self, x: TensorImage): return x / 2
block = DataBlock((ImageBlock, CategoryBlock(vocab=['bright', 'dark'])), get_items=get_image_files, get_y=bright,
                  item_tfms=Resize(32), batch_tfms=[Half()])
set_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2))
learn = Learner(block.dataloaders({folder!r}, bs=8, num_workers=0), model, loss_func=CrossEntropyLossFlat())
learn.remove_cb(ProgressCallback)
learn.logger = noop
learn.export({path!r}, compile='eager')
answer([learn.predict(f)[2].tolist() for f in get_image_files({folder!r}).sorted()[:3]])
"""


def test_main_functions_of_a_script(image_folder, tmp_path):
    "Functions, classes and constants of `__main__` travel in the file"
    path = tmp_path / "x.pkl"
    want = fresh(SCRIPT.format(folder=str(image_folder), path=str(path)))
    learn = load_learner(path)
    got = [learn.predict(f)[2].tolist() for f in get_image_files(image_folder).sorted()[:3]]
    assert np.allclose(got, want, atol=1e-6)
    f = learn.dls.tfms[1].fs[0] if hasattr(learn.dls.tfms[1], "fs") else learn.dls.tfms[1][0]
    assert f(get_image_files(image_folder)[0]) in ("bright", "dark")


# ---- other hosts

class Needy(Wrapped):
    "A backend whose files need something that may not be here"
    def __init__(self, needs, inner="eager"):
        super().__init__(inner)
        self.needs, self.off, self.usable = needs, 0., True
    def probe(self, device): return Probe(self.usable, "made for this test", "no command")
    def compile(self, captured, config): return dataclasses.replace(super().compile(captured, config), needs=self.needs)
    def around(self, run, xs): return [t + self.off for t in run(xs)]


NEEDS = {"torch": ({"torch": "1.0.0"}, "made for torch 1.0.0"), "cpu": ({"cpu_flags": ["avx1024", "sse9"]}, "avx1024, sse9"),
         "package": ({"packages": {"no-such-package": "1.0"}}, "no-such-package"),
         "version": ({"packages": {"fastai": "99.0"}}, "fastai 99.0 or newer"), "system": ({"system": "Plan9"}, "Plan9"),
         "machine": ({"machine": "pdp11"}, "pdp11"), "something later": ({"colour": "red"}, "colour red"),
         "two": ({"torch": "1.0.0", "machine": "pdp11"}, "torch 1.0.0.*pdp11")}


@pytest.mark.parametrize("needs,says", NEEDS.values(), ids=NEEDS)
def test_unmet_needs_are_host_mismatches(needs, says, table, tmp_path):
    path = tmp_path / "x.pkl"
    with registered(Needy(needs)) as b:
        rewritten(table.path, path, needs=needs)
        for load in LOADERS.values():
            with pytest.raises(HostMismatch, match=says) as e: load(path)
            assert all(w in str(e.value) for w in ("rebuild", "eager", "FASTAI_COMPILE_ON_MISMATCH"))
        assert not b.compiled


@pytest.fixture
def needy(table, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTAI_COMPILE_ON_MISMATCH", raising=False)
    with registered(Needy({"torch": "1.0.0"})) as b:
        table.learn.export(tmp_path / "x.pkl", compile="needy")
        assert b.compiled == 1
        yield b, tmp_path / "x.pkl"


def _by_argument(path, choice, monkeypatch): return open_learner(path, on_mismatch=choice)
def _by_environment(path, choice, monkeypatch):
    monkeypatch.setenv("FASTAI_COMPILE_ON_MISMATCH", choice)
    return load_learner(path)


how = pytest.mark.parametrize("how", [_by_argument, _by_environment], ids=["argument", "environment"])


@how
def test_eager_on_mismatch(needy, how, table, monkeypatch):
    b, path = needy
    with pytest.warns(UserWarning, match="torch 1.0.0"): learn = how(path, "eager", monkeypatch)
    assert type(learn.model) is type(table.learn.model) and b.compiled == 1
    assert torch.equal(preds_of(learn, "table", None), preds_of(table.learn, "table", None))
    learn.dls = table.learn.dls
    learn.fit(1)


@how
def test_rebuild_on_mismatch(needy, how, table, monkeypatch):
    b, path = needy
    with pytest.warns(UserWarning, match="compiles again"): learn = how(path, "rebuild", monkeypatch)
    assert isinstance(learn.model, CompiledModel) and b.compiled == 2
    assert_close(preds_of(learn, "table", None), preds_of(table.learn, "table", None))
    b.needs = {}
    learn.export(path.with_name("again.pkl"), compile="needy")
    assert_close(preds_of(open_learner(path.with_name("again.pkl")), "table", None), preds_of(table.learn, "table", None))


@needs_backend("inductor")
def test_rebuild_with_inductor(artifacts, tmp_path):
    "A file from another torch: refused, then compiled for this one"
    art = artifacts("inductor", "table")
    needs = {**inspect_artifact(art.path)["needs"], "torch": "2.4.0"}
    path = rewritten(art.path, tmp_path / "x.pkl", needs=needs)
    with pytest.raises(HostMismatch, match="torch 2.4.0"): load_learner(path)
    with pytest.warns(UserWarning, match="compiles again"): learn = open_learner(path, "rebuild")
    assert learn.model.payload.backend == "inductor" and learn.model.payload.needs["torch"] == torch_version()
    assert_close(preds_of(learn, "table", None), preds_of(art.learn, "table", None))


def test_rebuild_keeps_the_choices(artifacts, tmp_path):
    learn = artifacts.learner("table")
    learn.export(tmp_path / "a.pkl", compile="onnxruntime", threads=1, max_bs=7, tolerance=1e-3)
    path = rewritten(tmp_path / "a.pkl", tmp_path / "b.pkl", needs={"machine": "none of this kind"})
    with pytest.warns(UserWarning, match="compiles again"): model = open_learner(path, "rebuild").model
    assert (model.threads, model.max_bs, model.config.tolerance) == (1, 7, 1e-3)


@needs_backend("inductor")
def test_inductor_needs_this_host(artifacts):
    art = artifacts("inductor", "table")
    needs = inspect_artifact(art.path)["needs"]
    assert needs["torch"] == torch_version() and "cpu_flags" in needs
    assert "this CPU type only" in art.report.runs_on


def test_onnxruntime_is_portable(artifacts):
    art = artifacts("onnxruntime", "table")
    assert set(inspect_artifact(art.path)["needs"]) == {"packages"} and "portable" in art.report.runs_on


def test_rebuild_where_the_backend_cannot_run(needy):
    b, path = needy
    b.usable = False
    with pytest.raises(BackendUnavailable, match="made for this test"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_learner(path, "rebuild")


def test_a_fitting_host_rebuilds_nothing(needy, monkeypatch):
    b, path = needy
    b.needs = {}
    fits = rewritten(path, path.with_name("fits.pkl"), needs={})
    for choice in ("raise", "rebuild", "eager"):
        learn = open_learner(fits, choice)
        assert isinstance(learn.model, CompiledModel) and b.compiled == 1


def test_no_such_choice(table, monkeypatch):
    with pytest.raises(ConfigError, match="raise, rebuild, eager"): open_learner(table.path, "compile")
    monkeypatch.setenv("FASTAI_COMPILE_ON_MISMATCH", "whatever")
    with pytest.raises(ConfigError, match="whatever"): load_learner(table.path)


def test_the_argument_is_above_the_environment(needy, monkeypatch):
    monkeypatch.setenv("FASTAI_COMPILE_ON_MISMATCH", "eager")
    with pytest.raises(HostMismatch): open_learner(needy[1], "raise")


@both
def test_another_answer_on_this_host(needy, load, monkeypatch, table):
    "Everything fits, but the reference row gives another answer than where the file was made"
    b, path = needy
    b.needs = {}
    fits = rewritten(path, path.with_name("fits.pkl"), needs={})
    assert load(fits)
    b.off = 0.01
    with pytest.raises(HostMismatch, match="reference row"): load(fits)
    b.off = float("nan")
    with pytest.raises(HostMismatch, match="reference row"): load(fits)
    monkeypatch.setenv("FASTAI_COMPILE_ON_MISMATCH", "eager")
    with pytest.warns(UserWarning): assert type(load(fits).model) is type(table.learn.model)


def test_a_backend_that_is_not_installed(table, tmp_path):
    with registered(Needy({})): table.learn.export(tmp_path / "x.pkl", compile="needy")
    for load in LOADERS.values():
        with pytest.raises(CompileError, match="needy"): load(tmp_path / "x.pkl")
    with pytest.warns(UserWarning): assert open_learner(tmp_path / "x.pkl", "eager")


# ---- nothing runs before it is checked

class Evil:
    def __init__(self, marker): self.marker = str(marker)
    def __reduce__(self): return os.mkdir, (self.marker,)


def _saved(o):
    buf = io.BytesIO()
    torch.save(o, buf)
    return buf.getvalue()


@pytest.fixture
def evil(table, tmp_path):
    "(marker, function that writes a file whose inner pickle makes the marker)"
    marker = tmp_path / "executed"
    def write(**changes):
        path = tmp_path / "evil.pkl"
        write_artifact(path, {**parts(table.path)[0], **changes}, _saved(Evil(marker)))
        return path
    return marker, write


def test_inspecting_executes_nothing(evil):
    marker, write = evil
    path = write()
    seen = inspect_artifact(path)
    assert seen["backend"] == "eager" and "python" in repr(seen) and not marker.exists()
    with pytest.raises(Exception): load_learner(path)  # noqa: B017
    assert marker.exists(), "the trap itself works"


def test_inspecting_tells_what_the_file_is(artifacts):
    art = artifacts("onnxruntime", "image")
    seen = inspect_artifact(art.path)
    assert seen["format"] == 1 and seen["backend"] == "onnxruntime" and seen["level"] == "executed"
    assert torch.__version__.startswith(seen["versions"]["torch"]) and seen["python"] == PYTHON
    assert seen["vocab"] == list(art.learn.dls.vocab) and seen["batch"] == [1, 64]
    assert seen["inputs"][0]["shape"] == ["batch", 3, 32, 32] and seen["inputs"][0]["dtype"] == "float32"
    assert seen["gate"]["numbers"] and seen["gate"]["answers"] and seen["reference"]["input"] == [[1, 3, 32, 32]]
    out, = seen["outputs"]
    assert out["shape"] == ["batch", 4] and out["dtype"] == "float32"
    assert seen["os"] == f"{platform.system()} {platform.machine()}" and set(seen["versions"]) >= {"torch", "fastai", "numpy"}
    assert set(seen["timings_ms"]) == {"1"} and set(seen["timings_ms"]["1"]) == {"eager", "onnxruntime"}
    assert all(t > 0 for t in seen["timings_ms"]["1"].values())
    answer = eager_of(art.learn)(art.open().model.reference["xb"][0])[0].tolist()
    assert np.allclose(seen["reference"]["output"], [answer], atol=1e-5)
    assert not seen["not_installed"] and "fastai" in seen["modules"]
    assert seen["sha256"] == hashlib.sha256(bytes(_blob_of(art.path))[40:]).hexdigest()
    json.dumps(seen)


@both
@pytest.mark.parametrize("changes,error", [
    ({"python": "3.9"}, HostMismatch), ({"python": "2.7"}, HostMismatch), ({"needs": {"torch": "0.4"}}, HostMismatch),
    ({"definitions": [["no_such_module_of_mine", "f"]]}, MissingDefinition), ({"format": 99}, ArtifactError),
], ids=["python39", "python27", "torch", "definition", "format"])
def test_refused_before_anything_inside_runs(evil, load, changes, error):
    marker, write = evil
    path = write(**changes)
    if "format" in changes:
        manifest, inner = parts(write())
        from fastai_compile import artifact
        data = path.read_bytes()
        blob = artifact.make_blob({**manifest, "format": 99}, inner)
        path.write_bytes(data) if artifact._blob_of(path) == blob else _put_blob(path, blob)
    with pytest.raises(error) as e: load(path)
    assert not marker.exists()
    if "python" in changes: assert all(v in str(e.value) for v in (changes["python"], PYTHON))
    if "format" in changes: assert "pip install -U" in str(e.value)


def _put_blob(path, blob):
    from fastai_compile.artifact import _Envelope
    torch.save(_Envelope(blob), path, pickle_protocol=2)


@pytest.mark.parametrize("choice", ["rebuild", "eager"])
def test_another_python_is_refused_whatever_is_chosen(evil, choice):
    marker, write = evil
    with pytest.raises(HostMismatch, match="3.9"): open_learner(write(python="3.9"), choice)
    assert not marker.exists()


@both
def test_a_changed_byte_runs_nothing(evil, load):
    marker, write = evil
    path = write()
    data = path.read_bytes()
    blob = bytes(_blob_of(path))
    for at in (0, 20, 45, 60, len(blob) // 2, len(blob) - 1):
        changed = bytearray(blob)
        changed[at] ^= 1
        _put_blob(path, bytes(changed))
        with pytest.raises(ArtifactError, match="damaged|no compiled learner"): load(path)
        assert not marker.exists()
    path.write_bytes(data)


def test_the_outer_pickle_is_not_run_by_ours(table, tmp_path):
    "`open_learner` and `inspect_artifact` take the blob out of the zip; they never unpickle the outer file"
    marker, path = tmp_path / "executed", tmp_path / "outer.pkl"
    with zipfile.ZipFile(table.path) as z, zipfile.ZipFile(path, "w") as out:
        for info in z.infolist():
            out.writestr(info.filename, pickle.dumps(Evil(marker), 2) if info.filename.endswith("data.pkl") else z.read(info))
    inspect_artifact(path)
    open_learner(path)
    assert not marker.exists()


# ---- writing it again

@pytest.mark.parametrize("backend", RUNS)
def test_export_of_a_compiled_learner(backend, artifacts, tmp_path):
    "`export()` rewrites the file whole: same model, same answers, same size, also over itself and through stock `load_learner`"
    art, path = artifacts(backend, "table"), tmp_path / "again.pkl"
    want, learn = preds_of(art.learn, "table", None), art.open()
    for load in (open_learner, load_learner, open_learner):
        assert learn.export(path) is None
        learn = load(path)
        assert_close(preds_of(learn, "table", None), want)
        assert abs(path.stat().st_size - art.path.stat().st_size) < 2000
    first, last = inspect_artifact(art.path), inspect_artifact(path)
    assert [k for k in first if first[k] != last.get(k) and k != "sha256"] in ([], ["definitions"])
    assert {tuple(d) for d in last["definitions"]} <= {tuple(d) for d in first["definitions"]}
    assert learn.to_eager().model.training is False


@pytest.mark.parametrize("backend", [b for b in RUNS if b != "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiling_a_compiled_learner(backend, kind, artifacts, tmp_path):
    "`export(compile=...)` compiles again from its weights, without data"
    art = artifacts("eager", kind)
    learn = load_learner(art.path)
    learn.export(tmp_path / "x.pkl", compile=backend)
    again = load_learner(tmp_path / "x.pkl")
    assert again.model.payload.backend == backend
    weights = [m.state_dict().values() for m in (again.model, art.learn.model)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert_close(preds_of(again, kind, art.learn.path), preds_of(art.learn, kind, art.learn.path))
    assert isinstance(again.to_eager().model, type(art.learn.model))


WRAPS = {"DataParallel": nn.DataParallel, "torch.compile": lambda m: torch.compile(m, backend="eager"),
         "model.compile": lambda m: m.compile(backend="eager") or m,
         "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager")}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_export_of_a_wrapped_compiled_learner(wrap, table, tmp_path):
    "`export()` looks through wrappers: the compiled file, whole, and the learner as it was"
    learn, path, dls = table.open(), tmp_path / "x.pkl", table.learn.dls
    learn.dls, learn.model = dls, wrap(learn.model)
    wrapped = learn.model
    path.write_bytes(b"old")
    learn.export(path)
    assert learn.model is wrapped and learn.dls is dls and len(dls.train_ds) and learn.opt is None
    again = open_learner(path)
    assert type(again.model) is CompiledModel and not len(again.dls.train_ds)
    assert torch.equal(preds_of(again, "table", None), preds_of(table.open(), "table", None))
    assert isinstance(again.to_eager().model, type(table.learn.model))
    torch._dynamo.reset()


def test_a_wrapped_compiled_learner_trains_again(table, tmp_path):
    "Also after it was compiled again: splitter and optimizer are the user's"
    learn = table.open()
    learn.dls, learn.model = table.learn.dls, nn.DataParallel(learn.model)
    with pytest.raises(NotTrainable): learn.lr_find(show_plot=False)
    learn.export(tmp_path / "x.pkl", compile="eager")
    for made in (open_learner(tmp_path / "x.pkl"), learn):
        made.to_eager()
        assert type(made.model) is type(table.learn.model) and made.splitter == table.learn.splitter
        made.dls = table.learn.dls
        made.fit(1)


def test_copies_of_an_opened_learner_give_its_answers(artifacts):
    art = artifacts("onnxruntime", "table")
    learn, want = art.open(), preds_of(art.learn, "table", None)
    for made in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn)), pickle.loads(cloudpickle.dumps(learn))):
        assert made is not learn and made.model is not learn.model and type(made.model) is CompiledModel
        assert_close(preds_of(made, "table", None), want)
        item = items_of("table", None).iloc[0]
        assert torch.equal(made.predict(item)[2], learn.predict(item)[2]) and type(made.to_eager().model) is type(art.learn.model)
    assert type(learn.model) is CompiledModel


def test_compiling_again_takes_edited_weights(table, tmp_path):
    learn = table.open()
    with torch.no_grad(): next(p for p in learn.model.parameters() if p.ndim == 2 and p.numel() > 100).mul_(1.5)
    with pytest.raises(NotTrainable): learn.export(tmp_path / "stale.pkl")
    assert not list(tmp_path.iterdir())
    learn.export(tmp_path / "x.pkl", compile="eager")
    again = open_learner(tmp_path / "x.pkl")
    xs = random_inputs(again.model, 3)
    assert_close(run(again.model, xs), run(learn.model.eager, xs))
    assert not torch.allclose(run(again.model, xs), run(eager_of(table.learn), xs))


def test_trained_again_and_exported_again(table, tmp_path):
    learn = table.open().to_eager()
    learn.dls = table.learn.dls
    learn.fit(1, 1e-2)
    learn.export(tmp_path / "x.pkl", compile="eager")
    assert_close(preds_of(open_learner(tmp_path / "x.pkl"), "table", None), preds_of(learn, "table", None))
    assert not torch.allclose(preds_of(learn, "table", None), preds_of(table.learn, "table", None))


@pytest.mark.parametrize("backend", [b for b in RUNS if b != "eager"])
def test_without_the_pytorch_model(backend, artifacts, tmp_path):
    art, path = artifacts(backend, "table"), tmp_path / "x.pkl"
    with registered(Wrapped(backend, "again", "table")):
        art.learn.export(path, compile="again", keep_eager=False)
        assert art.learn.model.training in (True, False) and not isinstance(art.learn.model, CompiledModel)
        learn = open_learner(path)
        assert learn.model.eager is None and inspect_artifact(path)["keep_eager"] is False
        want = preds_of(art.learn, "table", None)
        assert_close(preds_of(learn, "table", None), want)
        for what in (lambda: learn.to_eager(), lambda: learn.model.state_dict(), lambda: learn.fit(1),
                     lambda: learn.export(tmp_path / "y.pkl", compile="eager"), lambda: learn.save(tmp_path / "z")):
            with pytest.raises(NotTrainable): what()
        for train in (lambda: learn.fit(1), learn.unfreeze, lambda: learn.lr_find(show_plot=False), learn.to_eager):
            with pytest.raises(NotTrainable, match="without `keep_eager=False`"): train()
        copied = copy.deepcopy(learn.model)
        assert torch.equal(run(copied, random_inputs(copied, 3)), run(learn.model, random_inputs(copied, 3)))
        learn.export(tmp_path / "again.pkl")
        assert_close(preds_of(load_learner(tmp_path / "again.pkl"), "table", None), want)
        lacking = rewritten(path, tmp_path / "lacking.pkl", needs={"torch": "1.0"})
        for choice in ("raise", "eager", "rebuild"):
            with pytest.raises(HostMismatch, match="torch 1.0"): open_learner(lacking, choice)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pkl", "lacking.pkl", "x.pkl"]


def test_without_the_pytorch_model_is_smaller(artifacts, tmp_path, image_folder):
    "With a model whose weights are most of the file"
    learn = _block_learner(image_folder, lambda p: p.parent.name)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), nn.ReLU(), nn.Linear(64, 4))
    both = learn.export(tmp_path / "both.pkl", compile="onnxruntime").size_mb
    alone = learn.export(tmp_path / "alone.pkl", compile="onnxruntime", keep_eager=False).size_mb
    weights = sum(p.numel() * 4 for p in learn.model.parameters()) / 1e6
    assert both < 1.3 * weights + 0.2, f"the weights ({weights:.2f} MB) are in the file of {both:.2f} MB more than once"
    assert alone <= both


def test_eager_cannot_be_dropped_from_eager(table, tmp_path):
    with pytest.raises(CompileError, match="keep_eager"):
        table.learn.export(tmp_path / "x.pkl", compile="eager", keep_eager=False)
    assert not list(tmp_path.iterdir())


# ---- without data

@pytest.mark.parametrize("backend,kind", [(b, k) for b in RUNS for k in KINDS if b != "inductor" or k == "table"])
def test_from_a_stock_file(backend, kind, artifacts, tmp_path):
    "`load_learner` of fastai's own export, no data at hand, then a compiled export"
    art = artifacts(backend, kind)
    art.learn.export(tmp_path / "stock.pkl")
    stock = load_learner(tmp_path / "stock.pkl")
    assert not len(stock.dls.train_ds)
    report = stock.export(tmp_path / "x.pkl", compile=backend, options={"freezing": False} if backend == "inductor" else {})
    assert "made-up" in report.source and any("no validation data" in n for n in report.notes)
    learn = load_learner(tmp_path / "x.pkl")
    assert_close(preds_of(learn, kind, art.learn.path), preds_of(art.learn, kind, art.learn.path))


# ---- a user's data stays out

SECRET = "Wilhelmina-Quartermaine-1873"


def _private_table(path):
    df = make_frame()
    df["name"] = [f"{SECRET} {i}" for i in range(len(df))]
    df["width"] = df["width"] + 0.1234567891
    return df, table_learner(path, df=df)


@pytest.mark.parametrize("backend", RUNS)
def test_no_rows_in_the_file(backend, artifacts, tmp_path):
    artifacts(backend, "table")
    df, learn = _private_table(tmp_path)
    learn.fit(1)
    learn.predict(df.iloc[3])
    learn.validate()
    with registered(Wrapped(backend, "kept", "table" if backend == "inductor" else None)):
        if backend == "inductor": learn.model.load_state_dict(artifacts.learner("table").model.state_dict())
        learn.export(tmp_path / "x.pkl", compile="kept")
    assert all(SECRET.encode() not in part for part in contents((tmp_path / "x.pkl").read_bytes()))
    assert SECRET.encode() in cloudpickle.dumps(df), "the search itself works"
    b = learn.dls.valid.one_batch()
    numbers = [*df.width[:40].to_numpy(), *df.width[:40].to_numpy(np.float32), *b[1].numpy()[:40, 0]]
    for part in contents((tmp_path / "x.pkl").read_bytes()):
        found = [n for n in numbers if n.tobytes() in part]
        assert not found, f"values of rows are in the file: {found[:5]}"


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_names_and_no_source_paths_in_the_file(backend, kind, artifacts):
    art = artifacts(backend, kind)
    names = [b"scan_red", b"scan_blue", b".png", b"torchinductor_", str(Path(__file__).parent).encode()]
    if kind == "image": assert any("scan_red" in str(o) for o in art.learn.dls.valid.items)
    sources = re.compile(rb"(?:/[\w.+-]+){2,}\.(?:py|cpp|ipynb)\b")
    for part in contents(art.path.read_bytes()):
        found = {n for n in names if n in part} | {m.group() for m in sources.finditer(part)}
        found = {f for f in found if b"/site-packages/fastai/" not in f}  # cloudpickle names the file of a function it copies
        assert not found, found


def test_the_reference_row_is_made_up(artifacts, tmp_path):
    "Its numbers are the same whatever the data was"
    first = artifacts("eager", "image").open().model.reference["xb"]
    other = make_images(tmp_path / "images", seed=11)
    learn = make_learner("image", other)
    learn.export(tmp_path / "x.pkl", compile="eager")
    second = open_learner(tmp_path / "x.pkl").model.reference["xb"]
    assert len(first[0]) == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_of_the_last_batch_travels(artifacts, tmp_path):
    learn = make_learner("table", tmp_path)
    learn.export(tmp_path / "x.pkl", compile="eager")
    opened = open_learner(tmp_path / "x.pkl")
    for name in ("xb", "yb", "pred", "loss", "opt", "x", "y", "b", "dl"):
        v = vars(opened).get(name)
        assert v is None or v == () or v == (None,), f"{name} is {str(v)[:100]}"
    assert not len(opened.dls.train_ds) and not len(opened.dls.valid_ds)

