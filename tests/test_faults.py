"""What goes wrong on real machines: kills, full disks, damaged files. A few of each; `soak.py` runs the long counts."""
import errno
import fcntl
import io
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from faults import TESTS, damage, in_child, is_clean, kills, make_files
from fastai_compile import WriteError, artifact
from fastai_compile.artifact import write_artifact, inspect_artifact
from helpers import RUNS, Files, needs_backend

FACTS = {"python": "any", "needs": {}, "definitions": [], "name": "old"}


COMPILED = [b for b in RUNS if b != "eager"]


@pytest.fixture(scope="module")
def files(tmp_path_factory): return make_files(tmp_path_factory.mktemp("files"), COMPILED)


@pytest.fixture(params=COMPILED)
def exported(request, files): return files[request.param]


@pytest.mark.parametrize("kind, count", [("bit flip", 40), ("truncation", 20)])
def test_damaged_files_are_never_silently_wrong(exported, kind, count):
    res = damage(exported, kind, count)
    assert is_clean(res), res
    assert res["open_learner: typed error"] > count / 2, res


def _plant_silence():
    "What the check above must catch: a file format that does not look at its bytes"
    import faults
    import torch
    faults._answer = lambda learn: learn
    import fastai.learner
    import fastai_compile
    calls = iter(range(10**6))
    fastai_compile.open_learner = fastai.learner.load_learner = lambda p: torch.tensor(next(calls))
    return faults._try_some(__file__, "bit flip", 0, 5)


def test_the_check_itself_fires():
    res, died = in_child(_plant_silence)
    assert died == 0 and res["open_learner: SILENTLY WRONG"] == 5


def _crash(*args): os.kill(os.getpid(), 9)


def test_a_crash_of_the_child_is_seen(): assert in_child(_crash) == (None, 9)


def test_killed_while_writing(tmp_path):
    res = kills(tmp_path, 4)
    assert res["whole"] == res["tried"] and res["in the middle of a write"] == 4, res
    assert res["left over after the next export"] == [], res


def _write_with_limit(path, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: write_artifact(path, {**FACTS, "name": "new"}, b"x" * 10**6)
    except WriteError as e: return str(e)
    return "written"


def test_full_disk(tmp_path):
    path = tmp_path / "model.pkl"
    write_artifact(path, FACTS, b"old")
    old = path.read_bytes()
    said, _ = in_child(_write_with_limit, path, 300_000)
    assert "could not be written" in said and path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.pkl"]
    assert in_child(_write_with_limit, path, 3_000_000)[0] == "written" and inspect_artifact(path)["name"] == "new"


@contextmanager
def _disk(folder, size):
    "A disk of its own at `folder`, which holds an old file"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        write_artifact(folder / "model.pkl", FACTS, b"old")
        yield folder
    finally: subprocess.run(["umount", folder], check=True)


def test_small_disk(tmp_path):
    with _disk(tmp_path / "disk", "2m") as disk:
        with pytest.raises(WriteError, match="MB free"): write_artifact(disk / "model.pkl", FACTS, b"x" * 3 * 10**6)
        assert inspect_artifact(disk / "model.pkl")["name"] == "old" and len(list(disk.iterdir())) == 1


def _write_as_nobody(path):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try: write_artifact(path, {**FACTS, "name": "new"}, b"new")
    except WriteError as e: return str(e)
    return "written"


def test_read_only_folder(tmp_path):
    if os.getuid() != 0: pytest.skip("changing the user needs root")
    folder = tmp_path / "mine"
    folder.mkdir()
    write_artifact(folder / "model.pkl", FACTS, b"old")
    for p in (folder, *folder.parents): p.chmod(p.stat().st_mode | 0o555)
    said, _ = in_child(_write_as_nobody, folder / "model.pkl")
    assert "cannot be written to" in said and inspect_artifact(folder / "model.pkl")["name"] == "old"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A learner that the tests below export; in a child of its own where they take rights away"
    from helpers import table_learner
    return table_learner(tmp_path_factory.mktemp("small"), epochs=0)


def _export_as_nobody(learn, path):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    return _export(learn, path)


def _export_with_limit(learn, path, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return _export(learn, path)


def _export(learn, path):
    try: learn.export(path, compile="eager")
    except WriteError as e: return str(e)
    return "written"


def test_a_read_only_folder_leaves_the_old_file_of_an_export(small, tmp_path):
    if os.getuid() != 0: pytest.skip("changing the user needs root")
    folder = tmp_path / "mine"
    folder.mkdir()
    write_artifact(folder / "model.pkl", FACTS, b"old")
    before = Files.of(folder)
    for p in (folder, *folder.parents): p.chmod(p.stat().st_mode | 0o555)
    said, _ = in_child(_export_as_nobody, small, folder / "model.pkl")
    assert "cannot be written to" in said and Files.of(folder) == before


def test_a_full_file_leaves_the_old_file_of_an_export_and_names_the_limit(small, tmp_path):
    write_artifact(tmp_path / "model.pkl", FACTS, b"old")
    before = Files.of(tmp_path)
    said, _ = in_child(_export_with_limit, small, tmp_path / "model.pkl", 20_000)
    assert "stopped at 0.0" in said and "MB free" in said and "ulimit -f" in said, said
    assert Files.of(tmp_path) == before


def test_a_full_disk_leaves_the_old_file_of_an_export(small, tmp_path):
    with _disk(tmp_path / "disk", "128k") as disk:
        before = Files.of(disk)
        (disk / "other").write_bytes(b"x" * 80_000)
        with pytest.raises(WriteError, match="MB free"): small.export(disk / "model.pkl", compile="eager")
        (disk / "other").unlink()
        assert Files.of(disk) == before


def test_what_the_disk_gives_back_is_compared(tmp_path, monkeypatch):
    "The file is read again before it takes its name: another content is refused"
    path = tmp_path / "model.pkl"
    write_artifact(path, FACTS, b"old")
    before = Files.of(tmp_path)
    monkeypatch.setattr(artifact, "_blob_of", lambda tmp: b"another content")
    with pytest.raises(WriteError, match="did not give back"): write_artifact(path, FACTS, b"new")
    assert Files.of(tmp_path) == before


def test_the_folder_is_flushed_after_the_file_took_its_name(tmp_path, monkeypatch):
    "Without this a power cut can bring the old name back"
    done, fsync, replace = [], os.fsync, os.replace
    def flush(fd):
        done.append(("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file", os.fstat(fd).st_ino))
        return fsync(fd)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *a: (done.append(("replace",)), replace(*a))[1])
    write_artifact(tmp_path / "model.pkl", FACTS, b"new")
    assert done == [("file", (tmp_path / "model.pkl").stat().st_ino), ("replace",), ("folder", tmp_path.stat().st_ino)]


def test_a_pipe_is_no_target(tmp_path, small, monkeypatch):
    "`os.replace` would put a file in the place of a pipe, a socket or a device such as /dev/null"
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
        for name in ("pipe", "link", "socket"):
            with pytest.raises(WriteError, match="neither a file"): write_artifact(tmp_path / name, FACTS, b"x")
            with pytest.raises(WriteError, match="neither a file"): small.export(tmp_path / name, compile="eager")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "socket"]


