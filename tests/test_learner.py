import math
import sys
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import fit, make_folder
from fastai.vision.all import (
    Adam,
    Callback,
    EarlyStoppingCallback,
    F,
    Learner,
    MixedPrecision,
    SaveModelCallback,
    Tensor,
    set_seed,
)
from torch import nn

import learner
from arch import ResNet
from data import get_dls
from errors import InputError, RunError
from learner import (
    CrossEntropy,
    SideBySideConv2d,
    basin,
    best_precision,
    checked_precision,
    find_lrs,
    get_learner,
    weight_decay_groups,
)


def test_fused_adamw_steps_like_fastais_adam(dls):
    xs, ys = [], []
    for x, y in dls.train:
        xs.append(x.as_subclass(Tensor).double())  # in float32 roundings would grow
        ys.append(y.as_subclass(Tensor))
    nets = []
    for fused in (True, False):
        adam = get_learner(dls, precision='fp32').opt_func if fused else partial(Adam, wd=0.01, sqr_mom=0.99, eps=1e-5)
        set_seed(0)
        groups = {'splitter': partial(weight_decay_groups, wd=0.01)} if fused else {}
        learn = Learner(dls, ResNet(n_out=3, width=16).double(), opt_func=adam, **groups)
        learn.create_opt()
        for i in range(6):
            learn.opt.set_hypers(lr=1e-3, mom=0.95 - 0.01 * i)
            F.cross_entropy(learn.model(xs[i % 3]), ys[i % 3]).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        nets.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    set_seed(0)
    start = torch.cat([p.detach().flatten() for p in ResNet(n_out=3, width=16).double().parameters()])
    assert (nets[0] - nets[1]).norm() < 1e-9 * (nets[0] - start).norm()


def test_weight_decay_spares_batch_norm_and_biases():
    decayed, plain = weight_decay_groups(net := ResNet(), 0.2)
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.2, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {names[id(p)] for p in decayed['params']} == weights
    assert len(decayed['params']) + len(plain['params']) == len(names)


def test_fastais_own_callbacks_and_views_find_what_they_look_for(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path, width=64)
    learn.fit(1, cbs=[SaveModelCallback(), EarlyStoppingCallback(monitor='valid_accuracy')])
    assert (tmp_path/'models/model.pth').exists()
    learn.recorder.plot_loss()
    assert '6,569,539' in learn.summary()


def test_label_smoothing_applies_to_training_alone():
    x, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = CrossEntropy(label_smoothing=0.2)
    smoothed = torch.full((6, 4), 0.2 / 4).scatter_add(1, y[:, None], torch.full((6, 1), 0.8))
    torch.testing.assert_close(loss(x, y).as_subclass(Tensor), -(smoothed * x.log_softmax(1)).sum(1).mean())
    with torch.no_grad(): torch.testing.assert_close(loss(x, y).as_subclass(Tensor), F.cross_entropy(x, y))


class Interrupt(Callback):
    """Interrupts in the third training batch, between forward pass and loss."""
    order = MixedPrecision.order - 1

    def after_pred(self):
        if self.training and self.train_iter == 2: raise KeyboardInterrupt


def test_an_interruption_leaves_no_autocast_behind(dls, tmp_path):
    """Its cache of cast weights would be what later learners train on, whatever becomes of theirs."""
    learn = get_learner(dls, precision='bf16', path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Interrupt())
    assert not torch.is_autocast_enabled('cpu')
    class Break(Callback):
        def before_batch(self): self.learn.xb = (self.x[:, :1],)  # a forward pass that fails
    with learn.added_cbs(Break()), pytest.raises(RuntimeError): learn.get_preds()
    assert not torch.is_autocast_enabled('cpu')
    fit(learn)
    assert len(learn.history.rows) == 2


def test_an_interruption_loads_no_earlier_model(dls, tmp_path):
    earlier = fit(get_learner(dls, precision='fp32', path=tmp_path), 1, cbs=SaveModelCallback())
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[SaveModelCallback(), Interrupt()])
    assert not torch.equal(learn.model.fc.weight, earlier.model.fc.weight)


def test_a_metrics_sum_stays_where_it_is_and_predictions_come_to_the_cpu(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    learn.metrics = [lambda pred, targ: np.float64(0.5)]  # as scikit-learn's are
    assert learn.validate()[-1] == 0.5
    assert learn.to_detach(torch.ones((), device='meta')).is_meta
    with pytest.raises(NotImplementedError): learn.to_detach(torch.ones(2, device='meta'))  # which has no data to move


def test_to_bf16_takes_the_place_of_what_is_there(dls, tmp_path):
    learn = get_learner(dls, precision='bf16', path=tmp_path).to_bf16()
    assert len([cb for cb in learn.cbs if isinstance(cb, MixedPrecision)]) == 1
    assert not any(isinstance(cb, MixedPrecision) for cb in learn.to_fp32().cbs)
