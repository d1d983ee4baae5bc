import random
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Interrupt, fit
from fastai.vision.all import (
    SGD,
    Adam,
    Callback,
    EarlyStoppingCallback,
    F,
    L,
    Lamb,
    Learner,
    MixedPrecision,
    OptimWrapper,
    ProgressCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    Tensor,
    params,
    ranger,
    set_seed,
)
from lab.learner import CrossEntropy, Progress, TorchOptimizer, fused_adam

from arch import ResNet
from callbacks import History, SeedEpochs
from train_fastai import get_learner


def test_fused_adamw_steps_like_fastais_adam(dls):
    xs, ys = [], []
    for x, y in dls.train:
        xs.append(x.as_subclass(Tensor).double())  # in float32 roundings would grow
        ys.append(y.as_subclass(Tensor))
    nets = []
    for fused in (True, False):
        set_seed(0)
        net = ResNet(n_out=3, width=16).double()
        learn = get_learner(dls, net) if fused else Learner(dls, net, opt_func=partial(Adam, sqr_mom=0.99, eps=1e-5))
        learn.create_opt()
        learn.opt.set_hypers(wd=0.01)
        for i in range(6):
            learn.opt.set_hypers(lr=1e-3, mom=0.95 - 0.01 * i)
            F.cross_entropy(learn.model(xs[i % 3]), ys[i % 3]).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        nets.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    set_seed(0)
    start = torch.cat([p.detach().flatten() for p in ResNet(n_out=3, width=16).double().parameters()])
    assert (nets[0] - nets[1]).norm() < 1e-9 * (nets[0] - start).norm()


