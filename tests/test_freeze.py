"""What varies in a validation set is found, named right and frozen; what does not is left alone."""
import copy
import datetime
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import get_image_files
from fastai.learner import load_learner
from fastai.vision.augment import Brightness, Flip, RandomResizedCropGPU, aug_transforms
from fastai.vision.core import PILImage, TensorImage
from fasttransform.transform import Transform

from fastai_compile.draws import FORCED, Source, global_sources, sources_kept
from fastai_compile.errors import ConfigError, RandomTransformError
from fastai_compile.freeze import FreezeTransforms, apply_freeze, frozen
from fastai_compile.held import FrozenTransform
from fastai_compile.randomness import find_random
from fastai_compile.reach import difference

import random_mistakes as cases
from helpers import fresh, make_frame, make_images

PINNED = ("auto", "skip", "seed")
by_name = {"ids": lambda c: c.name}
each_mistake = pytest.mark.parametrize("case", cases.MISTAKES, **by_name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_images(tmp_path_factory.mktemp("pixels"), n=20)


@pytest.fixture(scope="module")
def learner_of(folder):
    "`learner_of(case)`: its learner, made once"
    made = {}
    def make(case):
        if case.name not in made: made[case.name] = case.make(folder)
        return made[case.name]
    return make


def case_of(name): return next(c for c in [*cases.MISTAKES, *cases.HARMLESS] if c.name == name)


def seeded(n):
    "Every source in another state: Python's, numpy's, torch's, and those of the module of mistakes"
    random.seed(n); np.random.seed(n); torch.manual_seed(n)


def preds(learn, seed, **kwargs):
    seeded(seed)
    return learn.get_preds(**kwargs)[0]


# ---- found, named right

def test_tables_are_large_enough(): assert len(cases.MISTAKES) >= 25 and len(cases.HARMLESS) >= 25


@each_mistake
def test_mistake_is_found_and_named(case, learner_of):
    found = find_random(learner_of(case))
    assert len(found.random) == 1 and not found.not_tested, found
    f = found.random[0]
    assert case.finds in f.name and case.source in f.source and f.step.where == case.where, found
    assert f.mend and f.evidence
    stock = case.auto == "valid" or case.where in ("order of rows", "create_batch") or case.name == "dropout_that_stays"
    if not stock: assert f.file.startswith("tests/random_mistakes.py:"), found


@pytest.mark.parametrize("case", cases.HARMLESS, **by_name)
def test_no_false_alarm(case, learner_of):
    found = find_random(learner_of(case))
    assert not found, found
    assert found.tested > 1 and "nothing varies" in repr(found) and "missed" in found._repr_html_()


def test_line_that_draws_is_named(learner_of):
    (f,) = find_random(learner_of(case_of("rare_python"))).random
    assert "`def rare_random(x:TensorImage): return x * 0 if random.random() < 0.05 else x`" in f.evidence
    assert "a rare event" in f.evidence


def test_hash_order_and_time_are_found_in_fresh_processes(folder):
    @cases.late
    def by_hash(x:TensorImage): return x + hash("a name") % 97
    @cases.late
    def by_day(x:TensorImage): return x + datetime.date.today().toordinal() % 50
    learn = cases.images(folder, batch=[by_hash, by_day])
    assert not find_random(learn)
    found = find_random(learn, deep=True)
    wanted = {("by_hash", "hash order"), ("by_day", "the time")}
    assert {(f.name.rpartition(".")[2], f.source) for f in found.random} == wanted, found


def test_what_cannot_be_copied_is_said_to_be_untested(folder):
    found = find_random(cases.holds_a_file(folder))
    assert not found.random and [f.name for f in found.not_tested] == ["Logs"]
    assert "cannot be copied" in repr(found) and "1 not tested" in repr(found)


def test_a_lock_is_no_obstacle(folder):
    "A lock cannot be copied, and needs no copy"
    learn = cases.lock_held(folder)
    found, = find_random(learn).found
    assert found.source == "random" and "Locks" in found.name
    for policy in ("skip", "seed"):
        with frozen(learn, policy): assert difference(preds(learn, 1), preds(learn, 2)) is None
    assert not find_random(cases.lock_held(folder, draws=False)).found


def test_what_could_not_be_tested_is_no_secret(folder):
    learn = cases.holds_a_file(folder, draws=True)
    for policy in ("auto", "valid", "skip", "seed"):
        with pytest.warns(UserWarning, match="Logs.*could not be tested"): learn.get_preds(cbs=FreezeTransforms(policy))
    with pytest.raises(RandomTransformError, match="nothing on trust"): learn.get_preds(cbs=FreezeTransforms("raise"))


@pytest.mark.parametrize("policy", ["auto", "valid", "skip", "seed", "raise"])
def test_a_callback_comes_too_late_for_procs(policy, folder):
    learn = cases.proc_that_draws(folder)
    learn.add_cb(FreezeTransforms(policy))
    df = make_frame(8, seed=2).dropna()
    with pytest.raises(RandomTransformError, match="NoisyProc"): learn.predict(df.iloc[0])
    learn.remove_cb(FreezeTransforms)
    with frozen(learn, "skip"):
        a, b = (learn.get_preds(dl=learn.dls.test_dl(df))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_a_way_out_is_one(folder, learner_of):
    for case in cases.MISTAKES:
        learn = learner_of(case)
        for policy in ("auto", "seed"):
            try:
                with frozen(learn, policy): continue
            except RandomTransformError as e: said = str(e)
            for ways in re.findall(r"frozen\(learn, '(\w+)'\)", said):
                with frozen(learn, ways): pass


def test_what_raises_is_said_to_be_untested(folder):
    def refuses(x:PILImage): raise OSError("no such camera")
    learn = cases.images(folder)
    learn.dls.valid.after_item.add(Transform(refuses))
    found = find_random(learn)
    assert not found.random and "no such camera" in found.not_tested[0].evidence


def test_learner_without_data(folder, tmp_path):
    learn = cases.images(folder, [cases.FlipPairs()])
    learn.export(tmp_path / "bare.pkl")
    bare = load_learner(tmp_path / "bare.pkl")
    assert [f.name for f in find_random(bare).random] == ["FlipPairs"], "made-up items"
    assert [f.name for f in find_random(bare, items=get_image_files(folder)[:3]).random] == ["FlipPairs"]
    empty = cases.raw(folder)
    empty.dls = DataLoaders(DataLoader([], bs=2), DataLoader([], bs=2))
    assert "items=" in find_random(empty).not_tested[0].evidence


# ---- nothing is touched

def everything(learn):
    "What must be the same before and after: random states, transforms, weights, flags"
    dls = learn.dls
    names = "after_item", "before_batch", "after_batch"
    fs = [f for dl in dls.loaders for n in names for f in getattr(getattr(dl, n, None), "fs", [])]
    fs += [f for dl in dls.loaders for tl in getattr(dl.dataset, "tls", []) for f in tl.tfms.fs]
    shared = [Source("", cases.RNG), *(Source("", s.rng) for s in global_sources())]
    return {"objects": [id(o) for o in (dls, *dls.loaders, learn.model, learn.opt, *learn.cbs, *fs)],
            "random": [s.mark() for s in shared], "loaders": [dl.rng.getstate() for dl in dls.loaders if hasattr(dl, "rng")],
            "transforms": [copy.deepcopy({k: v for k, v in vars(f).items() if not callable(v)}) for f in fs],
            "held": [s.mark() for f in fs for s in [Source("", getattr(f, "rng", None))] if s.rng is not None],
            "weights": {k: v.clone() for k, v in learn.model.state_dict().items()},
            "flags": [m.training for m in learn.model.modules()], "splits": [getattr(dl.dataset, "split_idx",
                                                                                     None) for dl in dls.loaders],
            "pipes": [getattr(getattr(dl, n, None), "split_idx", None) for dl in dls.loaders for n in names],
            "calls": cases.CALLS}


UNTOUCHED = ["rand_transform_without_split", "numpy_generator_held", "generator_of_the_module",
             "counter_of_the_object", "counter_of_the_module",
             "augmentation_of_a_raw_dataset", "dropout_in_eval", "dropout_and_batchnorm", "cycle_held",
             "callback_that_draws", "proc_that_draws",
             "all_augmentation", "language_model", "shuffled_validation"]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_nothing_is_touched(name, folder):
    learn = case_of(name).make(folder)
    before = everything(learn)
    find_random(learn)
    for policy in ("auto", "seed"):
        try:
            with frozen(learn, policy): pass
        except RandomTransformError: pass
    after = everything(learn)
    for k in before: assert difference(before[k], after[k]) is None, k


def test_the_next_training_batch_is_the_same(folder):
    batches = []
    for look in (False, True):
        seeded(3)
        learn = cases.images(folder, [cases.Jitter()], aug_transforms())
        if look: find_random(learn)
        batches.append(learn.dls.train.one_batch())
    assert difference(*batches) is None


# ---- frozen

@each_mistake
@pytest.mark.parametrize("policy", PINNED)
def test_frozen_under_each_policy(case, policy, learner_of):
    learn, wanted = learner_of(case), getattr(case, policy)
    dls, cbs = learn.dls, list(learn.cbs)
    if wanted == "raises":
        with pytest.raises(RandomTransformError, match=re.escape(case.finds)) as e:
            with frozen(learn, policy): pass
        assert "To settle it, one of:\n- " in str(e.value)
    else:
        with frozen(learn, policy) as rows:
            assert [r["frozen"] for r in rows] == [wanted]
            first = preds(learn, 1)
            assert difference(first, preds(learn, 2)) is None
            small = preds(learn, 3, dl=learn.dls.valid.new(bs=1))
            torch.testing.assert_close(first, small, rtol=1e-4, atol=1e-5)
            test_loader = preds(learn, 4, dl=dls.valid.new(num_workers=0))
            assert difference(first, test_loader) is None, "a loader that was made outside"
    assert learn.dls is dls and list(learn.cbs) == cbs


@pytest.mark.parametrize("case", [c for c in cases.MISTAKES if c.auto != "raises"], **by_name)
def test_valid_form(case, learner_of):
    with frozen(learner_of(case), "valid") as rows: assert rows[0]["frozen"] == case.valid


def test_auto_names_three_ways_out(learner_of):
    with pytest.raises(RandomTransformError) as e: learner_of(case_of("torch_in_a_function")).get_preds(cbs=FreezeTransforms())
    says = str(e.value)
    assert "torch_noise (tests/random_mistakes.py:" in says and "batch transforms" in says
    for way in ("RandTransform", "FreezeTransforms('skip')", "FreezeTransforms('seed')"): assert way in says


def test_raise_refuses_fastais_own(learner_of):
    with pytest.raises(RandomTransformError, match="Flip"):
        with frozen(learner_of(case_of("augmentation_of_a_raw_dataset")), "raise"): pass


def test_skip_is_the_pipeline_without_it(folder):
    learn, plain = cases.images(folder, batch=[cases.numpy_noise]), cases.images(folder)
    with frozen(learn, "skip"): assert difference(preds(learn, 1), preds(plain, 2)) is None


def test_valid_is_the_same_transform_on_a_validation_split(folder):
    ds = cases.Squares()
    split = cases.Squares()
    split.split_idx = 1
    tfms = lambda: [RandomResizedCropGPU(24, valid_scale=0.8)]
    learn, right = cases.raw(folder, ds, after_batch=tfms()), cases.raw(folder, ds, valid=split, after_batch=tfms())
    with frozen(learn): assert difference(preds(learn, 1), preds(right, 2)) is None


def test_seed_depends_on_the_content_alone(folder):
    learn = cases.images(folder, [cases.FlipPairs()], [cases.torch_noise])
    files = get_image_files(folder).sorted()[:6]
    with frozen(learn, "seed"):
        one = preds(learn, 1, dl=learn.dls.test_dl(files))
        turned = preds(learn, 2, dl=learn.dls.test_dl(files[::-1], bs=2)).flip(0)
        torch.testing.assert_close(one, turned, rtol=1e-4, atol=1e-5)
        single = learn.predict(files[2])[2]
        torch.testing.assert_close(one[2], single, rtol=1e-4, atol=1e-5)
        rows = learn.dls.test_dl([files[0], files[0], files[1]]).one_batch()[0]
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
        noise = [learn.dls.test_dl([f]).one_batch()[0] for f in files[:2]]
    plain = cases.images(folder)
    clean = [plain.dls.test_dl([f]).one_batch()[0] for f in files[:2]]
    assert not torch.equal(noise[0], clean[0]), "pinned, not left out"


def test_labels_do_not_change_what_is_drawn(folder):
    learn = cases.images(folder, [cases.FlipPairs()])
    with frozen(learn, "seed"):
        labelled = learn.dls.valid.one_batch()[0]
        unlabelled = learn.dls.test_dl(list(learn.dls.valid.items)).one_batch()[0]
    assert torch.equal(labelled, unlabelled[:len(labelled)])


def test_worker_processes(folder):
    learn = cases.images(folder, [cases.albumentations_mirror, cases.FlipPairs()])
    with frozen(learn, "seed"):
        here = preds(learn, 1)
        there = preds(learn, 2, dl=learn.dls.valid.new(num_workers=2))
        assert difference(here, there) is None
        learn.dls.valid.one_batch()  # the pipelines learn their split
        sent = pickle.loads(pickle.dumps(learn.dls.valid.after_item))  # as a spawned worker gets it
        x = learn.dls.valid.dataset[0]
        assert difference(sent(x), learn.dls.valid.after_item(x)) is None


def test_training_is_not_touched(folder):
    losses = []
    for cbs in ([], [FreezeTransforms("valid")]):
        seeded(5)
        learn = cases.raw(folder, after_batch=[Flip(), Brightness(max_lighting=0.5)])
        seen = []
        class Watch(Callback):
            def after_batch(self): seen.append((self.training, self.loss.item()))  # noqa: B023
        seeded(6)
        with learn.no_bar(): learn.fit(1, 1e-2, cbs=[Watch(), *cbs])
        losses.append(seen)
    train = [[l for training, l in s if training] for s in losses]
    assert train[0] == train[1] and len(train[0]) == 2
    assert [l for t, l in losses[0] if not t] != [l for t, l in losses[1] if not t]


def test_callback_for_every_validation_and_prediction(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    learn.add_cb(FreezeTransforms("seed"))
    dl = learn.dls.valid
    assert difference(preds(learn, 1), preds(learn, 2)) is None
    assert learn.freeze_transforms.frozen_rows[0]["transform"] == "torch_noise"
    file = dl.items[0]
    assert difference(learn.predict(file)[2], learn.predict(file)[2]) is None
    assert learn.validate() == learn.validate()
    assert learn.dls.valid is dl and not any(isinstance(f, FrozenTransform) for f in dl.after_batch.fs)
    learn.remove_cb(FreezeTransforms)
    assert difference(preds(learn, 1), preds(learn, 2)) is not None


def test_training_rows_are_frozen_for_prediction_too(folder):
    learn = cases.images(folder, batch=aug_transforms())
    with frozen(learn): assert difference(preds(learn, 1, ds_idx=0), preds(learn, 2, ds_idx=0)) is None
    assert difference(preds(learn, 1, ds_idx=0), preds(learn, 2, ds_idx=0)) is not None


def test_tta_is_the_users_choice(folder):
    learn = cases.images(folder, batch=aug_transforms(size=32))
    def tta(seed):
        seeded(seed)
        with learn.no_bar(): return learn.tta(n=2)[0]
    wanted = tta(1)
    assert difference(wanted, tta(2)) is not None
    learn.add_cb(FreezeTransforms())
    assert difference(wanted, tta(1)) is None
    learn.remove_cb(FreezeTransforms)
    with frozen(learn): assert difference(wanted, tta(1)) is None


# ---- a fresh process

def predicted_afresh(folder):
    "{name: predictions under two seeds} of the learners in `folder`, by a fresh process"
    code = f"""
from pathlib import Path
import random, numpy as np, torch
from fastai.learner import load_learner
import fastai.callback.progress
res = {{}}
for f in Path({str(folder)!r}).glob('*.pkl'):
    learn, out = load_learner(f), []
    items = torch.load(f.with_suffix('.items'), weights_only=False)
    for seed in (7, 8):
        random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
        with learn.no_bar(): out.append(learn.get_preds(dl=learn.dls.test_dl(items, num_workers=0))[0].tolist())
    res[f.stem] = out
answer(res)"""
    return fresh(code, path=[Path(__file__).parent])


def test_frozen_survives_export_and_a_fresh_process(learner_of, folder, tmp_path, monkeypatch):
    wanted, tried = {}, {}
    for case in cases.MISTAKES:
        policy = next((p for p in ("seed", "skip", "auto") if getattr(case, p) not in ("raises", "in order")), None)
        if policy is None: continue
        learn = learner_of(case)
        monkeypatch.setattr(learn, "dls", apply_freeze(learn, policy)[0])
        items = cases.items_of(learn, folder)
        wanted[case.name] = preds(learn, 1, dl=learn.dls.test_dl(items, num_workers=0)).tolist()
        torch.save(items, tmp_path / f"{case.name}.items")
        learn.export(tmp_path / f"{case.name}.pkl")
        tried[case.name] = policy
    assert len(wanted) >= 25
    got = predicted_afresh(tmp_path)
    assert got.keys() == wanted.keys()
    wrong = {n: tried[n] for n in wanted for p in got[n] if difference(torch.tensor(p),
                                                                       torch.tensor(wanted[n])) is not None}
    assert not wrong


def test_callback_survives_export(folder, tmp_path):
    learn = cases.images(folder, batch=[cases.torch_noise])
    learn.add_cb(FreezeTransforms("seed"))
    files = get_image_files(folder).sorted()[:3]
    wanted = preds(learn, 1, dl=learn.dls.test_dl(files))
    learn.export(tmp_path / "with.pkl")
    again = load_learner(tmp_path / "with.pkl")
    assert difference(wanted, preds(again, 2, dl=again.dls.test_dl(files))) is None


# ---- every guard fires

def test_unknown_policy():
    with pytest.raises(ConfigError, match="Did you mean|valid"): FreezeTransforms("vaild")
    with pytest.raises(ConfigError, match="auto, valid, skip, seed, raise"): apply_freeze(None, "off")


def test_error_in_a_prediction_leaves_the_learner_as_it_was(folder):
    learn = cases.images(folder, batch=[cases.torch_noise])
    before = everything(learn)
    with pytest.raises(RandomTransformError): learn.get_preds(cbs=FreezeTransforms())
    after = everything(learn)
    for k in before.keys() - {"random"}: assert difference(before[k], after[k]) is None, k  # stock get_preds draws
    with pytest.raises(ZeroDivisionError):
        with frozen(learn, "skip"): 1 / 0  # noqa: B018
    assert before["objects"] == everything(learn)["objects"]


def test_rows_that_cannot_be_cut_apart():
    held = FrozenTransform(Transform(lambda x: x), "seed", rows=True)
    with pytest.raises(RandomTransformError, match="row by row"): held((torch.rand(2, 3), "no tensor"))
    with pytest.raises(RandomTransformError, match="row by row"): held((torch.rand(2, 3), torch.rand(3)))
    def grows(x:torch.Tensor): return torch.rand(1, int(x.sum()))
    with pytest.raises(RandomTransformError, match="different sizes"): FrozenTransform(Transform(grows), "seed",
                                                                                       rows=True)(torch.tensor([[3.], [5.]]))


def test_torchs_own_loader_is_refused(folder):
    ds = [(torch.rand(3, 32, 32), i % 4) for i in range(8)]
    def collate(b): return torch.stack([x for x, _ in b]) + torch.rand(1), torch.tensor([y for _, y in b])
    loaders = [torch.utils.data.DataLoader(ds, batch_size=4, collate_fn=collate) for _ in range(2)]
    learn = cases.cnn(DataLoaders(*loaders), folder)
    assert [f.step.where for f in find_random(learn).random] == ["collate_fn"]
    with pytest.raises(RandomTransformError, match="collate_fn"):
        with frozen(learn, "seed"): pass


# ---- forced draws

@pytest.mark.parametrize("kind", FORCED)
def test_forced_draws_are_extreme(kind):
    low = kind.endswith("low")
    with sources_kept() as sources:
        for s in sources: s.start(kind, 4)
        first = [random.random(), np.random.rand(), torch.rand(1).item()]
        later = [random.random(), np.random.rand(), torch.rand(2)[1].item()]
    if not kind.startswith("some"): assert all(d < 1e-6 if low else d > 1-1e-6 for d in first)
    if kind in ("low", "high"): assert all(d < 1e-6 if low else d > 1-1e-6 for d in later)


def test_loops_that_reject_draws_end():
    with sources_kept() as sources:
        for kind in FORCED:
            for s in sources: s.start(kind, 4)
            random.randrange(1000), random.gauss(0, 1), random.sample(range(99),
                                                                      5), np.random.normal(size=9), np.random.randint(0, 999, 9)
            torch.randn(9), torch.randperm(9), torch.multinomial(torch.ones(9), 3)
