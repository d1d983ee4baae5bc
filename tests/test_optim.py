from functools import partial

import pytest
import torch
from conftest import fit
from fastai.vision import all as fv
from fastai.vision.all import L, Learner, nn, params

from arch import ResNet
from callbacks import SeedEpochs
from lab.optim import CrossEntropy, FusedAdam, TorchOptimizer
from train_fastai import get_learner

STOCK_ADAM = partial(fv.Adam, mom=0.95, sqr_mom=0.99, eps=1e-5)
TORCH_SGD = partial(TorchOptimizer, opt=torch.optim.SGD, momentum=0.9)
HYPERS = {'lr', 'wd', 'mom', 'sqr_mom', 'eps'}
SAME = dict(adam=(FusedAdam, STOCK_ADAM), sgd=(TORCH_SGD, partial(fv.SGD, mom=0.9, decouple_wd=False)))


@pytest.mark.parametrize('options', [{}, dict(weight=torch.rand(4)), dict(reduction='none', axis=1)], ids=str)
def test_the_loss_takes_the_options_of_the_class_it_extends(options):
    """Labels are smoothed in training alone."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 5), torch.randint(4, (6, 5))
    if 'axis' not in options: x = x.movedim(1, -1)
    ours, stock = CrossEntropy(label_smoothing=0.1, **options), fv.CrossEntropyLossFlat(**options)
    smoothed = fv.CrossEntropyLossFlat(label_smoothing=0.1, **options)
    torch.testing.assert_close(ours(x.requires_grad_(), y), smoothed(x, y))
    with torch.no_grad(): torch.testing.assert_close(ours(x, y), stock(x, y))
    for f in ('activation', 'decodes'): torch.testing.assert_close(getattr(ours, f)(x), getattr(stock, f)(x))


def test_fused_adamw_steps_like_fastais_adam():
    """Also by hand, without a learner."""
    ends = []
    for opt_func in (FusedAdam, STOCK_ADAM):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(8, 4, dtype=torch.float64))  # in float32 roundings would grow
        start, opt = weight.detach().clone(), opt_func([weight], lr=1e-3, wd=0.5)
        for i in range(6):
            opt.set_hypers(lr=1e-3, mom=0.95 - 0.01 * i)
            (weight * torch.randn(8, 4)).sum().backward()
            opt.step()
            opt.zero_grad()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() < 1e-9 * ends[1].norm()


def test_one_group_is_shown_of_two_of_which_one_decays(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', wd=0.2, path=tmp_path)
    learn.fit(1, 1e-3)
    shown, = learn.opt.hypers
    assert (shown['lr'], shown['wd'], shown['mom'], shown['sqr_mom'], shown['eps']) == (1e-3, 0.2, 0.95, 0.99, 1e-5)
    assert all(isinstance(v, int | float) for v in shown.values()), 'as TensorBoardCallback needs'
    groups, plain = learn.opt.opt.param_groups, {*fv.norm_bias_params(learn.model)}
    assert [{*pg['params']} for pg in groups] == [{*learn.model.parameters()} - plain, plain]
    for do, wd in ((partial(learn.fit, 1, 1e-3, wd=0.3), 0.3), (partial(fit, learn, 1), 0.2)):
        do()
        assert [pg['weight_decay'] for pg in learn.opt.opt.param_groups] == [wd, 0]
    learn.opt.set_hypers(mom=0.5, wd=0.7)
    with pytest.raises(TypeError): learn.opt.hypers[0]['lr'] = 1.  # as ReduceLROnPlateau does
    assert [(pg['betas'], pg['weight_decay']) for pg in groups] == [((0.5, 0.99), 0.7), ((0.5, 0.99), 0)]


def three_lists(m: ResNet) -> L:
    return L(params(m.prep), params(nn.ModuleList([m.layer1, m.layer2, m.layer3])), params(m.fc))


def learners(dls, path, splitter, opt='adam') -> list[Learner]:
    """Two stock learners of one network and randomness, with one of our optimizers and with the same of fastai's."""
    def make(opt_func):
        fv.set_seed(0)
        return Learner(dls, ResNet(3, 3), loss_func=CrossEntropy(label_smoothing=0.1), wd=0.1, opt_func=opt_func,
                       cbs=SeedEpochs(42), path=path, splitter=splitter)
    return [make(opt_func) for opt_func in SAME[opt]]


