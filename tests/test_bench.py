"The benchmark: percentiles, one interleaved run, what fails, cold starts, load made by LoadGen"
import itertools
import json
import math
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers import Wrapped, image_learner, items_of, registered, table_learner

from fastai_compile.bench import _row as row_of, benchmark, time_calls
from fastai_compile.cold import cold_start
from fastai_compile.contenders import EAGER, STOCK, check_targets, write_stock
from fastai.learner import load_learner
from fastai_compile.errors import BackendError, BackendUnavailable, CompileError, ConfigError, ExampleError
from fastai_compile.percentiles import calls_needed, check_limit, quantile, quantile_bound, summarize
from fastai_compile.results import gain_of, noise_of
from fastai_compile.stages import bench_items, stage_split
from fastai_compile.timing import Timing

QUICK = dict(cold=0, verify="numbers")


@pytest.fixture(scope="module")
def table(tmp_path_factory): return table_learner(tmp_path_factory.mktemp("table"), epochs=1)


@pytest.fixture(scope="module")
def rows(): return items_of("table", None)


# ---- percentiles

def at_most(k, n, p):
    "Exactly, in fractions"
    p = Fraction(p)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize("q, over", [("0.5", 0), ("0.9", 0), ("0.9", 3), ("0.95", 1), ("0.99", 0), ("0.99", 1)])
def test_calls_needed_is_the_least_that_the_binomial_allows(q, over):
    n, p = calls_needed(float(q), over), 1 - Fraction(q)
    assert at_most(over, n, p) <= Fraction(1, 100) < at_most(over, n - 1, p)


def test_the_published_figures(): assert (calls_needed(0.99), calls_needed(0.99, 1)) == (459, 662)


@pytest.mark.parametrize("n", [43, 44, 458, 459, 1000])
def test_a_bound_is_there_as_soon_as_the_calls_are(n):
    times = list(range(n))
    for q in (0.9, 0.99):
        bound = quantile_bound(times, q)
        assert (bound is None) == (n < calls_needed(q))
        if bound is not None: assert quantile(times, q) <= bound <= max(times)


def test_a_percentile_without_enough_calls_is_empty():
    few, many = summarize([1.0] * 458 + [9.0]), summarize([1.0] * 458)
    assert few.ms["p99"] is not None and few.ms["p99.9"] is None and few.jitter == 1
    assert many.ms["p99"] is None and many.jitter is None and many.ms["p95"] == 1


def test_a_limit_has_three_outcomes():
    assert check_limit([1] * 459, 2) == "holds"
    assert check_limit([1] * 80 + [3] * 20, 2) == "does not hold"
    assert "not decidable" in check_limit([1] * 458, 2)


@pytest.mark.parametrize("q", [0, 1, 99])
def test_a_quantile_lies_between_0_and_1(q):
    with pytest.raises(ValueError, match="between 0 and 1"): calls_needed(q)


# ---- noise

def timing(*ms): return Timing(ms, 1)


def test_a_difference_inside_the_noise_is_none():
    base, this = timing(10, 10.1, 9.9), timing(8, 8.1, 7.9)
    assert gain_of(base, this).real and not gain_of(base, this, noise=0.5).real
    assert not gain_of(base, timing(9.8, 9.9, 9.7)).real, "2% is below 5%"
    assert not gain_of(base, timing(5, 30, 9)).real, "the rounds disagree"
    assert gain_of(this, base).real and gain_of(this, base).ratio.median < 1
    assert str(gain_of(base, base)).startswith("none") and noise_of(base, base) == 0


@pytest.mark.parametrize("ms, export_s, calls", [
    (2, 0.9, 113), (2, 0.0005, 1), (30, 0.9, math.inf), (9.8, 0.9, math.inf), (2, None, None)])
def test_the_calls_that_pay_an_export_back(ms, export_s, calls):
    "Whole calls, rounded up: 900 ms at 8 ms a call; never, where it is slower or within the noise"
    base, this = timing(10, 10.1, 9.9), timing(ms, ms*1.01, ms*.99)
    contender = SimpleNamespace(name="this", failed="", export_s=export_s)
    rec = SimpleNamespace(error="", times_ms=this.rounds_ms)
    row = row_of(contender, 1, rec, {STOCK: base, "this": this}, STOCK, 0.02)
    assert row.break_even == calls and row.gain.ratio.median == pytest.approx(10/ms)


