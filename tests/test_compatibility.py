"""Our parts in stock learners, and fastai's on ours: lines of fastai's own tests, of public scripts and bug reports."""
import contextlib
import pickle
from copy import deepcopy
from functools import partial

import fastai.callback.channelslast  # noqa: F401, gives `Learner` its to_channelslast
import numpy as np
import pytest
import torch
from fastai.vision import all as fv
from fastai.vision.all import L, Learner, nn

from callbacks import History, Misclassified, SeedEpochs, WeightAverage
from lab.optim import CrossEntropy, FusedAdam
from lab.runs import checksum
from lab.speed import fast
from train_fastai import find_lrs, get_dls, get_learner


def fit_without_recorder(learn):
    with learn.removed_cbs([learn.recorder, learn.progress]): learn.fit(1)
    learn.fit(1)
    assert len(learn.recorder.values) == 1


def give_batches_by_hand(learn):
    learn.create_opt()
    learn.n_epoch, learn.epoch, learn.n_iter = 1, 0, 4
    with learn:
        learn.training = True
        for i, b in enumerate(learn.dls.train): learn.one_batch(i, b)
    learn.fit(2)


def validate_between(learn):
    for f in 2 * (learn.validate, partial(learn.fit, 1), partial(learn.get_preds, ds_idx=0)): f()


FIT = partial(Learner.fit, n_epoch=2)
# What fastai's own tests do to a learner, and what must be true afterwards
STOCK = dict(
    recorder=(dict(cbs=[fv.TrainEvalCallback, fv.Recorder(beta=0.5)], default_cbs=False), FIT,
              lambda learn: learn.recorder.smooth_loss.beta == 0.5),
    removed_cbs=(dict(), fit_without_recorder, lambda learn: learn.progress in learn.cbs),
    batches_by_hand=(dict(cbs=fv.TrainEvalCallback, default_cbs=False), give_batches_by_hand, lambda learn: learn.opt),
    torch_loss=(dict(loss_func=nn.CrossEntropyLoss()), FIT, lambda learn: learn.validate()[0] > 0),
    validate=(dict(), validate_between, lambda learn: learn.validate()[1] == learn.history.rows[-1]['test_accuracy']))


@pytest.mark.parametrize('within', [fast, contextlib.nullcontext])
@pytest.mark.parametrize('habit', STOCK)
def test_a_stock_learner_takes_our_parts(tmp_path, within, habit):
    kwargs, do, holds = STOCK[habit]
    fv.set_seed(0)
    dl = fv.TfmdDL(L(zip(torch.randn(64, 4), torch.arange(64) % 3, strict=True)), bs=16, num_workers=0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    ours = [SeedEpochs(1), History(), Misclassified(), WeightAverage(0.9)]
    learn = Learner(fv.DataLoaders(dl, dl, device='cpu'), model, path=tmp_path, **dict(
        loss_func=CrossEntropy(label_smoothing=0.1), opt_func=FusedAdam, metrics=fv.accuracy) | kwargs
        | dict(cbs=[*ours, *L(kwargs.get('cbs'))]))
    with within(learn): do(learn)
    assert holds(learn)
    assert [row['epoch'] for row in learn.history.rows] == [1, 2]
    assert all(0 < row['train_loss'] < 2 and 0 <= row['test_accuracy'] <= 1 for row in learn.history.rows)
    assert len(learn.history.schedule) == 8
    assert learn.misclassified.log_probs.shape == (64, 3)
    assert learn.history.checksums[1] == checksum(learn.model), 'not the averages that were tested'


def test_loaders_and_targets_of_other_kinds(dls, tmp_path):
    x, y = torch.cat([torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32) - 1]), torch.arange(2).repeat_interleave(8)
    data = torch.utils.data.TensorDataset(x, y)
    plain = fv.DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=4, shuffle=s) for s in (True, False)))
    learn = get_learner(plain, nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), path=tmp_path)
    with fast(learn): learn.fit(3, 1e-2)
    assert learn.history.rows[-1]['test_accuracy'] > 0.9
    assert 0 < find_lrs(learn)[0] < 10
    numbers = fv.TfmdDL(L(zip(x[:, 0, 0, :1], x[:, 0, 0, 1:2], strict=True)), bs=4, num_workers=0)
    regression = Learner(fv.DataLoaders(numbers, numbers, device='cpu'), nn.Linear(1, 1), loss_func=fv.MSELossFlat(),
                         opt_func=FusedAdam, cbs=[History(), WeightAverage(0.9)], path=tmp_path)
    regression.fit(1)
    assert regression.history.rows[0]['test_loss'] == pytest.approx(regression.validate()[0])