def test_weight_decay_spares_batch_norm_and_biases(dls, tmp_path):
    learn = get_learner(dls, net := ResNet(width=64), wd=0.2, precision='fp32', path=tmp_path)
    learn.fit(0)
    decayed, plain = learn.opt.opt.param_groups
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.2, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    weights = {f'{n}.weight' for n, m in net.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert {names[id(p)] for p in decayed['params']} == weights
    assert len(decayed['params']) + len(plain['params']) == len(names)


def test_fastais_own_callbacks_and_views_find_what_they_look_for(dls, tmp_path):
    learn = get_learner(dls, ResNet(3, 3, width=64), precision='fp32', path=tmp_path)
    learn.fit(1, cbs=[SaveModelCallback(monitor='accuracy'), EarlyStoppingCallback(monitor='accuracy')])
    assert (tmp_path/'models/model.pth').exists()
    learn.recorder.plot_loss()
    assert '6,569,539' in learn.summary()


def test_label_smoothing_applies_to_training_alone():
    x, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = CrossEntropy(label_smoothing=0.2)
    smoothed = torch.full((6, 4), 0.2 / 4).scatter_add(1, y[:, None], torch.full((6, 1), 0.8))
    torch.testing.assert_close(loss(x, y).as_subclass(Tensor), -(smoothed * x.log_softmax(1)).sum(1).mean())
    with torch.no_grad(): torch.testing.assert_close(loss(x, y).as_subclass(Tensor), F.cross_entropy(x, y))


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


def stock_splitter(model: ResNet) -> L:
    """Three groups of layers, as for fine-tuning."""
    return L([*params(model.prep), *params(model.layer1)], [*params(model.layer2), *params(model.layer3)],
             params(model.fc))


STOCK_ADAM = partial(Adam, mom=0.95, sqr_mom=0.99, eps=1e-5)
TORCH_SGD = partial(TorchOptimizer, opt=torch.optim.SGD, momentum=0.9)
# Ours and stock fastai's: our default, the optimizers of fastai, and one of torch beside fastai's with the same formula
OPTIMIZERS = dict(default=(None, STOCK_ADAM), ranger=(ranger, ranger), Adam=(Adam, Adam), SGD=(SGD, SGD),
                  Lamb=(Lamb, Lamb), torch_sgd=(TORCH_SGD, partial(SGD, mom=0.9, decouple_wd=False)))


def beside_stock(dls, tmp_path, optimizer='default', layers=False) -> tuple[Learner, Learner]:
    """Our learner, with an optimizer put in its place, and a stock one of the same network, loss and randomness."""
    ours = get_learner(dls, precision='fp32', ema=0, path=tmp_path)
    model = deepcopy(ours.model).to(memory_format=torch.channels_last)  # as ours in a fit: roundings grow by the step
    stock = Learner(dls, model, loss_func=CrossEntropy(0.1), wd=0.1, opt_func=OPTIMIZERS[optimizer][1],
                    cbs=[SeedEpochs(42), History()], path=tmp_path)
    if OPTIMIZERS[optimizer][0]: ours.opt_func = OPTIMIZERS[optimizer][0]
    if layers: ours.splitter = stock.splitter = stock_splitter
    return ours, stock


def hypers(learn) -> list[dict]:
    """What an optimizer shows of each of its groups."""
    return [{k: float(o[k]) for k in ('lr', 'wd', 'mom', 'sqr_mom', 'eps') if k in o} for o in learn.opt.hypers]


def decayed(learn) -> set[str]:
    """The names of the parameters that a step pulls towards zero: with a tiny rate, no gradient and a huge decay."""
    names = {p: name for name, p in learn.model.named_parameters()}
    before = {p: p.detach().clone() for p in names}
    learn.opt.set_hypers(lr=1e-6, wd=1e5)
    for state in learn.opt.state.values():
        for moment in [v for k, v in state.items() if k in ('grad_avg', 'exp_avg', 'momentum_buffer')]: moment.zero_()
    for p in names: p.grad = torch.zeros_like(p)
    with torch.no_grad():
        for p in names: before[p].copy_(p.fill_(1.))
    learn.opt.step()
    return {name for p, name in names.items() if (p < 0.95).any()}


def same(ours: Learner, stock: Learner):
    """Checks that two learners ended with the same weights, to rounding, and show the same hyper-parameters."""
    assert len(ours.opt.hypers) == len(stock.opt.hypers)
    for one, other in zip(hypers(ours), hypers(stock), strict=True): assert one == pytest.approx(other)
    start = get_learner(ours.dls, precision='fp32').model.state_dict()
    for k, v in stock.model.state_dict().items():
        if not v.is_floating_point(): continue
        moved = (v - start[k]).norm()
        assert (ours.model.state_dict()[k] - v).norm() <= 0.02 * moved + 1e-7, k  # Adam's first steps magnify roundings


ACTIONS = dict(
    fit=lambda learn: learn.fit(2, 1e-3),
    new_wd=lambda learn: learn.fit(2, 1e-3, wd=3.),
    one_cycle=lambda learn: learn.fit_one_cycle(2, 1e-3),
    slice=lambda learn: learn.fit_one_cycle(2, slice(1e-5, 1e-3)),
    frozen=lambda learn: (learn.freeze(), learn.fit(2, 1e-3)),
    frozen_to=lambda learn: (learn.freeze_to(1), learn.fit(2, 1e-3, wd=3.)),
    fine_tune=lambda learn: learn.fine_tune(1, 1e-3),
)


@pytest.mark.parametrize('action', ACTIONS)
def test_what_is_done_to_the_layers_of_a_stock_learner_does_the_same_here(dls, tmp_path, action):
    ours, stock = beside_stock(dls, tmp_path, layers=True)
    trainable = []
    for learn in (ours, stock):
        ACTIONS[action](learn)
        trainable.append({name for name, p in learn.model.named_parameters() if p.requires_grad})
    same(ours, stock)
    assert len(ours.opt.hypers) == 3
    assert trainable[0] == trainable[1]
    assert ('prep.0.weight' in trainable[0]) == (action not in ('frozen', 'frozen_to'))
    assert {'prep.1.weight', 'prep.1.bias'} <= trainable[0], 'batch norm stays trainable'
    assert decayed(ours) == decayed(stock) >= {'fc.weight'}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('action', ['fit', 'new_wd', 'one_cycle'])
def test_another_optimizer_does_what_it_does_in_a_stock_learner(dls, tmp_path, optimizer, action):
    ours, stock = beside_stock(dls, tmp_path, optimizer)
    for learn in (ours, stock): ACTIONS[action](learn)
    same(ours, stock)
    assert len(ours.opt.hypers) == 1
    weights = {name for name, p in ours.model.named_parameters() if p.ndim > 1}
    assert decayed(ours) == decayed(stock) == weights


def test_one_group_is_shown_and_two_lie_below_of_which_one_decays(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', wd=0.2, path=tmp_path)
    learn.fit(1, 1e-3)
    shown, = learn.opt.hypers
    assert (shown['lr'], shown['wd'], shown['mom'], shown['sqr_mom'], shown['eps']) == (1e-3, 0.2, 0.95, 0.99, 1e-5)
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [0.2, 0]
    learn.fit(1, 1e-3, wd=0.3)
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [0.3, 0]
    assert [g['weight_decay'] for g in fit(learn, 1).opt.opt.param_groups] == [0.2, 0]  # the recipe's, again


def test_what_a_callback_writes_into_hypers_reaches_the_optimizer(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    learn.fit(3, 1e-5, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100, patience=1))
    assert learn.opt.hypers[0]['lr'] == pytest.approx(1e-7)  # a tenth after the second epoch, and again
    assert [g['lr'] for g in learn.opt.opt.param_groups] == pytest.approx([1e-7] * 2)
    learn.opt.hypers[0]['mom'] = 0.5
    assert [g['betas'] for g in learn.opt.opt.param_groups] == [(0.5, 0.99)] * 2
    learn.opt.hypers[0]['wd'] = 0.7
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [0.7, 0]


def test_what_is_saved_with_its_optimizer_and_loaded_trains_on_as_if_it_had_not_been(dls, tmp_path):
    """Fused AdamW on a CPU pairs weights and moments by memory: in two layouts it would step wrongly."""
    ends = []
    for saved in (False, True):
        learn = get_learner(dls, precision='fp32', ema=0, path=tmp_path)
        learn.fit(1, 1e-3)
        if saved:
            learn.save('half', with_opt=True)
            learn.load('half', with_opt=True)
        learn.fit(1, 1e-3)
        ends.append({k: v.clone() for k, v in learn.model.state_dict().items()})
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize(('event', 'opt_func'), [
    ('before_fit', partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)), ('before_train', fused_adam)])
def test_what_a_callback_loads_in_a_fit_is_paired_with_its_weights(dls, tmp_path, event, opt_func):
    """A saved optimizer is contiguous, the weights in a fit are not."""
    learners = [get_learner(dls, opt_func=opt_func, precision='fp32', ema=0, path=tmp_path) for _ in range(3)]
    learners[0].fit(1, 1e-3)
    learners[0].save('half', with_opt=True)
    learners[1].load('half', with_opt=True)
    learners[1].fit(1, 1e-3)
    class FromFile(Callback): pass
    setattr(FromFile, event, lambda self: self.learn.load('half', with_opt=True))
    learners[2].fit(1, 1e-3, cbs=FromFile())
    expected, found = (learn.model.state_dict() for learn in learners[1:])
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_weights_and_moments_are_contiguous_outside_of_a_fit_and_in_what_is_saved_during_one(dls, tmp_path):
    class Look(Callback):
        order = 1000
        def after_step(self):
            self.inside = self.model.layer2[0].weight.is_contiguous()
            self.saved = all(v.is_contiguous() for v in self.model.state_dict().values())
    class Fail(Callback):
        def after_train(self): raise ValueError('no more')
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    for trouble in (None, Fail()):
        if trouble is None: fit(learn, 1, cbs=(look := Look()))
        else:
            with pytest.raises(ValueError, match='no more'): fit(learn, 1, cbs=[look := Look(), trouble])
        assert not look.inside, 'channels-last is what makes it fast'
        assert look.saved
        assert all(v.is_contiguous() for v in learn.model.state_dict().values())
        for p, state in learn.opt.opt.state.items():
            assert all(v.is_contiguous() for v in state.values()), 'of a learner whose fit has ended'
            assert state['exp_avg'].stride() == p.stride()


def test_whoever_calls_keeps_random_generators_and_cudnns_setting(dls, tmp_path):
    def draw(): return random.random(), np.random.rand(), torch.rand(()).item()
    def used(learn): fit(learn, 1, cbs=Interrupt())
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        set_seed(3)
        expected = draw()
        set_seed(3)
        learn = get_learner(dls, precision='fp32', path=tmp_path)
        assert draw() == expected
        set_seed(3)
        fit(learn, 1)
        assert draw() == expected
        set_seed(3)
        with pytest.raises(KeyboardInterrupt): used(learn)
        assert draw() == expected
        assert torch.backends.cudnn.benchmark == benchmark
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_callback_that_predicts_or_validates_in_a_fit_changes_nothing_of_it(dls, tmp_path, precision):
    class Busy(Callback):
        def look(self):
            self.learn.get_preds()
            self.learn.predict(dls.valid_ds.items[0])
            self.found = list(self.learn.validate())
        def after_epoch(self): self.look()
        def after_batch(self):
            if self.training and self.iter == 1: self.look()
    ends = []
    for busy in (None, Busy()):
        learn = fit(get_learner(dls, precision=precision, path=tmp_path), cbs=busy)
        rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in learn.history.rows]
        ends.append((rows, learn.history.schedule, learn.recorder.values, learn.recorder.losses,
                     learn.misclassified.table(), learn.model.state_dict()))
    for one, other in zip(ends[0][:4], ends[1][:4], strict=True): assert one == other
    assert ends[0][4].equals(ends[1][4])
    assert all(torch.equal(ends[0][5][k], ends[1][5][k]) for k in ends[0][5])
    assert busy.found == pytest.approx([ends[0][0][-1]['test_loss'], ends[0][0][-1]['test_accuracy']])


