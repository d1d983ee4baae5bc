import contextlib
import sys
import warnings
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import Interrupt, equal, fit, weights
from fastai.vision.all import Callback, GradientAccumulation, L, Learner, OptimWrapper, set_seed
from torch import nn

from arch import ResNet, conv_bn_relu
from lab.errors import InputError
from lab.loader import cache_images
from lab.optim import FusedAdam
from lab.speed import FastFit, LeanSequential, SideBySideConv2d, fast, resolve_precision
from train_fastai import get_learner


@pytest.fixture
def make(dls, tmp_path): return partial(get_learner, dls, precision='fp32', path=tmp_path)


def set_amx(monkeypatch, amx: bool): monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=amx))


def fit_fast(learn, *args, **kwargs) -> dict:
    """The weights after a fit in `fast`."""
    with fast(learn): fit(learn, *args, **kwargs)
    return weights(learn)


def assert_plain(learn):
    """Model, gradients and moments are as stock ones, and nothing of `fast` is left in the learner."""
    params = [*learn.model.parameters()]
    tensors = [*learn.model.state_dict().values(), *params, *(p.grad for p in params if p.grad is not None)]
    if learn.opt: tensors += [v for state in learn.opt.opt.state.values() for v in state.values()]
    assert all(t.is_contiguous() for t in tensors)
    assert {type(m).__module__.partition('.')[0] for m in learn.model.modules()} <= {'torch', 'arch'}
    assert 'forward' not in vars(learn.model)
    assert not hasattr(learn, 'fast_fit')
    assert not torch.backends.cudnn.benchmark
    assert not torch.is_autocast_enabled('cpu')


class Look(Callback):
    """Notes what is special in a fit."""
    def before_fit(self): self.classes, self.layouts = set(), set()
    def after_step(self):
        self.classes |= {type(m).__name__ for m in self.model.modules() if type(m).__module__.startswith('lab')}
        self.layouts.add(next(self.model.parameters()).is_contiguous())


@pytest.mark.parametrize(('precision', 'amx', 'width', 'classes', 'tolerance'), [
    ('fp32', False, 32, {'WinogradConv2d', 'LeanSequential'}, 0.02), ('bf16', True, 8, {'SideBySideConv2d'}, 0.2),
    ('bf16', False, 8, set(), 0.2)])
def test_fast_trains_the_same_and_leaves_it_plain(make, monkeypatch, precision, amx, width, classes, tolerance):
    set_amx(monkeypatch, amx)
    set_seed(0)
    stock, ours = learners = [make(ResNet(3, 3, width=width), precision=precision) for _ in 'ab']
    ours.model.load_state_dict(stock.model.state_dict())
    start, dtypes = weights(stock), set()
    for o in learners: o.model.prep[0].register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    stock.fit(1, 1e-3)
    with fast(ours):
        ours.fit(1, 1e-3, cbs=(look := Look()))
        predicted = ours.get_preds()[0]
    assert_plain(ours)
    assert (look.classes, look.layouts) == (classes, {False})
    assert dtypes == {torch.float32 if precision == 'fp32' else torch.bfloat16}
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    moves = [torch.cat([(weights(learn)[k] - v).flatten() for k, v in start.items() if v.is_floating_point()])
             for learn in learners]
    assert (moves[0] - moves[1]).norm() < tolerance * moves[0].norm()
    torch.testing.assert_close(predicted, ours.get_preds()[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize('training', [True, False])
def test_less_memory_changes_no_bit_and_what_no_hook_sees(training):
    torch.manual_seed(0)
    net, x, found, seen = conv_bn_relu(3, 8, pool=True).train(training), torch.randn(2, 3, 8, 8), [], []
    for kind in (nn.Sequential, LeanSequential):
        net.__class__ = kind
        out = net(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [*net.parameters()])))
    assert all(map(torch.equal, *found))
    net[1].register_forward_hook(lambda *_: seen.append('pool'))
    net[2].register_forward_hook(lambda m, x, out: seen.append(out.detach()))
    net[3].register_full_backward_hook(lambda *_: seen.append('gradient'))
    net(x).sum().backward()
    assert torch.equal(seen[1].relu(), out)
    assert seen[1].min() < 0
    assert (seen[0], *seen[2:]) == ('pool', 'gradient')


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_ctrl_c_leaves_nothing_and_the_next_fit_is_right(make, precision):
    class Fail(Callback):
        order = -1  # within autocast
        def __init__(self, event): setattr(self, event, self.fail)
        def fail(self):
            if self.iter == 1: raise ZeroDivisionError('broken')
    learn = make(precision=precision)
    for event, do in (('after_pred', fit), ('before_step', fit), ('after_pred', Learner.get_preds)):
        with pytest.raises(ZeroDivisionError), fast(learn), learn.added_cbs(Fail(event)): do(learn)
        assert_plain(learn)
        assert not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    ends = [fit_fast(make(precision=precision), 1) for _ in range(2)]
    assert equal(*ends), 'no cache of weights that an interrupted fit has cast'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_ctrl_c_in_lr_find_leaves_weights_and_moments(make, tmp_path, precision):
    learn = make(precision=precision)
    before, moments = fit_fast(learn, 1), deepcopy(learn.opt.state_dict())
    with pytest.raises(KeyboardInterrupt), fast(learn), learn.added_cbs(Interrupt()): learn.lr_find(show_plot=False)
    assert_plain(learn)
    assert equal(weights(learn), before)
    for i, state in learn.opt.state_dict()['state'].items(): assert equal(state, moments['state'][i])
    assert not [f for f in tmp_path.rglob('*') if f.is_file()], 'no temporary model'


