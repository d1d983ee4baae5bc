import pickle
from functools import partial

import pytest
import torch
from conftest import fit
from fastai.vision.all import (
    SGD,
    Adam,
    CrossEntropyLossFlat,
    F,
    L,
    Learner,
    OptimWrapper,
    ReduceLROnPlateau,
    Tensor,
    nn,
    params,
    set_seed,
)

from arch import ResNet
from callbacks import SeedEpochs
from lab.optim import CrossEntropy, FusedAdam, TorchOptimizer, match_layout
from train_fastai import get_learner


def test_label_smoothing_applies_to_training_alone():
    x, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = CrossEntropy(label_smoothing=0.2)
    smoothed = torch.full((6, 4), 0.2 / 4).scatter_add(1, y[:, None], torch.full((6, 1), 0.8))
    torch.testing.assert_close(loss(x, y).as_subclass(Tensor), -(smoothed * x.log_softmax(1)).sum(1).mean())
    with torch.no_grad(): torch.testing.assert_close(loss(x, y).as_subclass(Tensor), F.cross_entropy(x, y))
    assert pickle.loads(pickle.dumps(loss)).label_smoothing == 0.2


@pytest.mark.parametrize('options', [{}, dict(axis=1), dict(weight=torch.rand(4)), dict(reduction='none', axis=1),
                                     dict(reduction='sum', ignore_index=2)], ids=str)
def test_the_loss_takes_the_options_of_the_class_it_extends(options):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, 5), torch.randint(4, (6, 5))
    if 'axis' not in options: x = x.movedim(1, -1)
    for smoothing in (0., 0.1):
        ours, stock = CrossEntropy(label_smoothing=smoothing, **options), CrossEntropyLossFlat(**options)
        torch.testing.assert_close(ours(x.requires_grad_(), y), CrossEntropyLossFlat(
            label_smoothing=smoothing, **options)(x, y))
        with torch.no_grad(): torch.testing.assert_close(ours(x, y), stock(x, y))
        for f in ('activation', 'decodes'): torch.testing.assert_close(getattr(ours, f)(x), getattr(stock, f)(x))


def test_fused_adamw_steps_like_fastais_adam(dls):
    xs, ys = zip(*((x.as_subclass(Tensor).double(), y.as_subclass(Tensor)) for x, y in dls.train), strict=True)
    ends = []  # in float32 roundings would grow
    for opt_func in (FusedAdam, partial(Adam, sqr_mom=0.99, eps=1e-5)):
        set_seed(0)
        learn = Learner(dls, ResNet(n_out=3, width=16).double(), opt_func=opt_func)
        start = torch.nn.utils.parameters_to_vector(learn.model.parameters()).detach()
        learn.create_opt()
        learn.opt.set_hypers(wd=0.01)
        for i in range(6):
            learn.opt.set_hypers(lr=1e-3, mom=0.95 - 0.01 * i)
            F.cross_entropy(learn.model(xs[i % 3]), ys[i % 3]).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        ends.append(torch.nn.utils.parameters_to_vector(learn.model.parameters()).detach() - start)
    assert (ends[0] - ends[1]).norm() < 1e-9 * ends[1].norm()