def test_a_call_that_raises_takes_no_further_part():
    calls = itertools.count()
    def stops():
        if next(calls) > 6: raise OSError("the disk is gone")
    timings, rec = time_calls({"fine": lambda: None, "stops": stops}, 0.2)
    assert set(timings) == {"fine"} and rec["stops"].error == "OSError: the disk is gone"
    assert len(rec["fine"].times_ms) == len(rec["fine"].ms) - 2


# ---- items

def test_items_are_the_learners_own_or_made_up_or_missing(table, image_folder):
    images = image_learner(image_folder, epochs=0)
    files, source = bench_items(images, n=5)
    assert files == list(images.dls.valid_ds.items[:5]) and "dls.valid" in source
    made, source = bench_items(table)
    assert list(made.columns) == ["kind", "width", "height"] and "made-up" in source
    with pytest.raises(ExampleError, match="empty"): bench_items(images, [])
    with pytest.raises(ConfigError, match="list or a DataFrame"): bench_items(images, "photo.png")


def test_stages_add_up_to_less_than_the_call(image_folder):
    learn = image_learner(image_folder, epochs=0)
    split = stage_split(learn, bench_items(learn)[0], 1, rounds=3)
    assert list(split) == ["decode", "transforms", "model", "answer"] and all(v >= 0 for v in split.values())


# ---- one run

class Copy(Wrapped):
    "The eager model under another name"

class Sleeps(Wrapped):
    "Right, and slow"
    def around(self, run, xs):
        time.sleep(0.05)
        return run(xs)

class Wrong(Wrapped):
    def around(self, run, xs): return [o + 1 for o in run(xs)]

class Crashes(Wrapped):
    def compile(self, captured, config): raise ZeroDivisionError("inside a compiler")

class Absent(Wrapped):
    def probe(self, device): return type(super().probe(device))(False, "no such chip", "buy one")


def state_of(learn):
    values = {k: v.clone() for k, v in learn.model.state_dict().items()}
    own = {k: id(v) for k, v in vars(learn).items()}
    order = [list(dl.get_idxs()) for dl in learn.dls.loaders[1:]]
    return values, own, torch.get_rng_state(), order, learn.model.training


def assert_untouched(learn, before):
    after = state_of(learn)
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items()) and before[1] == after[1]
    assert torch.equal(before[2], after[2]) and before[3:] == after[3:]


def test_one_run_has_a_row_for_everybody_and_leaves_the_learner_alone(table, rows):
    before, threads = state_of(table), torch.get_num_threads()
    with registered(Copy(), Sleeps(), Wrong(), Crashes(), Absent()):
        names = ["copy", "sleeps", "wrong", "crashes", "absent"]
        res = benchmark(table, rows, names, bs=(1, 4), budget_s=3, hourly_price=1.0, threads=1, **QUICK)
    assert_untouched(table, before)
    assert torch.get_num_threads() == threads
    assert [(r.target, r.bs) for r in res.rows] == [(n, b) for b in (1, 4) for n in (STOCK, EAGER, *names)]
    failed = {r.target: r.failed for r in res.rows if r.failed}
    assert set(failed) == {"wrong", "crashes", "absent"}
    assert "VerificationError" in failed["wrong"] and "ZeroDivisionError: inside a compiler" in failed["crashes"]
    assert failed["absent"] == "not usable here: no such chip (buy one)"
    for r in res.rows:
        if r.failed: assert not r.times_ms and r.gain is None
        else: assert r.times_ms and r.model_ms and r.per_s and r.cost(1.0) > 0 and (r.stages or r.target != STOCK)
    assert all(r.break_even == math.inf for r in res.rows if r.target == "sleeps"), "never paid back"
    assert all(r.gain and r.break_even for r in res.rows if r.target in ("copy", "sleeps"))
    assert set(res.noise) == {1, 4} and res.environment["threads"] == 1
    check_shown(res)