class Loads(Callback):
    """Goes back to a saved model with its optimizer, at the first event of a kind."""
    loaded = False
    def __init__(self, event): setattr(self, event, self.load)
    def load(self):
        if not self.loaded: self.learn.load('half', with_opt=True)
        self.loaded = True


@pytest.mark.parametrize(('event', 'opt_func'), [
    ('before_epoch', partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)), ('before_batch', FusedAdam)])
def test_moments_that_are_loaded_find_their_weights(make, event, opt_func):
    """Their layouts differ within `fast` and outside, and fused AdamW on a CPU pairs by memory."""
    whole, early, late = (make(opt_func=opt_func, ema=0) for _ in range(3))
    def go_on(learn, cbs=None):
        learn.seed_epochs.done = 1
        return fit_fast(learn, 1, cbs=cbs)
    with fast(whole):
        fit(whole, 1)
        whole.save('half', with_opt=True)
    expected = go_on(whole)
    early.load('half', with_opt=True)
    assert equal(go_on(early), expected), 'loaded before'
    assert equal(go_on(late, Loads(event)), expected), 'loaded by a callback'


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Linear(64, 3)
    def forward(self, x): return self.fc(self.conv(x).view(len(x), 64, -1).mean(-1))


def test_fast_leaves_layouts_alone_that_are_not_its_own(make, monkeypatch):
    set_amx(monkeypatch, True)
    fit_fast(make(Views(), precision='bf16'), 1, cbs=(look := Look()))
    assert (look.classes, look.layouts) == (set(), {True})


def test_fast_twice_within_itself_and_around_a_bare_learner(dls, make):
    learn, once = make(), make()
    with fast(learn): twice = fit_fast(learn, 1)
    assert_plain(learn)
    assert equal(twice, fit_fast(once, 1))
    bare = Learner(dls, ResNet(3, 3), opt_func=FusedAdam, default_cbs=False)
    with fast(bare): bare.model(dls.one_batch()[0])
    assert_plain(bare)


@pytest.mark.skipif(sys.platform != 'linux', reason='a matter of glibc')
def test_fast_keeps_what_tensors_free_and_then_returns_it(make):
    import resource  # which Windows lacks

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # Small things settle beside the first few places and make them too small; what was returned is never reused.
    with fast(make()): assert any(faults() < 1000 for _ in range(25))
    held = [torch.ones(2**24) for _ in range(8)]  # they fill whatever gap the heap has
    assert [faults() > 16_000 for _ in held[:3]] == [True] * 3


def test_freed_memory_goes_back_while_a_fit_lasts(make, monkeypatch):
    monkeypatch.setattr('lab.speed.malloc_trim', (trims := []).append)  # or what stays breaks it up, and a fit grows
    monkeypatch.setattr('lab.speed.TRIM_EVERY', 2)
    fit_fast(make(), 8)
    assert trims == [0] * 13, 'after every other of 24 training batches, and at the end'


@pytest.mark.parametrize(('device', 'flags', 'allowed', 'expected'), [
    ('cpu', [], True, 'fp32'), ('cpu', ['avx512_f'], True, 'fp32'), ('cpu', ['avx512_bf16'], True, 'bf16'),
    ('cpu', ['amx_bf16'], True, 'bf16'), ('cpu', ['amx_bf16'], False, 'fp32'), ('mps', ['amx_bf16'], True, 'fp32'),
    ('cuda', (7, 5), True, 'fp16'), ('cuda', (8, 0), True, 'bf16')])
