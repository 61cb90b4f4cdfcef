"""The built distributions are complete, and importing the package stays light and hides no name of fastai."""
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastai_compile"
MODULES = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
DOMAINS = ["fastai.vision.all", "fastai.tabular.all", "fastai.text.all", "fastai.collab"]
HEAVY = ["onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "torch._inductor.compile_fx", "IPython",
         "ipykernel", "ipywidgets", "matplotlib", "nbdev", "sklearn", "timm", "transformers"]


def _run(*args, **kwargs):
    run = subprocess.run([str(a) for a in args], capture_output=True, text=True, **kwargs)
    assert run.returncode == 0, f"{' '.join(map(str, args))}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def test_the_page_of_benchmarks_is_what_the_results_say():
    page = _run(sys.executable, "-c", "from benchmarks.report import text; print(text(), end='')", cwd=ROOT)
    assert page == (ROOT / "benchmarks" / "README.md").read_text(), "run `python benchmarks/report.py`"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    "The folder of an sdist and of the wheel that is built from it"
    pytest.importorskip("build", reason="build is missing: pip install -e '.[dev]'")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ["settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md",
                 "CONTRIBUTING.md"]: shutil.copy2(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=copy)
    return out


@pytest.fixture(scope="module")
def imported():
    "What one fresh process sees: `__all__`, modules that importing the package adds to fastai's, and fastai's names"
    code = f"""
import importlib, json, sys
import fastai.vision.all
before = set(sys.modules)
import fastai_compile
added = sorted(set(sys.modules) - before)
names = list(getattr(fastai_compile, '__all__', []))
missing = [n for n in names if not hasattr(fastai_compile, n)]
taken = dict()
for domain in {DOMAINS}:
    namespace = dict()
    exec(f'from {{domain}} import *', namespace)
    taken[domain] = sorted(set(names) & set(namespace))
print(json.dumps(dict(added=added, names=names, missing=missing, taken=taken)))
"""
    return json.loads(_run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1])


def test_sdist_is_complete(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as t: names = {n.partition("/")[2] for n in t.getnames()}
    missing = (MODULES | {"settings.ini", "setup.py", "LICENSE", "README.md", "pyproject.toml"}) - names
    assert not missing


def test_wheel_holds_every_module(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    assert {n for n in names if n.endswith(".py")} == MODULES
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_declares_requirements_and_extras(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = z.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {r.split()[1].split("<")[0].split(">")[0] for r in required} == {"fastai", "torch", "cloudpickle"}
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra:")}
    assert extras == {"onnx", "openvino", "executorch", "coreml", "workers", "bench", "dev", "all"}


def test_wheel_installs_and_imports(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    code = (f"import sys; sys.path.insert(0, {str(target)!r}); import fastai_compile; "
            "print(fastai_compile.__file__); print(fastai_compile.__version__)")
    file, version = _run(sys.executable, "-I", "-c", code, cwd=tmp_path).splitlines()[-2:]
    assert Path(file).is_relative_to(target)
    assert version == wheel.name.split("-")[1]


def test_import_is_light(imported):
    heavy = [m for m in imported["added"] if any(m == h or m.startswith(h + ".") for h in HEAVY)]
    assert not heavy, f"`import fastai_compile` imports what fastai.vision.all does not: {heavy}"


def test_all_names_exist(imported):
    assert not imported["missing"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_name_of_fastai_is_hidden(imported, domain):
    assert not imported["taken"][domain]