def test_one_group_is_shown_and_two_lie_below_of_which_one_decays(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', wd=0.2, path=tmp_path)
    learn.fit(1, 1e-3)
    shown, = learn.opt.hypers
    assert (shown['lr'], shown['wd'], shown['mom'], shown['sqr_mom'], shown['eps']) == (1e-3, 0.2, 0.95, 0.99, 1e-5)
    def decays() -> list[float]: return [pg['weight_decay'] for pg in learn.opt.opt.param_groups]
    assert decays() == [0.2, 0]
    names, modules = {p: name for name, p in learn.model.named_parameters()}, learn.model.named_modules()
    assert {names[p] for p in learn.opt.opt.param_groups[0]['params']} == {
        f'{name}.weight' for name, m in modules if isinstance(m, nn.Conv2d | nn.Linear)}
    assert sum(len(pg['params']) for pg in learn.opt.opt.param_groups) == len(names)
    learn.fit(1, 1e-3, wd=0.3)
    assert decays() == [0.3, 0]
    assert (fit(learn, 1), decays())[1] == [0.2, 0], 'the recipe\'s again'


def test_what_is_written_into_hypers_reaches_the_optimizer(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    learn.fit(3, 1e-5, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100, patience=1))
    assert learn.opt.hypers[0]['lr'] == pytest.approx(1e-7)  # a tenth after the second epoch, and again
    assert [pg['lr'] for pg in learn.opt.opt.param_groups] == pytest.approx([1e-7] * 2)
    learn.opt.hypers[0]['mom'] = 0.5
    assert [pg['betas'] for pg in learn.opt.opt.param_groups] == [(0.5, 0.99)] * 2
    learn.opt.hypers[0]['wd'] = 0.7
    assert [pg['weight_decay'] for pg in learn.opt.opt.param_groups] == [0.7, 0]


STOCK_ADAM = partial(Adam, mom=0.95, sqr_mom=0.99, eps=1e-5)
TORCH_SGD = partial(TorchOptimizer, opt=torch.optim.SGD, momentum=0.9)
SAME = dict(adam=(FusedAdam, STOCK_ADAM), sgd=(TORCH_SGD, partial(SGD, mom=0.9, decouple_wd=False)))


def three_lists(m: ResNet) -> L: return L(params(nn.ModuleList(part)) for part in (
    [m.prep, m.layer1], [m.layer2, m.layer3], [m.fc]))


def learners(dls, path, opt='adam', **kwargs) -> list[Learner]:
    """Two stock learners of one network and randomness, with one of our optimizers and with the same of fastai's."""
    made = []
    for opt_func in SAME[opt]:
        set_seed(0)
        made.append(Learner(dls, ResNet(3, 3), loss_func=CrossEntropy(label_smoothing=0.1), wd=0.1, opt_func=opt_func,
                            cbs=SeedEpochs(42), path=path, **kwargs))
    return made


def hypers(learn) -> list[dict]:
    """What an optimizer shows of each of its groups."""
    return [{k: float(o[k]) for k in ('lr', 'wd', 'mom', 'sqr_mom', 'eps') if k in o} for o in learn.opt.hypers]


def decayed(learn) -> set[str]:
    """The names of the parameters that a step pulls towards zero: with a tiny rate, no gradient and a huge decay."""
    names = {p: name for name, p in learn.model.named_parameters()}
    learn.opt.set_hypers(lr=1e-6, wd=1e5)
    for state in learn.opt.state.values():
        for k in state.keys() & {'grad_avg', 'exp_avg', 'momentum_buffer'}: state[k].zero_()
    for p in names: p.grad = torch.zeros_like(p.data.fill_(1.))
    learn.opt.step()
    return {name for p, name in names.items() if (p < 0.95).any()}


ACTIONS = dict(
    new_wd=lambda learn: learn.fit(2, 1e-3, wd=3.),
    one_cycle=lambda learn: learn.fit_one_cycle(2, 1e-3),
    slice=lambda learn: learn.fit_one_cycle(2, slice(1e-5, 1e-3)),
    frozen=lambda learn: (learn.freeze(), learn.fit(2, 1e-3)),
    frozen_to=lambda learn: (learn.freeze_to(1), learn.fit(2, 1e-3, wd=3.)),
    fine_tune=lambda learn: learn.fine_tune(1, 1e-3),
    reset=lambda learn: (learn.fit(1, 1e-3), learn.fit(1, 1e-4, reset_opt=True)),
    wd_bn_bias=lambda learn: (setattr(learn, 'wd_bn_bias', True), learn.fit(2, 1e-3, wd=3.)))


@pytest.mark.parametrize('action', ACTIONS)
@pytest.mark.parametrize('opt', SAME)
def test_our_optimizers_do_what_fastais_do(dls, tmp_path, action, opt):
    trainable = []
    ours, stock = made = learners(dls, tmp_path, opt, splitter=three_lists)
    start = {k: v.clone() for k, v in stock.model.state_dict().items()}
    for learn in made:
        ACTIONS[action](learn)
        trainable.append({name for name, p in learn.model.named_parameters() if p.requires_grad})
    assert len(ours.opt.hypers) == 3
    for one, other in zip(hypers(ours), hypers(stock), strict=True): assert one == pytest.approx(other)
    for k, v in stock.model.state_dict().items():
        if not v.is_floating_point(): continue
        moved = (v - start[k]).norm()
        assert (ours.model.state_dict()[k] - v).norm() <= 0.02 * moved + 1e-7, k  # Adam's first steps magnify roundings
    assert trainable[0] == trainable[1]
    assert ('prep.0.weight' in trainable[0]) == (action not in ('frozen', 'frozen_to'))
    assert {'prep.1.weight', 'prep.1.bias'} <= trainable[0], 'batch norm stays trainable'
    assert decayed(ours) == decayed(stock) >= {'fc.weight'}


SPLITTERS = dict(generator=lambda m: m.parameters(), generator_of_lists=lambda m: (params(o) for o in m.children()),
                 one_list=params, lists=lambda m: [params(o) for o in m.children()], filtered=lambda m: filter(
                     lambda p: p.ndim > 1, m.parameters()))


@pytest.mark.parametrize('splitter', SPLITTERS)
def test_any_splitter_that_a_stock_optimizer_takes(dls, tmp_path, splitter):
    def splits(m): return SPLITTERS[splitter](nn.ModuleList([m.prep, m.layer1, m.fc]))
    ours, stock = made = learners(dls, tmp_path, splitter=splits)
    for learn in made: learn.fit(1, slice(1e-4, 1e-2))
    assert [o['lr'] for o in ours.opt.hypers] == pytest.approx([o['lr'] for o in stock.opt.hypers])
    for one, other in zip(ours.opt.param_lists, stock.opt.param_lists, strict=True):
        assert {p.shape for p in one} == {p.shape for p in other}
        assert len(one) == len(other)


BUILT = dict(built=lambda m: TorchOptimizer(opt=torch.optim.SGD(m.parameters(), lr=1.)),
             built_groups=lambda m: TorchOptimizer(opt=torch.optim.AdamW([dict(params=params(m.prep), lr=3.), dict(
                 params=[*params(m.layer1), *params(m.layer2), *params(m.layer3), *params(m.fc)])], lr=1.)),
             made=lambda m: FusedAdam(m.parameters(), lr=1.), from_list=lambda m: FusedAdam([*m.parameters()], lr=1.))


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


def test_an_optimizer_without_a_learner(dls):
    """As in a loop of one's own, where nobody has said what decays."""
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    for opt, param in ((FusedAdam([p], lr=0.1, wd=0.5), p), (Adam([q], lr=0.1, mom=0.95, sqr_mom=0.99, wd=0.5), q)):
        for _ in range(3):
            (param * torch.arange(3.)).sum().backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(p, q)


def test_moments_are_saved_contiguous_and_paired_with_their_weights():
    """Fused AdamW on a CPU pairs weights and moments by memory: in two layouts it would step wrongly."""
    torch.manual_seed(0)
    conv, ends = nn.Conv2d(8, 8, 3), []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(conv.weight.detach().clone(memory_format=layout))
        opt = FusedAdam([p], lr=1e-2)
        for i in range(3):
            p.grad = torch.arange(576.).sin().view(8, 8, 3, 3).clone(memory_format=(
                torch.channels_last, torch.contiguous_format)[i % 2])
            opt.step()
            state = opt.state_dict()
            assert all(v.is_contiguous() for v in state['state'][0].values())
            opt.load_state_dict(state)
        ends.append(p.detach().contiguous())
        match_layout(opt.opt)
        assert {v.stride() for v in opt.opt.state[p].values() if v.ndim} == {p.stride()}
    torch.testing.assert_close(*ends)


def test_stock_optimwrapper_is_left_as_it_is(dls, tmp_path):
    learn = get_learner(dls, opt_func=partial(OptimWrapper, opt=torch.optim.RMSprop), precision='fp32', path=tmp_path)
    fit(learn, 1)
    assert [len(pg['params']) for pg in learn.opt.opt.param_groups] == [len(params(learn.model))]