def test_auto_takes_what_a_processor_is_made_for(monkeypatch, device, flags, allowed, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict.fromkeys(flags, True))
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: allowed)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: flags)
    assert resolve_precision('auto', torch.device(device)) == expected


def test_nothing_special_is_done_on_mps(dls):
    """Asynchronous copies and channels-last batch norm were wrong there (pytorch issues 139550 and 189690)."""
    mps = torch.device('mps')
    cache_images(SimpleNamespace(train_ds=dls.train_ds, valid_ds=dls.valid_ds, vocab=dls.vocab, device=mps))
    assert dls.train_ds.images.device.type == dls.train_ds.labels.device.type == 'cpu'
    weight = SimpleNamespace(device=mps, is_cuda=False)
    model = SimpleNamespace(memory_format=torch.channels_last, parameters=lambda: [weight])  # and no modules, no `to`
    with fast(SimpleNamespace(model=model, opt=None, added_cbs=contextlib.nullcontext)): pass
    with pytest.raises(InputError, match='--precision bf16 needs cuda or cpu, not "mps"'):
        resolve_precision('bf16', mps)


@pytest.mark.parametrize('memory', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(('n', 'h', 'w'), [(64, 4, 4), (3, 7, 5), (2, 1, 1), (2, 9, 9)])
def test_maps_side_by_side_are_convolved_as_ever(n, h, w, memory):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1, bias=False)
    x = torch.randn(n, 6, h, w).to(memory_format=memory)
    grad, found = torch.randn(n, 10, h, w), []
    for kind in (nn.Conv2d, SideBySideConv2d):
        conv.__class__ = kind
        images = x.clone().requires_grad_()
        out = conv(images)
        found.append((out, *torch.autograd.grad(out, (images, conv.weight), grad)))
    for one, other in zip(*found, strict=True): torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def recorded(monkeypatch) -> list:
    """The networks whose step a `FastFit` records; on a CPU what torch would record is noted and left undone."""
    networks = []
    def record(model, images):
        networks.append(model)
        model.forward = partial(type(model).forward, model)
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record)
    warnings.filterwarnings('ignore', '.*CUDA is not available')
    return networks


CHANGES = dict(
    nothing=lambda learn: None,
    forward=lambda learn: setattr(learn.model, 'forward', learn.model.forward),
    forward_of_a_layer=lambda learn: setattr(learn.model.fc, 'forward', learn.model.fc.forward),
    hook=lambda learn: learn.model.layer1.register_forward_hook(lambda *_: None),
    backward_pre_hook=lambda learn: learn.model.fc.register_full_backward_pre_hook(lambda *_: None),
    partial_batches=lambda learn: setattr(learn.dls.train, 'drop_last', False),
    accumulation=lambda learn: learn.add_cb(GradientAccumulation(8)),
    wrapped=lambda learn: setattr(learn, 'model', nn.DataParallel(learn.model)))


@pytest.mark.parametrize('change', CHANGES)
def test_a_step_is_recorded_only_where_nothing_is_lost(make, recorded, change):
    learn = make()
    CHANGES[change](learn)
    theirs = vars(learn.model).get('forward')
    for _ in range(2): fit(learn, 1, cbs=FastFit(record=True))
    assert recorded == ([learn.model] * 2 if change == 'nothing' else []), 'once a fit'
    assert vars(learn.model).get('forward') is theirs


def test_on_a_gpu_recorder_and_bar_are_stock_afterwards(make, monkeypatch, recorded):
    """As far as a CPU can tell."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    learn, stock = make(), make()
    fit(stock)
    fit_fast(learn)
    assert recorded == [learn.model]
    for name in ('losses', 'lrs', 'values', 'iters'):
        ours, theirs = (torch.tensor([[*L(o)] for o in getattr(o.recorder, name)]) for o in (learn, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    with pytest.raises(KeyboardInterrupt): fit_fast(learn, cbs=Interrupt())
    assert_plain(learn)
    assert type(learn.recorder.smooth_loss) is type(stock.recorder.smooth_loss)
    assert 'after_batch' not in vars(learn.progress)
    fit(learn, 1)
    assert len(learn.recorder.values) == 1


def test_rounded_products_keep_convolutions_direct_and_say_so(make, capsys, monkeypatch):
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    for precision, said in (('fp32', 1), ('bf16', 0)):
        with fast(make(precision=precision)): pass
        assert capsys.readouterr().out.count('Convolutions stay direct') == said
