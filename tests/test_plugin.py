"""A backend from another package: installed, found by its entry point, used; a broken one is named and breaks nothing else."""
import os
import shutil
import subprocess
import sys

import pytest

from fastai_compile import BackendUnavailable, ConfigError, available_backends
from fastai_compile.backends.base import Probe, Table, backends, get_backend, probe_of
from fastai_compile.choose import choose_candidates
from fastai_compile.config import make_config
from helpers import ROOT, Wrapped, fresh, only, registered

EXAMPLE = ROOT / "examples" / "fastai_compile_channels_last"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder with the example package, built and installed by pip, without a network"
    source, target = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(target), str(source)],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return target


def test_the_example_passes_its_own_tests(installed, tmp_path):
    shutil.copy2(EXAMPLE / "test_channels_last.py", tmp_path)
    path = os.pathsep.join([str(installed), str(ROOT)])
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "4 passed" in run.stdout


BROKEN = {
    "gone": "[fastai_compile.backends]\ngone = no_such_module:Backend\n",
    "crashes": "[fastai_compile.backends]\ncrashes = crashing_module:Backend\n",
    "empty": "[fastai_compile.backends]\nempty = empty_module:Backend\n",
}


def _broken_packages(folder):
    for name, entry_points in BROKEN.items():
        info = folder / f"{name}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(entry_points)
    (folder / "crashing_module.py").write_text("raise RuntimeError('the driver of this vendor is too old')\n")
    (folder / "empty_module.py").write_text("class Backend: name = 'empty'\n")


def test_broken_plugins_are_named_and_break_nothing_else(installed, tmp_path):
    _broken_packages(tmp_path)
    res = fresh("""
from fastai_compile import BackendUnavailable, available_backends
from fastai_compile.backends.base import get_backend
rows = {r['backend']: (r['usable'], r['reason']) for r in available_backends()}
errors = {}
for name in ('gone', 'crashes', 'empty'):
    try: get_backend(name)
    except BackendUnavailable as e: errors[name] = str(e)
answer(dict(rows=rows, errors=errors))
""", path=[installed, tmp_path])
    rows, errors = res["rows"], res["errors"]
    assert rows["eager"][0] == rows["channels_last"][0] == "yes"
    for name, says in (("gone", "No module named 'no_such_module'"), ("crashes", "the driver of this vendor is too old"),
                       ("empty", "it lacks rewrites")):
        assert rows[name][0] == "no" and says in rows[name][1] and "entry point" in rows[name][1]
        assert says in errors[name] and "its package could not be loaded" in errors[name]


def test_without_the_package_the_name_is_unknown():
    if "channels_last" in backends(): pytest.skip("fastai_compile_channels_last is installed beside this package")
    with pytest.raises(ConfigError, match="no backend is called 'channels_last'"): get_backend("channels_last")


class BadDriver(Wrapped):
    def probe(self, device): raise RuntimeError("driver\n  broke")


def test_a_probe_that_raises_is_named_and_breaks_nothing_else():
    with registered(BadDriver()) as b:
        assert probe_of(b, "cpu") == Probe(False, "its probe failed: RuntimeError: driver broke")
        row = next(r for r in available_backends() if r["backend"] == "baddriver")
        assert row["usable"] == "no" and row["reason"] == "its probe failed: RuntimeError: driver broke"
        table = Table()
        tried = [c.name for c in choose_candidates(make_config(True), table)]
        assert "baddriver" not in tried and set(tried) == {c.name for c in choose_candidates(make_config(True), Table())}
        assert any("more" in r["backend"] for r in table)
        with pytest.raises(BackendUnavailable, match="baddriver cannot be used here: its probe failed: RuntimeError"):
            choose_candidates(make_config("baddriver"), Table())
        with only("eager", "baddriver"), pytest.raises(BackendUnavailable, match="driver broke"):
            choose_candidates(make_config(True), Table())
