"""`available_backends()` looks at everything and imports none of the heavy stacks."""
import importlib.util
import re
import sysconfig
from pathlib import Path

import pytest

from fastai_compile.backends.base import distribution, get_backend, installed, unmet
from helpers import fresh, needs_backend

HEAVY = ["openvino", "executorch", "coremltools", "tensorrt", "torch_tensorrt", "onnxruntime", "onnx", "onnxscript",
         "onnx_ir", "torch_xla", "torch_neuronx", "torch_tpu", "libtpu", "cerebras", "triton", "torch._inductor.compile_fx",
         "torch._inductor.config", "torchao", "tensorflow", "jax"]


def test_probing_imports_no_heavy_stack():
    "The time is printed, not asserted: a busy machine proves nothing"
    res = fresh(f"""
import time, torch
import fastai.vision.all # torchvision brings torch._dynamo, and that triton
brought = set(sys.modules)
import fastai_compile
before = set(sys.modules)
start = time.perf_counter()
table = fastai_compile.available_backends()
seconds = time.perf_counter() - start
new = set(sys.modules) - before
heavy = {HEAVY!r}
answer(dict(rows=table, seconds=seconds, cuda=torch.cuda.is_initialized(), new=sorted(new),
            heavy=[m for m in heavy if m in new or any(n.startswith(m + '.') for n in new)],
            loaded=[m for m in heavy if m in set(sys.modules) - brought]))
""")
    print(f"{len(res['rows'])} targets probed in {res['seconds']*1000:.0f} ms")
    assert res["heavy"] == [] and res["loaded"] == [] and not res["cuda"]
    assert len(res["new"]) < 100, res["new"]


def test_every_row_says_why_and_what_to_do():
    from fastai_compile import available_backends
    rows = available_backends()
    assert len({r["backend"] for r in rows}) == len(rows)
    for r in rows:
        assert r["reason"], r
        if r["usable"] == "no": assert r["to mend it"], r
        assert not re.search(r"\n|  ", r["reason"]), r


# ---- ONNX Runtime from another distribution: the folder `onnxruntime` without a distribution of that name

def _linked(source, target, leave_out=()):
    target.mkdir()
    for p in source.iterdir():
        if p.name not in leave_out: (target / p.name).symlink_to(p)


def site_with(folder, dist):
    "The packages of this interpreter, where the files of ONNX Runtime come from `dist`, as its wheel writes them"
    site = Path(sysconfig.get_paths()["platlib"])
    if not (site / "onnxruntime").is_dir(): pytest.skip(f"onnxruntime is not in {site}")
    info = next(site.glob("onnxruntime-*.dist-info"), None)
    if info is None: pytest.skip(f"the onnxruntime of {site} is of another distribution already")
    version = info.name.removesuffix(".dist-info").split("-")[1]
    _linked(site, folder, ("onnxruntime", info.name, "__pycache__"))
    _linked(site / "onnxruntime", folder / "onnxruntime", ("capi",))
    said = "build_and_package_info.py"
    _linked(site / "onnxruntime/capi", folder / "onnxruntime/capi", (said,))
    text = (site / "onnxruntime/capi" / said).read_text()
    (folder / "onnxruntime/capi" / said).write_text(re.sub("package_name = '.*'", f"package_name = '{dist}'", text))
    new = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
    new.mkdir()
    (new / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    return version


OTHER = """
import sys
sys.path[:] = [p for p in sys.path if p != {site!r}]
import fastai.tabular.all, importlib.metadata
from fastai_compile import available_backends, open_learner
from fastai_compile.backends.base import distribution, get_backend, installed, unmet
try: found = importlib.metadata.version('onnxruntime')
except importlib.metadata.PackageNotFoundError: found = 'none'
rows = {{r['backend']: [r['usable'], r['reason']] for r in available_backends()}}
learn = open_learner({path!r})
answer([found, rows['onnxruntime'], rows['onnxruntime:cuda'][1], str(learn.model.placement),
        unmet({{'packages': {{'onnxruntime': '99'}}}})])
"""


@needs_backend("onnxruntime")
@pytest.mark.parametrize("dist", ["onnxruntime-gpu", "onnxruntime-openvino"])
def test_a_file_opens_where_another_distribution_brings_onnxruntime(dist, artifacts, tmp_path):
    version = site_with(tmp_path / "site", dist)
    code = OTHER.format(site=sysconfig.get_paths()["platlib"], path=str(artifacts("onnxruntime", "table").path))
    found, (usable, reason), cuda, placement, lacks = fresh(code, path=[tmp_path / "site"])
    assert found == "none", "the distribution onnxruntime is still to be seen: this test shows nothing"
    assert usable == "yes" and f"{dist} {version}" in reason and "onnxruntime on CPU, executed" in placement
    assert lacks == [f"needs onnxruntime 99 or newer, here is only {dist} {version} (`pip install '{dist}>=99'`)"]
    assert dist == "onnxruntime-gpu" or f"{dist} {version}" in cuda


def test_a_distribution_is_read_from_its_files_where_there_is_no_metadata(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fakeruntime/capi").mkdir(parents=True)
    said = tmp_path / "fakeruntime/capi/build_and_package_info.py"
    said.write_text("package_name = 'fakeruntime-gpu'\n__version__ = '1.25.0'\n")
    assert distribution("fakeruntime") == ("fakeruntime-gpu", "1.25.0") and unmet({"packages": {"fakeruntime": "1.24"}}) == []
    said.unlink()
    assert distribution("fakeruntime") == ("fakeruntime", "")
    for name in ("fakeruntime", "no_such.package", "no-such-package"):
        assert unmet({"packages": {name: "1"}}) == [f"needs {name} 1 or newer, here is none (`pip install '{name}>=1'`)"]
    assert installed("no_such.package") == ("", "") and distribution("pytest") == ("pytest", pytest.__version__)


@needs_backend("onnxruntime")
def test_a_lacking_converter_is_mended_without_a_second_onnxruntime(monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "onnxscript" else stock(name, *args))
    probe = get_backend("onnxruntime").probe("cpu")
    assert not probe.usable and probe.mend == "pip install onnxscript"
