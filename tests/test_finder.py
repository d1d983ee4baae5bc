import math
import re
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import Interrupt, fit, make_folder
from fastai.vision.all import SGD, Adam, Callback, OptimWrapper, ranger
from lab.finder import basin
from lab.learner import RobustLearner, TorchOptimizer, fused_adam

from lab import finder
from lab.errors import InputError, RunError
from predict import get_empty_dls
from train_fastai import find_lrs, get_dls, get_learner


def test_an_interrupted_finder_leaves_the_weights_as_they_were(dls, tmp_path, monkeypatch):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), 1)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    momentum = learn.opt.opt.state[learn.model.fc.weight]['exp_avg'].clone()
    monkeypatch.setattr(finder, 'LARGE_BATCH', 4)
    with learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): find_lrs(learn)
    assert learn.dls.bs == 8
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert torch.equal(learn.opt.opt.state[learn.model.fc.weight]['exp_avg'], momentum)
    assert list(tmp_path.iterdir()) == []


def test_the_basin_is_the_middle_of_the_lowest_rates():
    lrs = torch.logspace(-7, 1, 81)
    losses = torch.full((81,), 2.)
    losses[30:60] = 1.5
    losses[40:51] = torch.linspace(1.09, 1., 11)  # from 1e-3 to 1e-2, within a tenth of the descent
    rate, (middle, loss) = basin(lrs, losses, 100)
    assert middle == pytest.approx(10**-2.5, rel=1e-3)
    assert rate == pytest.approx(0.4 * middle)
    assert 1 < loss < 1.09


def finding(rates):
    """An `lr_find` that gives these `rates`."""
    def lr_find(self, **_):
        self.recorder.lrs, self.recorder.losses = [1.], [torch.ones(())]
        return rates
    return lr_find


@pytest.mark.parametrize(('found', 'lr_min'), [((1e-4, 5e-3), 1e-4), ((1e-3, 2e-3), 2e-4), ((1e-2, 1e-3), 1e-4)])
def test_lrmax_is_at_least_ten_times_lrmin(dls, tmp_path, monkeypatch, found, lr_min):
    monkeypatch.setattr(RobustLearner, 'lr_find', finding(found))
    assert find_lrs(get_learner(dls, path=tmp_path)) == (pytest.approx(lr_min), found[1])


@pytest.mark.parametrize(('bs', 'batches', 'finders'), [(31, 25, 7), (32, 25, 1), (8, 24, 1)])
def test_of_several_finders_for_small_batches_the_median_is_taken(dls, tmp_path, monkeypatch, bs, batches, finders):
    learn, seen = get_learner(dls, precision='fp32', path=tmp_path, seed=5), []

    def lr_find(self, **kwargs):
        seen.append(self.seed_epochs.seed)
        self.recorder.lrs, self.recorder.losses = [len(seen)], []
        return 1e-6, (3e-3, 7e-3, 1e-3, 2e-3, 6e-3, 5e-3, 4e-3)[len(seen) - 1]
    monkeypatch.setattr(RobustLearner, 'lr_find', lr_find)
    monkeypatch.setattr(learn, 'dls', SimpleNamespace(bs=bs, train=range(batches)))
    lrs = find_lrs(learn)
    assert seen == [5 + 1000 * i for i in range(finders)]
    assert lrs == (1e-6, 4e-3 if finders > 1 else 3e-3)
    assert learn.recorder.lrs == [finders], 'the curve is not that of the rates'
    assert learn.seed_epochs.seed == 5
    if finders == 1: return
    seen.clear()
    def some_fail(self, **kwargs):
        lrs = lr_find(self)
        if len(seen) in (1, 7): raise IndexError('index -1 is out of bounds')
        return lrs if len(seen) > 3 else (1e-6, math.inf)
    monkeypatch.setattr(RobustLearner, 'lr_find', some_fail)
    assert find_lrs(learn) == (1e-6, 5e-3)  # of 2, 5 and 6