def _leftover(path, pid, age_s):
    old = path.parent / f".{path.name}.{pid}.abcd{artifact._TMP}"
    old.write_bytes(b"x" * 1000)
    os.utime(old, (time.time() - age_s,) * 2)
    return old


@pytest.mark.parametrize("pid", [os.getpid(), 1, 999_999_999], ids=["our own", "the first", "nobody's"])
@pytest.mark.parametrize("age_s", [1, 10**6])
def test_what_a_killed_process_left_is_swept(pid, age_s, tmp_path):
    "Also where its number belongs to another process by now, as always in a container"
    left = _leftover(tmp_path / "model.pkl", pid, age_s)
    other = _leftover(tmp_path / "other.pkl", pid, age_s)
    write_artifact(tmp_path / "model.pkl", FACTS, b"x")
    assert not left.exists() and other.exists()


def test_without_file_locks_only_old_files_are_swept(tmp_path, monkeypatch):
    def refuse(*args): raise OSError(errno.ENOTSUP, "no locks here")
    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "model.pkl"
    young, old = (_leftover(path, pid, age_s) for pid, age_s in ((999_999_999, 60), (os.getpid(), 10**5)))
    write_artifact(path, FACTS, b"x")
    assert young.exists() and not old.exists() and inspect_artifact(path)["name"] == "old"


WRITER = """
import sys; sys.path[:0] = [{root!r}]
import os
from pathlib import Path
from fastai_compile.artifact import write_whole
os.getpid = lambda: 999_999_998  # as in a neighbouring container: a number that means nothing here
def save(f):
    f.write(b"half")
    f.flush()
    print("half", flush=True)
    input()
    f.write(b"done")
def same(tmp):
    print("read", flush=True)
    input()
    return tmp.read_bytes() == b"halfdone"
print(write_whole(Path({path!r}), 8, save, same), flush=True)
"""


def test_what_another_process_writes_is_not_swept(tmp_path):
    path = tmp_path / "model.pkl"
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER.format(root=str(TESTS.parent), path=str(path))],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for stage in ("half", "read"):
            said = child.stdout.readline().strip()
            assert said == stage, child.communicate()[1]
            write_artifact(path, FACTS, b"mine")
            assert len(list(tmp_path.iterdir())) == 2, "what the child writes was swept"
            child.stdin.write("go on\n")
            child.stdin.flush()
        out, err = child.communicate(timeout=60)
    finally: child.kill()
    assert out.strip() == "8" and path.read_bytes() == b"halfdone", err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pkl"]


