"""From a trained Learner to one compiled file and back, with every promise checked: `make demo`."""
import os
import json, shutil, statistics, subprocess, sys, time, warnings
from contextlib import nullcontext
if not sys.warnoptions: warnings.filterwarnings('ignore', message='.*torch.jit.script|load_learner')
from train import make_learner, train
from fastai.vision.all import *
from fastai_compile import *
from fastai_compile.backends.base import Table
from fastai_compile.timing import interleave, ratio

OUT = Path('demo_out')
COMPILERS = ('g++', 'gcc', 'c++', 'cc', 'clang', 'clang++')
COLD_RUNS = 3
START = time.perf_counter()

FRESH = """
import sys, time
start = time.perf_counter()
from fastai.vision.all import *
imported = time.perf_counter()
learn = load_learner(sys.argv[1])                                  # fastai's own function
loaded = time.perf_counter()
files = [Path(o) for o in json.loads(Path(sys.argv[2]).read_text())]
with learn.no_bar():
    learn.predict(files[0])
    first = time.perf_counter()
    probs = learn.get_preds(dl=learn.dls.test_dl(files, bs=64))[0]
Path(sys.argv[3]).write_text(json.dumps(dict(
    model=type(learn.model).__name__, labels=[learn.dls.vocab[i] for i in probs.argmax(1)], probs=probs.tolist(),
    import_s=imported-start, load_s=loaded-imported, predict_s=first-loaded, first_s=first-start)))
"""

def say(text): print(f'\n[{time.perf_counter()-START:4.0f} s] {text}', flush=True)

def check(holds, what):
    "Say that `what` holds, or stop with exit code 1"
    print(f"  {'holds' if holds else 'DOES NOT HOLD'}: {what}", flush=True)
    if not holds: sys.exit(1)

def bars(learn): return nullcontext() if sys.stdout.isatty() else learn.no_bar()

def predictions(learn, files):
    "Labels and probabilities of eager PyTorch"
    with learn.no_bar(): probs = learn.get_preds(dl=learn.dls.test_dl(files))[0]
    return [learn.dls.vocab[i] for i in probs.argmax(1)], probs

def bare_env():
    "The environment of a machine without a C++ compiler: the PATH is an empty folder"
    empty, cache = OUT/'empty_path', OUT/'inductor_cache'
    for p in (empty, cache):
        shutil.rmtree(p, ignore_errors=True)
        p.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('CC', 'CXX')}
    return env | {'PATH': str(empty.resolve()), 'TORCHINDUCTOR_CACHE_DIR': str(cache.resolve())}

def in_fresh_process(file, env):
    "What a new Python process, which knows `file` and nothing else, predicts for the validation files"
    res = OUT/'fresh.json'
    res.unlink(missing_ok=True)
    subprocess.run([sys.executable, '-W', 'ignore', '-c', FRESH, str(file), str(OUT/'valid.json'), str(res)], env=env, check=True)
    return json.loads(res.read_text())

def same_answers(got, labels, probs):
    "Stop unless the labels are the same; the largest difference of a probability"
    differing = sum(a != b for a, b in zip(got['labels'], labels, strict=True))
    check(differing == 0, f'all {len(labels)} labels are the same as before ({differing} differ)')
    return (torch.tensor(got['probs'])-probs).abs().max().item()

def trained():
    "A learner that is good enough, and its accuracy"
    say('training a resnet18 from scratch on 1,797 scans of handwritten digits (examples/train.py)')
    learn = make_learner(OUT)
    with bars(learn): train(learn)
    with learn.no_bar(): accuracy = learn.validate()[1]
    check(accuracy >= 0.95, f'accuracy {accuracy:.2%} on {len(learn.dls.valid_ds)} scans is at least 95%')
    return learn, accuracy

def exported(learn):
    "The report of a compiled export; a stock export for comparison"
    say("learn.export('digits.pkl', compile=True)")
    with bars(learn): report = learn.export('digits.pkl', compile=True)
    print(report)
    learn.export('stock.pkl')
    return report

def opened_without_compiler(env, labels, probs):
    "What a fresh process without a compiler predicts, and the largest difference"
    say("a fresh process without a C++ compiler opens it with fastai's load_learner")
    found = [c for c in COMPILERS if shutil.which(c, path=env['PATH'])]
    check(not found, f'none of {", ".join(COMPILERS)} is on its PATH')
    got = in_fresh_process(OUT/'digits.pkl', env)
    check(got['model'] == 'CompiledModel', 'what it opened is compiled')
    max_diff = same_answers(got, labels, probs)
    check(not list(Path(env['TORCHINDUCTOR_CACHE_DIR']).rglob('*')), "nothing was compiled: the compiler's cache is empty")
    return got, max_diff

