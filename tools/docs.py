"""Render nbs/ to docs/, README.md and the nav of mkdocs.yml, from the stored outputs; benchmarks/README.md becomes a page.

With --check nothing is written: the files that differ are named, and the exit status is 1.
"""
import argparse
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb, write_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.outputs import ROOT, tidy

README = Path("index.ipynb")
OUTPUTS = "README.md", "mkdocs.yml", "docs"
ASSETS = ".png", ".svg", ".jpg", ".jpeg", ".gif"
FORMATS = ["text/markdown", "text/html", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]
SITE = """\
site_name: {name}
site_description: {description}
docs_dir: docs
theme:
  name: material
  features:
    - navigation.footer
    - content.code.copy
markdown_extensions:
  - tables
  - attr_list
  - pymdownx.highlight
  - pymdownx.superfences
  - toc:
      permalink: true
nav:
  - {name}: index.md
"""

_link = re.compile(r"(\]\(|\b(?:src|href)=\")([^)\s\"]+)")
_external = re.compile(r"[a-z][a-z0-9+.-]*:|[#/]")
_directive = re.compile(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)")
_quarto = re.compile(r"(?<=\))\{[^{}\n]*\}")
_shown = re.compile(r"(?:#\|.*\n)*show_doc\((?:\w+\.)*(\w+)")
_definition = re.compile(r"^(?:async )?(def|class) (\w+)", re.MULTILINE)
_first_def = re.compile(r"(```python\n)def (\w+)(?=\()")
_fence = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ \t]*$)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    "One page of docs/: where it lies, below docs/, and how the list of pages shows it"
    path: Path
    title: str
    subtitle: str


def _defines(cell) -> bool:
    "Is `cell` needed to document what the notebook defines: is it exported, or does it only import?"
    if cell.directives.keys() & {"export", "exports", "exporti", "exec_doc"} or "show_doc(" in cell.source: return True
    try: body = ast.parse(cell.source).body
    except SyntaxError: return False
    return all(isinstance(o, ast.Import | ast.ImportFrom) for o in body)


def _restrict(path: Path) -> None:
    "Keep nbdev, which runs every cell that holds an import, from running the examples of the copied notebook at `path`"
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == "code" and not _defines(cell) and not cell.source.startswith("%%"):
            cell.source = "#| eval: false\n" + cell.source
    write_nb(nb, path)


def _processed(work: Path) -> Path:
    "The folder, in `work`, that holds nbs/ as nbdev prepares it: no exported source, but the docs of what it defines"
    sections = re.split(r"^(?=\[)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    ours = "".join(s for s in sections if s.startswith(("[project]", "[tool.nbdev]"))) # nbdev parses it for each cell
    (work / "pyproject.toml").write_text(ours, encoding="utf-8")
    shutil.copytree(ROOT / "nbs", work / "nbs", ignore=shutil.ignore_patterns(".*", "_*", "models", "*.pkl"))
    for path in (work / "nbs").rglob("*.ipynb"): _restrict(path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    code = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=work, env=env, capture_output=True, text=True)
    if run.returncode: sys.exit(f"nbdev could not prepare the notebooks:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return work / "_proc"


def _split_directives(source: str) -> tuple[dict[str, str], str]:
    "The directives at the top of a cell, and the rest of it"
    found, lines = {}, source.splitlines()
    magic = [lines.pop(0)] if lines and lines[0].startswith("%%") else []
    while lines and (m := _directive.match(lines[0])):
        found[m[1]] = m[2].strip()
        lines.pop(0)
    return found, "\n".join(magic + lines)


def _relink(text: str, folder: str) -> str:
    "`text` with links to notebooks turned into links to their pages; `folder` is where the pages lie for the reader"
    def new(m):
        target = m[2]
        if _external.match(target): return m[0]
        target = re.sub(r"\.ipynb(?=#|$)", ".md", target)
        if folder and target.removeprefix("./") == "index.md": target = "README.md"
        elif folder: target = os.path.normpath(f"{folder}/{target}")
        return m[1] + target
    parts = _fence.split(text)
    return "".join(part if i % 2 else _link.sub(new, part) for i, part in enumerate(parts))


def _in_order(cells: list, defined: list[tuple[str, str]]) -> list:
    "`cells` with neighbouring docs in the order of the definitions: nbdev turns the order within a cell around"
    places = {name: i for i, (_, name) in enumerate(defined)}
    def shown(c): return _shown.match(c.source) if c.get("has_sd") else None
    res: list = []
    for documents, run in groupby(cells, key=lambda c: shown(c) is not None):
        neighbours = list(run)
        if documents: neighbours.sort(key=lambda c: places.get(shown(c)[1], 0))
        res += neighbours
    return res


def _signature(text: str, classes: set[str]) -> str:
    "The Markdown that `show_doc` made, in which a class is called one"
    text = _quarto.sub("", text).replace("__main__.", "")
    m = _first_def.search(text)
    if not m or m[2] not in classes: return text
    return (text[:m.start()] + m[1] + "class " + m[2] + text[m.end():]).replace(")->None:\n```", "):\n```", 1)


def _prepare(nb, original, folder: str):
    "`nb`, as nbdev left it, reduced to what a reader sees, with stored outputs and with links as `_relink` writes them"
    code = [c for c in original.cells if c.cell_type == "code"]
    stored = {c.id: c.outputs for c in code}
    defined = [o for c in code for o in _definition.findall(c.source)]
    classes = {name for kind, name in defined if kind == "class"}
    nb.cells = _in_order(nb.cells, defined)
    cells = []
    for cell in nb.cells:
        directives, cell.source = _split_directives(cell.source)
        if cell.cell_type == "raw" or directives.get("include") == "false": continue
        if cell.cell_type == "markdown": cell.source = _relink(cell.source, folder)
        else:
            outputs = stored.get(cell.id, cell.outputs)
            cell.outputs = [] if directives.get("output") == "false" else tidy(outputs, render=True)
            cell.metadata = nbformat.from_dict({"transient": {"remove_source": directives.get("echo") == "false"}})
            documents = cell.pop("has_sd", False) or "show_doc(" in cell.source
            for data in (o.data for o in cell.outputs if "data" in o):
                if documents and "text/markdown" in data: data["text/markdown"] = _signature(data["text/markdown"], classes)
        if cell.source.strip() or cell.get("outputs"): cells.append(cell)
    nb.cells = cells
    nb.metadata = nbformat.from_dict({"language_info": {"name": "python"}})
    return nb


@cache
def _exporter() -> MarkdownExporter:
    "One for all pages: it compiles its templates once"
    return MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": FORMATS}}))


def _to_markdown(processed: Path, name: Path, files: str, folder: str = "") -> tuple[str, dict[str, bytes]]:
    "The notebook `name` as Markdown, and its pictures by the path, below `files`, that the Markdown gives them"
    original = nbformat.read(ROOT / "nbs" / name, as_version=4)
    nb = _prepare(nbformat.read(processed / name, as_version=4), original, folder)
    text, resources = _exporter().from_notebook_node(nb, {"unique_key": name.stem, "output_files_dir": files})
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"^[ \t]+$", "", text, flags=re.MULTILINE))
    return text.strip() + "\n", resources["outputs"]