def check_shown(res):
    text, page, df = repr(res), res._repr_html_(), res.to_df()
    for said in ("p50 ms", "no such chip", "decode", "break-even", "never", "per million", "OMP_WAIT_POLICY", "noise"):
        assert said in text and said in page
    assert len(df) == len(res.rows) and set(df.target[df.calls > 0]) == {STOCK, EAGER, "copy", "sleeps"}
    assert (df.failed != "").sum() == 6 and df.model_ms.notna().sum() == df.items_per_s.notna().sum() == 8
    def refuse(constant): raise AssertionError(f"{constant} is no JSON")
    data = json.loads(res.to_json(times=True), parse_constant=refuse)
    assert len(data["rows"]) == len(res.rows) and len(data["rows"][0]["times_ms"]) == data["rows"][0]["calls"]
    assert data["environment"]["cpu"] and data["rows"][2]["target"] == "copy"
    assert len(res.plot_latency().axes) == 2 and res.plot_throughput().axes[0].get_xlabel()
    with pytest.raises(ConfigError, match="was not measured"): res.plot_latency(7)


def test_a_compiled_learner_takes_part_as_it_was_opened(artifacts, rows):
    learn = artifacts("eager", "table").open()
    model = learn.model
    res = benchmark(learn, rows, [], bs=1, budget_s=1, **QUICK)
    assert learn.model is model and [r.target for r in res.rows] == [STOCK, EAGER, "as opened (eager)"]
    assert not any(r.failed for r in res.rows)


def test_images_without_items(image_folder):
    learn = image_learner(image_folder, epochs=0)
    res = benchmark(learn, targets=[], bs=2, budget_s=1, **QUICK)
    assert "dls.valid" in res.source and all(r.model_ms and not r.failed for r in res.rows)


@pytest.mark.parametrize("choice, said", [
    (dict(bs=0), "bs="), (dict(bs=()), "bs="), (dict(budget_s=0), "budget_s="),
    (dict(hourly_price=-1), "hourly_price="), (dict(cold=-1), "cold="),
    (dict(scenario="sever"), "Did you mean 'server'"), (dict(targets="copi"), "no backend"),
    (dict(targets=[1]), "targets="), (dict(verify="off"), "verify="), (dict(max_batch=3), "no choice")])
def test_a_mistake_stops_the_run(table, rows, choice, said):
    usual = {"targets": [], "budget_s": 1, "cold": 0}
    with pytest.raises(ConfigError, match=said): benchmark(table, rows, **{**usual, **choice})


def test_targets():
    assert EAGER not in check_targets("available") and check_targets(["onnxruntime"] * 2) == ["onnxruntime"]


# ---- fresh processes

def test_cold_start_of_good_and_damaged_files(table, rows, tmp_path):
    write_stock(table, tmp_path / "stock.pkl")
    (tmp_path / "damaged.pkl").write_bytes((tmp_path / "stock.pkl").read_bytes()[:1000])
    found = cold_start({n: tmp_path / f"{n}.pkl" for n in ("stock", "damaged")}, rows.iloc[0], runs=1, threads=1)
    row = found["stock"].row()
    assert row["total_s"] >= row["import_s"] > 0 and row["load_s"] > 0 and row["first_s"] > 0 and row["peak_mb"] > 50
    assert found["stock"].runs[0]["model"] == "TabularModel"
    assert "the fresh process stopped" in found["damaged"].failed and not found["damaged"].runs


def test_a_process_that_hangs_is_given_up(table, rows, tmp_path):
    write_stock(table, tmp_path / "stock.pkl")
    found = cold_start({"stock": tmp_path / "stock.pkl"}, rows.iloc[0], runs=1, timeout_s=0.05)
    assert "no answer within" in found["stock"].failed


# ---- load made by LoadGen

@pytest.fixture
def loadgen(): return pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed (extra bench)")


def stalls(at, seconds=1.0):
    calls = itertools.count()
    return lambda index: time.sleep(seconds if next(calls) == at else 0.002)