def cold_starts(env):
    "What fresh processes need up to their first prediction, with the stock file and the compiled one in turn"
    say(f'first prediction: {COLD_RUNS} fresh processes each, in turn')
    pairs = [[in_fresh_process(OUT/f, env) for f in ('stock.pkl', 'digits.pkl')] for _ in range(COLD_RUNS)]
    median = lambda i, key: statistics.median(p[i][key] for p in pairs)
    names = {'first_s': 's to the first prediction', 'import_s': '  of this import', 'load_s': '  load', 'predict_s': '  predict'}
    note = f'median of {COLD_RUNS} processes'
    return [row(what, f'{median(0, k):.2f}', f'{median(1, k):.2f}', note) for k, what in names.items()]

def warm_times(file):
    "Milliseconds for an image, the stock file and the compiled one in turn in one process"
    say('timing one image, before and after in turn')
    stock, fast = load_learner(OUT/'stock.pkl'), load_learner(OUT/'digits.pkl')
    xb = stock.dls.test_dl([file], num_workers=0).one_batch()[0].as_subclass(torch.Tensor)
    stock.model.eval()
    with stock.no_bar(), fast.no_bar(), torch.no_grad():
        end = interleave({'before': lambda: stock.predict(file), 'after': lambda: fast.predict(file)}, round_s=0.4)
        alone = interleave({'before': lambda: stock.model(xb), 'after': lambda: fast.model(xb)}, round_s=0.2)
    return [timed('ms an image, learn.predict', **end), timed('ms an image, model alone', **alone)]

def timed(what, before, after):
    return row(what, f'{before.median_ms:.2f}', f'{after.median_ms:.2f}', f'{ratio(before, after)} times as fast (rounds)')

def row(what, before, after, note=''): return {'': what, 'before': before, 'after': after, 'note': note}

def without_data(env, labels, probs):
    "From a stock export to a compiled one, where the data is not at hand"
    say("the other way in: load_learner('stock.pkl'), no data, then export('from_stock.pkl', compile=True)")
    learn = load_learner(OUT/'stock.pkl')
    learn.path = OUT
    with bars(learn): print(f"  {learn.export('from_stock.pkl', compile=True).headline}")
    same_answers(in_fresh_process(OUT/'from_stock.pkl', env), labels, probs)

def mistake(learn):
    "A misspelt backend, for its message"
    say("a mistake on purpose: learn.export('typo.pkl', compile='onxruntime')")
    try: learn.export('typo.pkl', compile='onxruntime')
    except ConfigError as e: print(f'  ConfigError: {e}')
    else: check(False, 'a misspelt backend raises')
    check(not (OUT/'typo.pkl').exists(), 'nothing was written')

def main():
    OUT.mkdir(exist_ok=True)
    for f in OUT.glob('*.pkl'): f.unlink()
    learn, accuracy = trained()
    files = learn.dls.valid_ds.items
    (OUT/'valid.json').write_text(json.dumps([str(f) for f in files]))
    labels, probs = predictions(learn, files)
    report, env = exported(learn), bare_env()
    got, max_diff = opened_without_compiler(env, labels, probs)
    after = sum(label == f.parent.name for label, f in zip(got['labels'], files, strict=True))/len(files)
    sizes = [f'{(OUT/f).stat().st_size/1e6:.1f}' for f in ('stock.pkl', 'digits.pkl')]
    cold, warm = cold_starts(env), warm_times(files[0])
    table = Table([row('accuracy', f'{accuracy:.2%}', f'{after:.2%}', f'{len(files)} scans'),
                   row('largest difference', '', f'{max_diff:.1e}', 'of a probability'), *warm, *cold, row('MB', *sizes)])
    say(f'before: PyTorch, as fastai exports it; after: {report.backend}')
    print(table)
    without_data(env, labels, probs)
    mistake(learn)
    results = {'backend': report.backend, 'seconds': round(time.perf_counter()-START, 1), 'table': list(table)}
    (OUT/'results.json').write_text(json.dumps(results, indent=1))
    say(f"all of it holds. Try it: learn = load_learner('{OUT}/digits.pkl')")

if __name__ == '__main__': main()
