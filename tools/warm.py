"""Processes that start with fastai imported: forked, where a fresh one would spend ten seconds on imports.

What the library imports itself is not imported here: that belongs to what is tested.
"""
import importlib
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "fastai.vision.all", "fastai.tabular.all", "fastai.text.all", "fastai.collab"


def warm_up() -> None:
    "Import fastai; not on a machine with CUDA, which does not survive a fork: there, each process imports for itself"
    if not Path("/dev/nvidiactl").exists():
        for name in IMPORTS: importlib.import_module(name)


def run_module(module: str, args: list[str], cwd) -> int:
    "What `python -m module` does in `cwd`, in this process, which was just forked. Its exit status"
    import numpy as np
    np.random.seed() # Python's own generator has a new seed after a fork
    os.chdir(cwd)
    sys.path[0], sys.argv = str(cwd), [module, *args]
    try: runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0
