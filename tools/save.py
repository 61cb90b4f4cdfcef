"""Run notebooks, each in a fresh kernel, and store their outputs.

Directives: `#| eval: false` is never run; `#| slow` and `#| gpu` are run with --slow and --gpu only, and keep their
stored outputs otherwise; `#| expect_fail` (or `#| expect_fail: NameOfError`, or the tag raises-exception) must raise.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb, write_nb
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.outputs import ROOT, scrub, tidy

NBS = ROOT / "nbs"
SKIP, RAISES = "skip-execution", "raises-exception"


class NotebookError(Exception):
    "A notebook did not run to its end, or a cell that must raise did not"


def notebooks(folder: Path = NBS) -> list[Path]:
    "Every notebook below `folder` in reading order, which is the order of the file names"
    found = [p for p in folder.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(folder).parts)]
    return sorted(found, key=lambda p: (p.stem == "index", p.name, str(p)))


def _skips(directives: dict, slow: bool, gpu: bool) -> bool:
    if directives.get("eval", "").lower() == "false": return True
    return ("slow" in directives and not slow) or ("gpu" in directives and not gpu)


def _check_raised(path: Path, cell, expected: str) -> None:
    "Raise `NotebookError` unless `cell` ended in an error, of the class named `expected` if it is not empty"
    names = [o.ename for o in cell.outputs if o.output_type == "error"]
    where = f"{path.name}: cell {cell.id} must raise {expected or 'an error'}"
    if not names: raise NotebookError(f"{where}, and raised nothing:\n{cell.source}")
    if expected and names[-1].rpartition(".")[2] != expected:
        raise NotebookError(f"{where}, and raised {names[-1]}:\n{cell.source}")


def _kernel_manager() -> AsyncKernelManager:
    "A manager for this interpreter's own kernel, whatever kernels the user has registered"
    specs = KernelSpecManager(kernel_dirs=[])
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)


def _kernel_env() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env | {"IN_TEST": "1", "PYTHONHASHSEED": "0"}


def run_notebook(path: Path, slow: bool = False, gpu: bool = False, cell_timeout: int | None = None):
    "The notebook at `path` with the outputs of a fresh run in its own kernel; `NotebookError` where it fails"
    nb = nbformat.read(path, as_version=4)
    directives = [c.directives for c in read_nb(path).cells]
    tags = [c.metadata.get("tags", []) for c in nb.cells]
    skipped = [_skips(d, slow, gpu) or SKIP in t for d, t in zip(directives, tags, strict=True)]
    raises = ["expect_fail" in d or RAISES in t for d, t in zip(directives, tags, strict=True)]
    for cell, skip, must_raise in zip(nb.cells, skipped, raises, strict=True):
        cell.metadata.tags = [SKIP] * skip + [RAISES] * must_raise
    cwd = NBS if NBS in path.parents else path.parent
    client = NotebookClient(nb, km=_kernel_manager(), timeout=cell_timeout, coalesce_streams=True, record_timing=False,
                            extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(cwd)}})
    try: client.execute(env=_kernel_env(), cleanup_kc=True) # A manager that was passed in is not ended otherwise
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        raise NotebookError(f"{path.name}: {scrub(str(e))}") from None
    for cell, d, old, skip, must_raise in zip(nb.cells, directives, tags, skipped, raises, strict=True):
        cell.metadata.pop("tags")
        if old: cell.metadata.tags = old
        if cell.cell_type != "code" or skip: continue
        if must_raise: _check_raised(path, cell, d.get("expect_fail", ""))
        cell.outputs = tidy(cell.outputs)
    return nb


def save_notebook(nb, path: Path) -> None:
    "Write `nb` to `path` in the form that nbdev-clean leaves: outputs and cell ids stay, counters and kernel noise go"
    config = get_config(path.parent)
    plain = json.loads(nbformat.writes(nb))
    clean_nb(plain, allowed_metadata_keys=config.get("allowed_metadata_keys"), clean_ids=config.clean_ids,
             allowed_cell_metadata_keys=config.get("allowed_cell_metadata_keys"))
    write_nb(plain, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run notebooks, each in a fresh kernel, and store their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook in nbs/, in reading order")
    parser.add_argument("--slow", action="store_true", help="run the cells marked slow too")
    parser.add_argument("--gpu", action="store_true", help="run the cells marked gpu too")
    parser.add_argument("--cell-timeout", type=int, metavar="SECONDS", help="default: none")
    args = parser.parse_args()
    failed = []
    for path in [p.resolve() for p in args.notebooks] or notebooks():
        start = time.perf_counter()
        try: save_notebook(run_notebook(path, args.slow, args.gpu, args.cell_timeout), path)
        except NotebookError as e:
            failed.append(path.name)
            print(e, file=sys.stderr)
        state = "FAILED, left as it was" if path.name in failed else "saved"
        print(f"{path.name}: {state}, {time.perf_counter() - start:.1f} s", flush=True)
    if failed: print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