def test_a_stall_is_seen_in_open_loop_and_not_in_closed_loop(loadgen):
    from fastai_compile.scenario import run_loadgen
    found = {s: [r.ms for r in run_loadgen(stalls(100), 8, s, 150, 4)] for s in ("single_stream", "server", "spikes")}
    hit = {s: sum(ms > 500 for ms in times) for s, times in found.items()}
    assert 1 <= hit["single_stream"] < 5 and hit["server"] > 30 and hit["spikes"] > 30 # the machine may stall too
    assert all(len(v) >= calls_needed(0.99) for v in found.values())
    p99 = {s: summarize(v).ms["p99"] for s, v in found.items()}
    assert p99["single_stream"] < 500 < min(p99["server"], p99["spikes"])


def test_offline_answers_everything_once(loadgen):
    from fastai_compile.scenario import run_loadgen
    def refuses(index):
        if index == 2: raise BackendError("malformed")
    found = run_loadgen(refuses, 4, "offline", 40, 1)
    assert len(found) >= 40 and {r.index for r in found if r.error} == {2}
    assert [r.ms for r in found] == sorted(r.ms for r in found)


def test_offline_may_answer_the_whole_query_as_a_stream(loadgen):
    "Each request ends, with its own answer or error, also where the stream breaks off"
    from fastai_compile.scenario import run_loadgen
    asked = []
    def stream(numbers):
        for k, i in enumerate(asked.append(len(numbers)) or numbers):
            if k == 30: raise OSError("the disk is gone")
            yield BackendError("malformed") if i == 2 else "fine"
    found = run_loadgen(lambda i: 1/0, 4, "offline", 40, 1, answer_all=stream)
    assert asked == [len(found)] and {r.index for r in found[:30] if r.error} == {2}
    assert all("the disk is gone" in r.error for r in found[30:])


@pytest.mark.parametrize("scenario", ["single_stream", "offline", "spikes"])
def test_every_scenario_of_benchmark(scenario, loadgen, table, rows):
    with registered(Copy()): res = benchmark(table, rows, ["copy"], scenario=scenario, budget_s=3, qps=20, malformed=0.2, **QUICK)
    assert [r.target for r in res.rows] == [STOCK, EAGER, "copy"] and ("predict_many" in repr(res)) == (scenario == "offline")
    for r in res.rows: assert r.good and not any(q.error for q in r.good) and any(q.error for q in r.malformed)


def test_malformed_texts_get_no_answer(tmp_path):
    from benchmarks import families_data
    from fastai_compile.scenario import malformed_items
    learn = families_data.build("text_classifier", tmp_path, train=False)
    learn.export(tmp_path / "text.pkl", compile="eager", verify="numbers")
    opened = load_learner(tmp_path / "text.pkl")
    for item in malformed_items(learn, ["a text"], tmp_path):
        with pytest.raises(CompileError), opened.no_bar(): opened.predict(item)


def test_a_learner_under_load_with_malformed_requests(loadgen, table, rows):
    before = state_of(table)
    with registered(Copy(), Crashes()):
        res = benchmark(table, rows, ["copy", "crashes"], scenario="server", budget_s=4, qps=20, malformed=0.2,
                        limit_ms=60_000, **QUICK)
    assert_untouched(table, before)
    assert [r.target for r in res.rows] == [STOCK, EAGER, "copy", "crashes"]
    for r in res.rows[:3]:
        assert r.good and r.malformed and not any(q.error for q in r.good) and any(q.error for q in r.malformed)
    assert "ZeroDivisionError" in res.rows[3].failed and "LoadGen-based; no MLPerf result" in repr(res)
    assert len(res.to_df()) == sum(len(r.good) + len(r.malformed) for r in res.rows) and "99% in 60000 ms" in repr(res)
    assert json.loads(res.to_json())["rows"][0]["good"] and "open loop" in res._repr_html_()


def test_without_loadgen_the_message_names_the_extra(monkeypatch, table, rows):
    from fastai_compile import scenario
    monkeypatch.setattr(scenario, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"fastai_compile\[bench\]"): scenario.run_loadgen(print, 1, "server")


@pytest.mark.parametrize("choice, said", [
    (dict(scenario="sever"), "scenario="), (dict(qps=0), "qps="), (dict(seconds=-1), "seconds=")])
def test_a_mistake_in_a_scenario(loadgen, choice, said):
    from fastai_compile.scenario import run_loadgen
    with pytest.raises(ConfigError, match=said): run_loadgen(print, 1, **{"scenario": "server", **choice})