def _write(text: str, pictures: dict[str, bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for name, content in pictures.items():
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(content)


def _page(text: str, path: Path) -> Page:
    title = re.search(r"^# +(.+?)\s*$", text, re.MULTILINE)
    subtitle = re.search(r"^> *(.+?)\s*$", text, re.MULTILINE)
    return Page(path, title[1] if title else path.stem, subtitle[1] if subtitle else "")


def _add_page(processed: Path, name: Path, docs: Path) -> Page:
    "Write the page of `name`, a notebook or a Markdown file below `processed`, to `docs`"
    path = name.with_suffix(".md")
    if name.suffix == ".ipynb": text, pictures = _to_markdown(processed, name, f"{path.stem}_files")
    else: text, pictures = _relink((processed / name).read_text(encoding="utf-8"), ""), {}
    _write(text, pictures, docs / path)
    return _page(text, path)


def render(target: Path) -> None:
    "Write README.md, mkdocs.yml and docs/ into `target`"
    docs = target / "docs"
    docs.mkdir(parents=True)
    config = get_config(ROOT)
    with tempfile.TemporaryDirectory() as work:
        processed = _processed(Path(work))
        names = [p.relative_to(processed) for p in processed.rglob("*") if p.suffix in (".ipynb", ".md")]
        names.sort(key=lambda p: (p.name, str(p)))
        pages = [_add_page(processed, name, docs) for name in names if name != README]
        _write((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"), {}, docs / "benchmarks.md")
        pages.append(Page(Path("benchmarks.md"), "Benchmarks", "What was measured, on which machine, and what was not run"))
        if README in names: _write(*_to_markdown(processed, README, "docs/index_files", "docs"), target / "README.md")
        for p in (p for p in processed.rglob("*") if p.suffix in ASSETS):
            (docs / p.relative_to(processed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(p, docs / p.relative_to(processed))
    lines = [f"- [{p.title}]({p.path.as_posix()})" + (f": {p.subtitle}" if p.subtitle else "") for p in pages]
    head = f"# {config.lib_name}\n\n> {config.description}\n\n"
    (docs / "index.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    nav = "".join(f"  - {json.dumps(p.title, ensure_ascii=False)}: {p.path.as_posix()}\n" for p in pages)
    site = SITE.format(name=config.lib_name, description=json.dumps(config.description, ensure_ascii=False))
    (target / "mkdocs.yml").write_text(site + nav, encoding="utf-8")


def _files(folder: Path) -> dict[str, Path]:
    found = [p for name in OUTPUTS for p in [folder / name, *(folder / name).rglob("*")]]
    return {p.relative_to(folder).as_posix(): p for p in found if p.is_file()}


def stale(rendered: Path) -> list[str]:
    "The files, with the reason, in which the repository differs from `rendered`"
    new, old = _files(rendered), _files(ROOT)
    res = [f"{name}: missing" for name in new.keys() - old.keys()]
    res += [f"{name}: no notebook gives it" for name in old.keys() - new.keys() if name.startswith("docs/")]
    both = new.keys() & old.keys()
    return sorted(res + [f"{n}: out of date" for n in both if not filecmp.cmp(new[n], old[n], shallow=False)])


def install(rendered: Path) -> None:
    "Put what was rendered in place of README.md, mkdocs.yml and docs/"
    shutil.rmtree(ROOT / "docs", ignore_errors=True)
    for name, path in _files(rendered).items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, ROOT / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Render nbs/ to docs/, README.md and mkdocs.yml.")
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are out of date")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        rendered = Path(tmp) / "rendered"
        render(rendered)
        differing = stale(rendered)
        if not args.check: install(rendered)
    if args.check and differing:
        print("Out of date:", *differing, "Run `make docs` and commit the result.", sep="\n")
        return 1
    if differing: print("Rendered anew:", *differing, sep="\n")
    else: print("docs/, README.md and mkdocs.yml are up to date")
    return 0


if __name__ == "__main__": sys.exit(main())