def test_the_recorder_is_as_fastais(dls, tmp_path):
    learn = fit(get_learner(dls, precision='fp32', path=tmp_path))
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    for values, row in zip(learn.recorder.values, learn.history.rows, strict=True):
        assert list(values[1:]) == pytest.approx([row['test_loss'], row['test_accuracy']])
    learn.recorder.plot_loss()


def test_plain_lines_where_there_is_no_terminal(dls, tmp_path, capsys):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    assert [type(cb) for cb in learn.cbs if isinstance(cb, ProgressCallback)] == [Progress]
    assert learn.progress.name == 'progress', 'where fastai looks for it'
    fit(learn)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['epoch', '1', '2']
    assert lines[0].split() == ['epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'time']
    assert not any('\r' in line or '█' in line for line in lines)


@pytest.mark.parametrize('terminal', [False, True])
def test_a_fit_that_begins_at_a_later_epoch_shows_its_progress(dls, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr('lab.learner.SHOW_PROGRESS', terminal)
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    learn.first_epoch = 1
    fit(learn, 3)
    printed = capsys.readouterr().out
    assert len(learn.history.rows) == 2
    assert ('Epoch 2/3' in printed) == terminal
    assert f'{learn.history.rows[-1]["train_loss"]:.6f}' in printed
