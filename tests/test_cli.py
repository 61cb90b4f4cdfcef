"The command line: on stock files and compiled ones, what it says, and that a mistake is one message and exit code 2"
import importlib
import json
import os
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT, items_of, table_learner

from fastai_compile import inspect_artifact, open_learner
from fastai_compile.cli import COMMANDS, is_compiled, open_file, read_items, run
from fastai_compile.errors import ArtifactError, ConfigError, ExampleError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A folder with `stock.pkl`, `rows.csv` and `broken.pkl`"
    folder = tmp_path_factory.mktemp("cli")
    table_learner(folder, epochs=0).export("stock.pkl")
    items_of("table", None).to_csv(folder / "rows.csv", index=False)
    (folder / "broken.pkl").write_text("no pickle at all")
    return folder


@pytest.fixture(scope="module")
def compiled(files):
    assert run(["export", str(files / "stock.pkl"), str(files / "fast.pkl"), "--targets", "eager", "--items",
                str(files / "rows.csv"), "--verify", "numbers"]) == 0
    return files / "fast.pkl"


def test_help_is_for_newcomers(capsys):
    assert run([]) == 2 and run(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS) and "--help" in said and "Exit codes" in said
    for name in COMMANDS:
        with pytest.raises(SystemExit) as e: run([name, "--help"])
        said = capsys.readouterr().out
        assert e.value.code == 0 and f"usage: fastai-compile {name}" in said
        undescribed = [line for line in said.splitlines() if line.strip().startswith("--") and len(line.split()) < 3]
        assert not undescribed


def test_the_script_of_the_package_is_there():
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["fastai-compile"]
    module, name = entry.split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_inspect_a_stock_file_and_a_compiled_one(files, compiled, capsys):
    assert run(["inspect", str(files / "stock.pkl")]) == 0
    said = capsys.readouterr().out
    assert "a stock export of fastai, not compiled" in said and "TabularModel" in said
    assert run(["inspect", str(compiled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == inspect_artifact(compiled)["backend"] == "eager"
    assert is_compiled(compiled) and not is_compiled(files / "stock.pkl") and not is_compiled(files / "broken.pkl")


def test_export_again_from_a_compiled_file(files, compiled, capsys):
    out = files / "again.pkl"
    words = ["export", str(compiled), str(out), "--targets", "eager", "--max-bs", "7", "--verify", "numbers"]
    assert run([*words, "--options", '{"tolerance": 0.01}']) == 0
    assert open_learner(out).model.max_bs == 7 and "eager" in capsys.readouterr().out


def test_explain(files, capsys):
    assert run(["explain", str(files / "stock.pkl"), "--targets", "eager", "--items", str(files / "rows.csv")]) == 0
    assert "takes every operator" in capsys.readouterr().out


def test_bench_writes_json_and_plots(files, compiled, capsys):
    words = ["bench", str(compiled), "--items", str(files / "rows.csv"), "--targets", "eager", "--bs", "1,2"]
    more = ["--budget-s", "1", "--cold", "0", "--threads", "1", "--price", "2", "--options", '{"verify": "numbers"}']
    assert run([*words, *more, "--json", str(files / "r.json"), "--plots", str(files / "plots")]) == 0
    said = capsys.readouterr().out
    assert "stock fastai" in said and "as opened (eager)" in said and "per million" in said
    data = json.loads((files / "r.json").read_text())
    assert {r["bs"] for r in data["rows"]} == {1, 2} and data["environment"]["threads"] == 1
    assert all((files / "plots" / f"{n}.png").stat().st_size > 5000 for n in ("latency", "throughput"))


@pytest.mark.parametrize("words, said", [
    (["explian", "x.pkl"], "Did you mean 'explain'"), (["inspect", "missing.pkl"], "there is no file"),
    (["inspect", "."], "is a folder"), (["inspect", "broken.pkl"], "cannot be opened as an exported learner"),
    (["export", "stock.pkl", "x.pkl", "--targets", "onxruntime"], "Did you mean 'onnxruntime'"),
    (["export", "stock.pkl", "nowhere/x.pkl", "--targets", "eager"], "there is no folder"),
    (["export", "stock.pkl", "x.pkl", "--options", "{"], "no valid JSON"),
    (["export", "stock.pkl", "x.pkl", "--options", "[1]"], "an object"),
    (["export", "stock.pkl", "x.pkl", "--options", '{"max_batch": 1}'], "no choice 'max_batch'"),
    (["explain", "stock.pkl", "--items", "none"], "no such file or folder"),
    (["explain", "stock.pkl", "--define", "none.py"], "no such file"),
    (["bench", "stock.pkl", "--bs", "one"], "whole numbers"),
    (["bench", "stock.pkl", "--scenario", "server", "--plots", "."], "leave one of them out"),
    (["bench", "stock.pkl", "--scenario", "sever"], "Did you mean 'server'")])
def test_a_mistake_is_one_message_and_exit_code_2(files, monkeypatch, capsys, words, said):
    monkeypatch.chdir(files)
    assert run(words) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("fastai-compile") and "Traceback" not in err
    assert not (files / "x.pkl").exists()


def test_an_unknown_option_is_refused_by_name(files, capsys):
    with pytest.raises(SystemExit) as e: run(["inspect", str(files / "stock.pkl"), "--jsn"])
    assert e.value.code == 2 and "--jsn" in capsys.readouterr().err


def test_items_of_every_kind(files, image_folder, tmp_path):
    assert read_items("") is None and len(read_items(files / "rows.csv")) == 11
    images = read_items(image_folder)
    assert images == sorted(images) and len(read_items(images[0])) == 1
    (tmp_path / "t.txt").write_text("good\n\nbad\n")
    assert read_items(tmp_path / "t.txt") == ["good", "bad"] and read_items(tmp_path) == ["good\n\nbad\n"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExampleError, match="no images, texts or rows"): read_items(tmp_path / "empty")


def test_a_pickle_that_holds_no_learner(tmp_path):
    import torch
    torch.save({"weights": 1}, tmp_path / "state.pkl")
    with pytest.raises(ArtifactError): open_file(tmp_path / "state.pkl")


def test_define_gives_main_what_the_file_needs(tmp_path, monkeypatch):
    (tmp_path / "defs.py").write_text("def my_label(o): return o\n")
    main = sys.modules["__main__"]
    with pytest.raises(ArtifactError): open_file(tmp_path / "missing.pkl", str(tmp_path / "defs.py"))
    assert main.my_label(3) == 3
    monkeypatch.delattr(main, "my_label")
    with pytest.raises(ConfigError, match="no such file"): open_file("missing.pkl", str(tmp_path / "none.py"))


def program(*words):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastai_compile.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_as_a_program_with_threads_that_sleep(files):
    done = program("bench", files / "stock.pkl", "--items", files / "rows.csv", "--targets", "eager", "--bs", "1",
                   "--budget-s", "1", "--cold", "0", "--options", '{"verify": "numbers"}')
    assert done.returncode == 0, done.stderr[-2000:]
    assert "idle OpenMP threads sleep (OMP_WAIT_POLICY=PASSIVE)" in done.stdout


def test_as_a_program_a_mistake_is_exit_code_2(files):
    done = program("inspect", files / "missing.pkl")
    assert done.returncode == 2 and "there is no file" in done.stderr and "Traceback" not in done.stderr
