"""Write benchmarks/README.md from benchmarks/results/: `python benchmarks/report.py`. Nothing is measured."""
import json
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import (bulk, cerebras, cold, coverage, decode, diagnose, families, gpu, gpu_predict, imports, limits,
                        model, overhead, predict, scale)
from benchmarks.common import RESULTS, ROOT

TEXT = """\
# Benchmarks

Each script prints its result and writes it to `results/`, with the machine, the versions, the date, the commit and the command.
`python benchmarks/report.py` makes this page of it. What was not run says "not run".

Competing times are taken in turn, round by round, in one process, each turn after a pause, in which the threads of
the one before stop spinning, and a warm-up. A ratio is the median of the rounds; in brackets stand the bounds between which
the true median lies 98 times of 100 (with 7 rounds or fewer: the smallest and the largest). Run them on a machine that does
nothing else: `load_at_start` in a result says whether it did.
`OMP_WAIT_POLICY` is left as it is: with `PASSIVE`, which helps beside other load, threads sleep, and waking one on an
idle virtual machine took 0.5 ms, more than 20 small models.

## The model alone

`python benchmarks/model.py`: eager, channels_last, `torch.compile`, inductor, ONNX Runtime by hand and what `compile=True` chose.
All take and return tensors; ONNX Runtime by hand has the defaults of its session, and only the compiled model checks its inputs.

{model}

How far that is from the arithmetic and the memory of the machine, by `python benchmarks/limits.py`:

{limits}

## One item, end to end

`python benchmarks/predict.py`: a file or a row in, a decoded answer out, against fastai's own `learn.predict` around the same
compiled model ("stock"), around the PyTorch model ("eager"), and scripts by hand: ONNX Runtime, OpenVINO, and the way of the
package fastinference. Each call comes after others, so caches are as cold as in a server, not as warm as in a loop.

{predict}

The floor of a photograph is its decoding and its resizing by PIL, without which the answer would be another one, and the model,
by hand, one after another. Each of them alone, in a loop, is quicker than there: its data and code stay in the caches.
The last column says how many times faster than eager fastai an answer with no time beyond this floor would be: no goal above
it can be reached with exact pixels. In the scripts by hand, the threads of ONNX Runtime spin for 45 ms after a call, on CPUs that
would be free for other work. Ours stop after each call, and the next one has to wake them; "threads spin" is ours with the
setting of those scripts. What a photograph takes beyond its floor goes into looking whether the learner was changed, making and
normalizing the tensor (the scripts by hand do that too), waking threads, and decoding the answer: each some hundredths to three
tenths of a millisecond, because after the decoding even their code comes out of a cold cache. For a row, most of the time beyond
the model goes into what fastai returns with the answer, a decoded table of one row; a script by hand makes none. For pairs of a
collab learner, into the frame that `test_dl` makes. "Not written": nobody's tutorial was followed.

Decoders with PIL's very pixels, by `python benchmarks/decode.py`: file to pixels, and file to the picture that the model sees.
What another decoder saves goes into making a PIL picture of its pixels, for the resize that fastai does by PIL, and the resize
takes as long as the decoding. So pictures are opened by PIL, and no extra is needed. PyTorch's own resize of bytes is quicker,
but up to 0.2% of its pixels were off by one of 255: not exact.

{decode}

## Many items

`python benchmarks/bulk.py`: `get_preds` with 0, 1 and 2 workers, and `predict_many`. The floor is decoding and resizing by PIL
alone, by as many threads, and the model alone; for a table, the model alone.

{bulk}

## From process start to the first answer

`python benchmarks/cold.py`

{cold}

What the library adds to the import of fastai, by `python benchmarks/imports.py` (the limit that we hold to is 0.3 s):

{imports}

## How it grows

`python benchmarks/scale.py`

{scale}

## Models and targets

`python benchmarks/coverage.py`: how far each model is taken for each target on the machine that ran it.

{coverage}

## Cerebras

`python benchmarks/cerebras.py`: lowered by the vendor's own program, and the lowered graph calculated and compared with eager.

{cerebras}

## NVIDIA GPUs

`python benchmarks/gpu.py`: the models alone.

{gpu}

`python benchmarks/gpu_predict.py`: a ConvNeXt-Base on 5,000 photographs, one at a time, from the file to the decoded answer.

{gpu_predict}

## What an export costs

`python benchmarks/overhead.py`: capture, conversion and session of `compile='onnxruntime'`, and the same three steps by hand.

{overhead}

## What is random, and what breaks the graph

`python benchmarks/diagnose.py`: planted mistakes, harmless pipelines and causes of graph breaks, which are those of the tests.
For each policy the table says what became of the transform; "error" means a `RandomTransformError` that names it.

{diagnose}

## Long counts

`make soak`: processes killed while they write a file, files with one bit changed or cut short, predictions from eight threads.

{soak}

## Families of learners

`python benchmarks/families.py`: every family with its data and without, on every backend, each file opened in a fresh process.
The models are tiny and their images have 64 pixels, so the times say little about yours. The milliseconds are those of the model
alone at batch 1, taken by the export itself. The largest difference is that of a prediction to eager. The seconds to load are
those of `load_learner`, after fastai was imported. `items=` given: nothing can be made up for raw tensors, so a few were passed.

{families}
"""


def _described(module, name: str) -> str:
    path = RESULTS / f"{name}.json"
    return module.describe(json.loads(path.read_text())) if path.exists() else "Not run."


def _long_counts() -> str:
    "soak.json as Markdown"
    path = RESULTS / "soak.json"
    if not path.exists(): return "Not run."
    lines = []
    for part, d in json.loads(path.read_text())["parts"].items():
        rows = d["results"] if part == "damage" else {part: d["results"]}
        said = {n: ", ".join(f"{k}: {v}" for k, v in r.items()) if isinstance(r, dict) else r for n, r in rows.items()}
        lines += [f"- {name}: {text}" for name, text in said.items()]
        lines.append(f"- ({part}: {d['run']['date'][:10]}, commit {d['run']['commit'][:7]}, `{d['run']['command']}`)")
    return "\n".join(lines)


def text() -> str:
    "The page"
    parts = bulk, cerebras, cold, decode, diagnose, gpu, gpu_predict, imports, limits, model, overhead, predict, scale
    told = {m.__name__.rpartition(".")[2]: m for m in parts}
    cells = coverage.describe(coverage.OUT) if coverage.OUT.exists() else "Not run."
    pages = {name: _described(m, name) for name, m in told.items()}
    return TEXT.format(**pages, coverage=cells, soak=_long_counts(), families=families.describe())


if __name__ == "__main__": (ROOT / "benchmarks" / "README.md").write_text(text())