ACTIONS = dict(
    new_wd=lambda learn: learn.fit(2, 1e-3, wd=3.),
    frozen_to=lambda learn: (learn.freeze_to(1), learn.fit(2, 1e-3, wd=3.)),
    fine_tune=lambda learn: learn.fine_tune(1, 1e-3),
    reset=lambda learn: (learn.fit(1, 1e-3), learn.fit(1, 1e-4, reset_opt=True)))


@pytest.mark.parametrize('action', ACTIONS)
@pytest.mark.parametrize('opt', SAME)
def test_our_optimizers_do_what_fastais_do(dls, tmp_path, action, opt):
    ours, stock = made = learners(dls, tmp_path, three_lists, opt)
    start = {k: v.clone() for k, v in stock.model.state_dict().items()}
    for learn in made: ACTIONS[action](learn)
    assert len(ours.opt.hypers) == 3
    for one, other in zip(ours.opt.hypers, stock.opt.hypers, strict=True):
        for k in HYPERS & other.keys(): assert float(one[k]) == pytest.approx(float(other[k])), k
    for k, v in stock.model.state_dict().items():
        if not v.is_floating_point(): continue
        moved = (v - start[k]).norm()
        assert (ours.model.state_dict()[k] - v).norm() <= 0.02 * moved + 1e-7, k  # Adam's first steps magnify roundings
    trainable, theirs = ({name for name, p in o.model.named_parameters() if p.requires_grad} for o in made)
    assert trainable == theirs >= {'prep.1.weight', 'prep.1.bias'}, 'batch norm stays trainable'
    assert ('prep.0.weight' in trainable) == (action != 'frozen_to')


SPLITTERS = dict(generator=lambda m: m.parameters(), generator_of_lists=lambda m: (params(o) for o in m.children()),
                 with_an_empty_list=lambda m: [params(m[0]), [], params(m[1:])])


@pytest.mark.parametrize('splitter', SPLITTERS)
def test_any_splitter_that_a_stock_optimizer_takes(dls, tmp_path, splitter):
    def splits(m): return SPLITTERS[splitter](nn.ModuleList([m.prep, m.layer1, m.fc]))
    ours, stock = made = learners(dls, tmp_path, splits)
    for learn in made: learn.fit(1, slice(1e-4, 1e-2))
    assert [o['lr'] for o in ours.opt.hypers] == pytest.approx([o['lr'] for o in stock.opt.hypers])
    for one, other in zip(ours.opt.param_lists, stock.opt.param_lists, strict=True):
        assert sorted(p.shape for p in one) == sorted(p.shape for p in other)


BUILT = dict(made=lambda m: FusedAdam(m.parameters(), lr=1.),
             built=lambda m: TorchOptimizer(opt=torch.optim.AdamW([dict(params=params(m.prep), lr=3.), dict(
                 params=[*params(m.layer1), *params(m.layer2), *params(m.layer3), *params(m.fc)])], lr=1.)))


@pytest.mark.parametrize('built', BUILT)
def test_an_optimizer_built_by_hand_is_used_and_used_twice(dls, tmp_path, built):
    model = ResNet(3, 3)
    opt = BUILT[built](model)
    learn = get_learner(dls, model, opt_func=opt, wd=0.2, precision='fp32', path=tmp_path)
    for lr in (1e-2, 1e-3):
        learn.fit(1, lr, reset_opt=True)
        assert learn.opt is opt
        groups = opt.opt.param_groups
        assert {pg['lr'] for pg in groups} == {lr}
        assert sum(len(pg['params']) for pg in groups) == len(params(model))
        for pg in groups: assert pg['weight_decay'] == (0.2 if all(p.ndim > 1 for p in pg['params']) else 0)


def test_moments_of_any_layout_are_paired_with_their_weights():
    """Fused AdamW on a CPU pairs weights and moments by memory: in two layouts it would step wrongly."""
    torch.manual_seed(0)
    conv, ends = nn.Conv2d(8, 8, 3), []
    layouts = torch.contiguous_format, torch.channels_last
    for layout in layouts:
        p = nn.Parameter(conv.weight.detach().clone(memory_format=layout))
        opt = FusedAdam([p], lr=1e-2)
        for i in range(3):
            p.grad = torch.arange(576.).sin().view(8, 8, 3, 3).clone(memory_format=layouts[i % 2])
            opt.step()
            assert {v.stride() for v in opt.opt.state[p].values() if v.ndim} == {p.stride()}
            moments = {k: v.clone(memory_format=layouts[i % 2]) if v.ndim else v for k, v in opt.opt.state[p].items()}
            opt.load_state_dict(opt.state_dict() | dict(state={0: moments}))
        ends.append(p.detach())
    torch.testing.assert_close(*ends)
