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


@pytest.mark.skipif(sys.platform != 'linux', reason='a matter of glibc')
def test_on_a_cpu_the_process_keeps_what_tensors_free(folder):
    import resource  # which Windows lacks
    get_learner(get_dls(folder, bs=8, device=torch.device('cpu')), precision='fp32')

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Small things settle beside the first few places and make them too small; memory that was returned is never reused.
    assert any(faults() < 1000 for _ in range(25))


def test_weight_decay_spares_batch_norm_and_biases():
    decayed, plain = weight_decay_groups(net := ResNet(), 0.2)
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.2, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {names[id(p)] for p in decayed['params']} == weights
    assert len(decayed['params']) + len(plain['params']) == len(names)


def test_bfloat16_on_a_cpu_computes_in_bfloat16_and_follows_float32(dls, tmp_path):
    losses, dtypes = [], []
    for precision in ('fp32', 'bf16'):
        learn = get_learner(dls, precision=precision, path=tmp_path)
        hook = learn.model.prep[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        fit(learn, 1)
        hook.remove()
        losses.append(torch.tensor([float(o) for o in learn.recorder.losses]))
        assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert dtypes[0] == torch.float32
    assert dtypes[-1] == torch.bfloat16
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(('flags', 'expected'), [({}, 'fp32'), ({'avx512_f': True}, 'fp32'),
                                                 ({'avx512_bf16': True}, 'bf16'), ({'amx_bf16': True}, 'bf16')])
def test_auto_takes_what_a_processor_is_made_for(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)
    assert best_precision(torch.device('cpu')) == expected


@pytest.mark.parametrize(('capability', 'expected'), [((7, 5), 'fp16'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_auto_takes_what_a_gpu_is_made_for(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert best_precision(torch.device('cuda')) == expected


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


def test_the_defaults_are_the_recipes(dls, tmp_path):
    learn = get_learner(dls, path=tmp_path)
    learn.create_opt()
    decayed, plain = learn.opt.opt.param_groups
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0)
    assert {(g['eps'], g['betas']) for g in (decayed, plain)} == {(1e-5, (0.95, 0.99))}
    assert (learn.loss_func.label_smoothing, learn.weight_average.decay) == (0.1, 0.99)


@pytest.mark.parametrize('memory', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(('n', 'h', 'w'), [(5, 4, 4), (1, 8, 8), (3, 7, 5), (2, 1, 1)])
def test_maps_side_by_side_are_convolved_as_ever(n, h, w, memory):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, 3, padding=1, bias=False)
    x = torch.randn(n, 6, h, w).to(memory_format=memory)
    grad, found = torch.randn(n, 10, h, w), []
    for kind in (nn.Conv2d, SideBySideConv2d):
        plain.__class__ = kind
        images = x.clone().requires_grad_()
        out = plain(images)
        found.append((out, *torch.autograd.grad(out, (images, plain.weight), grad)))
    for one, other in zip(*found, strict=True): torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('amx', [False, True])
def test_maps_lie_side_by_side_where_the_processor_has_amx(dls, monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=amx))
    dls.cpu()
    for precision in ('bf16', 'fp32'):
        convs = [m for m in get_learner(dls, precision=precision).model.modules() if isinstance(m, SideBySideConv2d)]
        assert len(convs) == (3 if amx and precision == 'bf16' else 0)


def test_a_processor_that_is_told_to_leave_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=True))
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    assert best_precision(torch.device('cpu')) == 'fp32'


def test_a_precision_that_does_not_exist():
    with pytest.raises(InputError, match='--precision int8 is not one of auto, fp32'):
        checked_precision('int8', torch.device('cpu'))
    with pytest.raises(InputError, match='--precision fp16 needs a CUDA GPU'):
        checked_precision('fp16', torch.device('cpu'))


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


def test_an_interrupted_finder_leaves_the_weights_as_they_were(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path), 1)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    momentum = learn.opt.opt.state[learn.model.fc.weight]['exp_avg'].clone()
    with learn.added_cbs(Interrupt()), pytest.raises(KeyboardInterrupt): find_lrs(learn)
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert torch.equal(learn.opt.opt.state[learn.model.fc.weight]['exp_avg'], momentum)
    assert list(tmp_path.iterdir()) == []


def test_to_bf16_takes_the_place_of_what_is_there(dls, tmp_path):
    learn = get_learner(dls, precision='bf16', path=tmp_path).to_bf16()
    assert len([cb for cb in learn.cbs if isinstance(cb, MixedPrecision)]) == 1
    assert not any(isinstance(cb, MixedPrecision) for cb in learn.to_fp32().cbs)


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
        self.recorder.lrs = self.recorder.losses = [1.]
        return rates
    return lr_find


@pytest.mark.parametrize(('found', 'lr_min'), [((1e-4, 5e-3), 1e-4), ((1e-3, 2e-3), 2e-4), ((1e-2, 1e-3), 1e-4)])
def test_lrmax_is_at_least_ten_times_lrmin(dls, tmp_path, monkeypatch, found, lr_min):
    monkeypatch.setattr(learner.RobustLearner, 'lr_find', finding(found))
    assert find_lrs(get_learner(dls, path=tmp_path)) == (pytest.approx(lr_min), found[1])


@pytest.mark.parametrize(('bs', 'batches', 'finders'), [(31, 25, 7), (32, 25, 1), (8, 24, 1)])
def test_of_several_finders_for_small_batches_the_median_is_taken(dls, tmp_path, monkeypatch, bs, batches, finders):
    learn, seen = get_learner(dls, precision='fp32', path=tmp_path, seed=5), []

    def lr_find(self, **kwargs):
        seen.append(self.seed_epochs.seed)
        self.recorder.lrs, self.recorder.losses = [len(seen)], []
        return 1e-6, (3e-3, 7e-3, 1e-3, 2e-3, 6e-3, 5e-3, 4e-3)[len(seen) - 1]
    monkeypatch.setattr(learner.RobustLearner, 'lr_find', lr_find)
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
    monkeypatch.setattr(learner.RobustLearner, 'lr_find', some_fail)
    assert find_lrs(learn) == (1e-6, 5e-3)  # of 2, 5 and 6


def test_each_finder_has_other_weights_and_batches(tmp_path):
    learn = get_learner(get_dls(make_folder(tmp_path/'d', train=34), bs=4), precision='fp32', path=tmp_path)  # 25 batches
    assert len(learn.dls.train) == 25
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


@pytest.mark.parametrize('bs', [4, 8, 24])
def test_the_finder_finds_usable_rates_for_batches_of_any_size(folder, tmp_path, bs):
    learn = get_learner(get_dls(folder, bs=bs), precision='fp32', path=tmp_path)
    lr_min, lr_max = find_lrs(learn)
    assert 1e-7 < lr_min <= lr_max / 10 < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('found', [(math.nan, 1e-3), (1e-4, math.nan), (0., 1e-3), (1e-4, math.inf)])
def test_a_finder_without_a_usable_answer(dls, tmp_path, monkeypatch, found):
    monkeypatch.setattr(learner.RobustLearner, 'lr_find', finding(found))
    with pytest.raises(RunError, match='set --lr-min and --lr-max'): find_lrs(get_learner(dls, path=tmp_path))