def copied(learn):
    learn.fit(1, 1e-3)
    other = pickle.loads(pickle.dumps(learn))
    other.fit(1, 1e-3)
    return other.get_preds()


def exported(learn):
    learn.fit(1, 1e-3)
    learn.export()
    with pytest.warns(UserWarning, match='insecure pickle'): loaded = fv.load_learner(learn.path/'export.pkl')
    found = loaded.predict(file := learn.dls.valid_ds.items[0])
    torch.testing.assert_close(found[2], learn.predict(file)[2])
    return found


def fit_with(cb, *args, epochs=2, find=lambda cb: None, **kwargs):
    def do(learn):
        learn.fit(epochs, 1e-3, cbs=(made := cb(*args, **kwargs)))
        return find(made)
    return do


HABITS = dict(
    mixup=fit_with(fv.MixUp), accumulation=fit_with(fv.GradientAccumulation, n_acc=16),
    clip=fit_with(fv.GradientClip, 0.1),
    stats=fit_with(fv.ActivationStats, find=lambda cb: np.array([[o['mean'], o['std']] for o in cb.stats[0]])),
    lr_find=lambda learn: learn.lr_find(end_lr=1e-3, num_it=12, show_plot=False) and [
        float(o) for o in learn.recorder.losses],
    predict=lambda learn: learn.predict(learn.dls.valid_ds.items[0], with_input=True), export=exported, copied=copied)


def assert_close(one, other):
    """Checks that two results are equal, numbers to a hundredth: fv.Adam's first steps magnify roundings."""
    if isinstance(one, list | tuple | L):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True): assert_close(a, b)
    elif isinstance(one, str | None): assert one == other
    else: np.testing.assert_allclose(*(np.asarray(o, float) for o in (one, other)), rtol=1e-2, atol=2e-3)


@pytest.mark.filterwarnings('ignore:.*You are shadowing an attribute')  # ActivationStats
@pytest.mark.parametrize('habit', HABITS)
def test_fastais_callbacks_do_in_fast_what_they_do_in_stock(folder, tmp_path, habit):
    """Beside a stock learner of the same network, optimizer settings, memory layout and random draws."""
    ours_dls, stock_dls = (get_dls(folder, bs=8, device='cpu') for _ in range(2))
    ours = get_learner(ours_dls, path=tmp_path, wd=0.01, label_smoothing=0, ema=0, precision='fp32')
    assert type(ours) is Learner
    stock = Learner(stock_dls, deepcopy(ours.model).to(memory_format=torch.channels_last), fv.CrossEntropyLossFlat(),
                    wd=0.01, metrics=fv.accuracy, opt_func=partial(fv.Adam, mom=0.95, sqr_mom=0.99, eps=1e-5),
                    cbs=SeedEpochs(42), path=tmp_path)  # with the randomness of ours
    start, results = {k: v.clone() for k, v in ours.model.state_dict().items()}, []
    for learn, within in ((ours, fast), (stock, contextlib.nullcontext)):
        fv.set_seed(0)
        with within(learn): results.append((HABITS[habit](learn), getattr(learn.recorder, 'values', [])))
    assert_close(*results)
    moves = [torch.cat([(learn.model.state_dict()[k] - v).flatten().float() for k, v in start.items()])
             for learn in (ours, stock)]
    assert (moves[0] - moves[1]).norm() <= 1e-2 * moves[1].norm()


def test_fastai_finds_the_precision_by_its_name(dls, tmp_path):
    learn = get_learner(dls, precision='bf16', path=tmp_path)
    learn.to_channelslast()
    assert [cb for cb in learn.cbs if isinstance(cb, fv.MixedPrecision)] == [learn.mixed_precision]
    learn.to_contiguous()
    learn.export()
    with pytest.warns(UserWarning, match='insecure pickle'): loaded = fv.load_learner(tmp_path/'export.pkl', cpu=True)
    assert not hasattr(loaded, 'mixed_precision')