def test_a_file_that_is_swept_as_it_is_made_is_made_again(tmp_path, monkeypatch):
    "Between its making and its lock another process may take it for a leftover"
    made, mkstemp = [], tempfile.mkstemp
    def make(*args):
        fd, name = mkstemp(*args)
        made.append(name)
        if len(made) == 1: os.unlink(name)
        return fd, name
    monkeypatch.setattr(tempfile, "mkstemp", make)
    write_artifact(tmp_path / "model.pkl", FACTS, b"x")
    assert len(made) == 2 and [p.name for p in tmp_path.iterdir()] == ["model.pkl"]


@pytest.mark.parametrize("name", ["a" * 251 + ".pkl", "a" * 230 + ".pkl", "é" * 125 + ".pkl", "日" * 83 + ".pkl"],
                         ids=["255 letters", "234 letters", "two bytes each", "three bytes each"])
def test_names_may_be_as_long_as_the_system_allows(name, tmp_path):
    for _ in range(2): write_artifact(tmp_path / name, FACTS, b"x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_interrupted_write_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "model.pkl"
    write_artifact(path, FACTS, b"old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): write_artifact(path, FACTS, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pkl"]


def test_mode_and_links_are_kept(tmp_path):
    real, link = tmp_path / "v1.pkl", tmp_path / "current.pkl"
    write_artifact(real, FACTS, b"old")
    real.chmod(0o640)
    link.symlink_to(real.name)
    write_artifact(link, {**FACTS, "name": "new"}, b"new")
    assert link.is_symlink() and inspect_artifact(real)["name"] == "new" and real.stat().st_mode & 0o777 == 0o640


def _open_without_a_folder(path):
    from fastai_compile import CompileError, open_learner
    tempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: ["/nonexistent"]
    try: open_learner(path)
    except CompileError as e: return f"{type(e).__name__} {e}"
    return "opened"


def test_no_temporary_folder(exported):
    "A read-only root: ONNX Runtime needs no folder; inductor and executorch name TMPDIR"
    said, _ = in_child(_open_without_a_folder, exported)
    assert "TMPDIR" in said if exported.stem in ("inductor", "executorch") else said == "opened", said


def test_path_like_things(tmp_path):
    for bad, says in [(tmp_path, "is a folder"), (tmp_path / "a" / "b.pkl", "make it first"), (io.BytesIO(), "not to a BytesIO")]:
        with pytest.raises(WriteError, match=says): write_artifact(bad, FACTS, b"x")
    assert list(Path(tmp_path).iterdir()) == []


CTRL_C = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import os, subprocess, time
from pathlib import Path
import torch
from helpers import Files, table_learner
from fastai_compile.backends import inductor
folder = Path({folder!r})
learn = table_learner(folder)
path = (folder / "model.pkl").resolve()
learn.export(path, compile="onnxruntime")
before, model, weights = Files.of(folder), learn.model, [p.clone() for p in learn.model.parameters()]
wanted = learn.get_preds()[0]
started = inductor._compile
def compile(*args):
    print("compiling", flush=True)
    return started(*args)
inductor._compile = compile
try: learn.export(path, compile="inductor")
except KeyboardInterrupt: print("interrupted", flush=True)
assert Files.of(folder) == before, "the old file"
assert learn.model is model and all(torch.equal(a, b) for a, b in zip(model.parameters(), weights)), "the model"
assert torch.equal(learn.get_preds()[0], wanted), "its answers"
learn.fit(1)
learn.export(path, compile="inductor", options={{"freezing": False}})
print("exported again", flush=True)
"""


@needs_backend("inductor")
@pytest.mark.parametrize("after_s", [1.5])
def test_ctrl_c_while_the_compiler_runs(tmp_path, after_s):
    "A real SIGINT to the whole process group, as a terminal sends it"
    code = CTRL_C.format(root=str(TESTS.parent), tests=str(TESTS), folder=str(tmp_path))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # nothing compiled before: the compiler has work
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, start_new_session=True, env=env)
    assert child.stdout.readline().strip() == "compiling", child.communicate()[1]
    time.sleep(after_s)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=200)
    if "both a fallback and a decomp" in err and Version(torch.__version__) < Version("2.12"):
        assert "interrupted" in out and "fastai_compile.errors." in err
        pytest.skip("torch 2.11: an interrupt while inductor registers its operators breaks it in that process; an error says so")
    words = ["interrupted", "compiling", "exported", "again"]
    swallowed = ["compiling", *words]  # The signal came inside of a destructor: the export goes on for a while, and then ends
    assert child.returncode == 0 and out.split() in (words, swallowed), f"{out}\n{err[-3000:]}"


def test_a_swallowed_ctrl_c_still_ends_the_export(tmp_path, monkeypatch):
    "As when it comes inside of a destructor, where Python drops it"
    from fastai_compile import export
    from helpers import table_learner
    learn, real = table_learner(tmp_path), export.capture
    def capture(*args, **kwargs):
        try: signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt: pass
        return real(*args, **kwargs)
    monkeypatch.setattr(export, "capture", capture)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): learn.export(tmp_path / "x.pkl", compile="eager")
    assert not (tmp_path / "x.pkl").exists() and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert learn.export(tmp_path / "x.pkl", compile="eager").backend == "eager"