def test_each_finder_has_other_weights_and_batches(tmp_path):
    learn = get_learner(get_dls(make_folder(tmp_path/'d', train=34), bs=4), precision='fp32', path=tmp_path)
    assert len(learn.dls.train) == 25  # the fewest for which there are several finders
    images, weights = [], []
    class See(Callback):
        def after_batch(self):
            if self.train_iter == 1: images.append(self.x.sum().item())
        def before_fit(self): weights.append(self.model.fc.weight.sum().item())
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.added_cbs(See()): lr_min, lr_max = find_lrs(learn, show_plot=True)
    assert len(set(images)) == len(images) == 7
    assert len(set(weights)) == len(weights) == 7
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert weights[1] == get_learner(learn.dls, precision='fp32', seed=1042).model.fc.weight.sum().item()
    assert 1e-7 < lr_min <= lr_max / 10 < 1
    curve, *marks = plt.gca().lines
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([lr_min, lr_max], rel=0.2)  # on the curve
    assert list(curve.get_xdata()) == learn.recorder.lrs[:-5]


@pytest.mark.parametrize('num_workers', [None, 0])
def test_of_large_batches_the_finder_sees_a_part(folder, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(finder, 'LARGE_BATCH', 4)
    sizes, found, curves = [], [], []
    class See(Callback):
        def before_batch(self): sizes.append(len(self.x))
    for bs in (4, 8):
        learn = get_learner(get_dls(folder, bs=bs, num_workers=num_workers), precision='fp32', path=tmp_path)
        with learn.added_cbs(See()): found.append(find_lrs(learn, show_plot=True))
        curves.append(learn.recorder.lrs)
        assert {*sizes} == {4}
        assert learn.dls.bs == learn.dls.one_batch()[0].shape[0] == bs, 'afterwards'
        assert found[-1][0] <= found[-1][1] / 10
        marks = [mark.get_xdata()[0] for mark in plt.gca().lines[1:]]
        assert marks == pytest.approx(found[-1], rel=0.2), 'on the curve'
    assert found[1] == pytest.approx([2**0.5 * lr for lr in found[0]])
    assert curves[1] == pytest.approx([2**0.5 * lr for lr in curves[0]])


@pytest.mark.parametrize(('opt_func', 'adam'), [
    (fused_adam, True), (partial(fused_adam, eps=1e-8), True), (Adam, True), (SGD, False), (ranger, False),
    (partial(TorchOptimizer, opt=torch.optim.AdamW), True), (partial(OptimWrapper, opt=torch.optim.Adam), True),
    (partial(TorchOptimizer, opt=torch.optim.SGD), False)])
def test_only_adams_rates_go_with_the_root_of_the_batch_size(dls, tmp_path, monkeypatch, opt_func, adam):
    monkeypatch.setattr(finder, 'LARGE_BATCH', 2)
    seen = []
    def lr_find(self, **kwargs):
        seen.append(self.dls.bs)
        return finding((1e-4, 5e-3))(self)
    monkeypatch.setattr(RobustLearner, 'lr_find', lr_find)
    lrs = find_lrs(get_learner(dls, opt_func=opt_func, path=tmp_path))
    assert (seen, lrs) == (([2], pytest.approx((2e-4, 1e-2))) if adam else ([8], (1e-4, 5e-3)))


@pytest.mark.parametrize('bs', [4, 8, 24])
def test_the_finder_finds_usable_rates_for_batches_of_any_size(folder, tmp_path, bs):
    learn = get_learner(get_dls(folder, bs=bs), precision='fp32', path=tmp_path)
    lr_min, lr_max = find_lrs(learn)
    assert 1e-7 < lr_min <= lr_max / 10 < 1
    assert list(tmp_path.iterdir()) == []


def test_a_learner_without_images_says_so(tmp_path):
    learn = get_learner(get_empty_dls(['cat', 'dog']), path=tmp_path)
    with pytest.raises(InputError, match='^this learner has no images'): find_lrs(learn)


@pytest.mark.parametrize('found', [(math.nan, 1e-3), (1e-4, math.nan), (0., 1e-3), (1e-4, math.inf)])
def test_a_finder_without_a_usable_answer(dls, tmp_path, monkeypatch, found):
    monkeypatch.setattr(RobustLearner, 'lr_find', finding(found))
    with pytest.raises(RunError, match='set --lr-min and --lr-max'): find_lrs(get_learner(dls, path=tmp_path))


def test_a_finder_whose_loss_is_no_number_says_from_which_batch_on(dls, tmp_path):
    class Spoil(Callback):
        def before_batch(self):
            if self.train_iter >= 3: self.learn.xb = (self.x * float('nan'),)
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    message = 'the LR finder failed (the loss was not finite from batch 4 on); set --lr-min and --lr-max'
    with learn.added_cbs(Spoil()), pytest.raises(RunError, match=f'^{re.escape(message)}$'): find_lrs(learn)
