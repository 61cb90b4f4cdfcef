"""Settings and fixtures of all tests. Compiling takes seconds: what one test compiled, the others share."""
import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads sleep instead of spinning
os.environ.setdefault("MPLBACKEND", "Agg")

from dataclasses import dataclass
from pathlib import Path

import pytest


def pytest_configure(config):
    logging.getLogger("torch.__trace").propagate = False
    for line in ("ignore:load_learner:UserWarning", "ignore:.*torch.jit.*:FutureWarning",
                 "ignore:.*torch.jit.*:DeprecationWarning", "ignore:The given NumPy array is not writable:UserWarning"):
        config.addinivalue_line("filterwarnings", line)


@dataclass
class Artifact:
    "An exported file, the learner that it was made of, and what export said"
    path:Path
    learn:object
    report:object
    backend:str
    kind:str

    def open(self):
        from fastai_compile import open_learner
        return open_learner(self.path)


class Artifacts:
    def __init__(self, folder): self.folder, self.learners, self.made = folder, {}, {}

    def learner(self, kind):
        "A trained learner that tests may export, and must not change"
        from helpers import make_learner
        if kind not in self.learners:
            (self.folder / kind).mkdir()
            self.learners[kind] = make_learner(kind, self.folder / kind)
        return self.learners[kind]

    def __call__(self, backend, kind):
        from helpers import LACKS, Wrapped
        if backend in LACKS: pytest.skip(LACKS[backend])
        if (backend, kind) not in self.made:
            learn, path = self.learner(kind), self.folder / f"{kind}-{backend}.pkl"
            options = {"inductor": {"freezing": kind == "image"}}.get(backend, {})  # one compile instead of two
            try: report = learn.export(path, compile=backend, options=options)
            except Exception as e: report = e
            self.made[backend, kind] = Artifact(path, learn, report, backend, kind)
        made = self.made[backend, kind]
        if isinstance(made.report, Exception): raise made.report
        if (backend, kind) not in Wrapped.payloads: Wrapped.payloads[backend, kind] = made.open().model.payload
        return made


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    "`artifacts(backend, kind)`: an exported file, made once"
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    from helpers import make_images
    return make_images(tmp_path_factory.mktemp("images"))
