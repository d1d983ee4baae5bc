import math

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import equal, weights
from fastai.vision.all import SGD, Callback, Learner

from lab.errors import RunError
from lab.optim import FusedAdam
from lab.speed import fast
from train_fastai import basin, find_lrs, get_dls, get_learner


def test_the_basin_is_the_middle_of_the_lowest_rates():
    lrs = torch.logspace(-7, 1, 81)
    losses = torch.full((81,), 2.)
    losses[30:60] = 1.5
    losses[40:51] = torch.linspace(1.09, 1., 11)  # from 1e-3 to 1e-2, within a tenth of the descent
    rate, (middle, loss) = basin(lrs, losses, 100)
    assert middle == pytest.approx(10**-2.5, rel=1e-3)
    assert rate == pytest.approx(0.4 * middle)
    assert 1 < loss < 1.09


@pytest.mark.parametrize(('found', 'lr_min'), [((1e-4, 5e-3), 1e-4), ((1e-3, 2e-3), 2e-4), ((1e-2, 1e-3), 1e-4)])
def test_lrmax_is_at_least_ten_times_lrmin(dls, tmp_path, monkeypatch, found, lr_min):
    monkeypatch.setattr(Learner, 'lr_find', lambda *_, **__: found)
    assert find_lrs(get_learner(dls, path=tmp_path)) == (pytest.approx(lr_min), found[1])


@pytest.mark.parametrize(('bs', 'opt_func'), [(4, FusedAdam), (24, SGD)])
def test_usable_rates_for_batches_of_any_size(folder, tmp_path, bs, opt_func):
    """Of the real batches, by stock `lr_find`, which leaves the learner as it was; the same for a seed."""
    sizes, found = [], []
    class See(Callback):
        def before_batch(self): sizes.append(len(self.x))
    for _ in range(2 if bs == 4 else 1):
        learn = get_learner(get_dls(folder, bs=bs), opt_func=opt_func, precision='fp32', path=tmp_path)
        before = weights(learn)
        torch.rand(3)
        with fast(learn), learn.added_cbs(See()): found.append(find_lrs(learn, show_plot=True))
    lr_min, lr_max = found[0]
    assert 1e-7 < lr_min <= lr_max / 10 < 1
    assert found[-1] == found[0]
    assert {*sizes} == {bs}
    assert equal(weights(learn), before)
    assert not [f for f in tmp_path.rglob('*') if f.is_file()]
    assert len(plt.gca().lines) == 3, 'the curve and the two suggestions'
    assert learn.history.rows == learn.history.schedule == []


@pytest.mark.parametrize('found', [(1e-4, math.nan), (0., 1e-3), (1e-4, math.inf)])
def test_a_finder_without_a_usable_answer(dls, tmp_path, monkeypatch, found):
    monkeypatch.setattr(Learner, 'lr_find', lambda *_, **__: found)
    with pytest.raises(RunError, match='^the LR finder found no usable rates; set --lr-min and --lr-max$'):
        find_lrs(get_learner(dls, path=tmp_path))


def test_a_finder_whose_loss_is_no_number(dls, tmp_path):
    class Spoil(Callback):
        def before_batch(self):
            if self.train_iter >= first: self.learn.xb = (self.x * math.nan,)
    learn, first = get_learner(dls, precision='fp32', path=tmp_path), 3
    with fast(learn), learn.added_cbs(Spoil()):
        with pytest.raises(RunError, match='^the LR finder found no usable rates'): find_lrs(learn)
        first = 70  # as where it diverges
        lr_min, lr_max = find_lrs(learn)
    assert 1e-7 < lr_min <= lr_max / 10 < 1
