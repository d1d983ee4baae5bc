import sys
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import Interrupt, fit
from fastai.vision.all import Callback, GradientAccumulation, L, Learner, OptimWrapper, set_seed
from torch import nn
from torch.nn import functional as F

from arch import ResNet
from lab.errors import InputError
from lab.loader import cache_images
from lab.optim import FusedAdam
from lab.speed import CUDAGraph, SideBySideConv2d, fast, fast_layout, resolve_precision, unwrap
from train_fastai import get_learner

make = partial(get_learner, precision='fp32')


def set_amx(monkeypatch, amx: bool): monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=amx))


def weights(learn) -> dict: return {k: v.clone() for k, v in learn.model.state_dict().items()}


def equal(one: dict, other: dict) -> bool: return all(torch.equal(one[k], other[k]) for k in one)


def assert_plain(learn):
    """Model, gradients and moments are as stock ones, and nothing of `fast` is left in the learner."""
    params = [*learn.model.parameters()]
    tensors = [*learn.model.state_dict().values(), *params, *(p.grad for p in params if p.grad is not None)]
    if learn.opt: tensors += [v for state in learn.opt.opt.state.values() for v in state.values()]
    assert all(t.is_contiguous() for t in tensors)
    assert {type(m) for m in learn.model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert 'forward' not in vars(learn.model)
    assert not any(m._state_dict_hooks for m in learn.model.modules())
    assert not {'guard', 'cuda_graph'} & vars(learn).keys()
    assert not torch.backends.cudnn.benchmark
    assert not torch.is_autocast_enabled('cpu')


class Look(Callback):
    """Notes what is special in a fit, and saves model and optimizer."""
    order = 1000
    def before_fit(self): self.classes, self.layouts = set(), set()
    def after_step(self):
        self.classes |= {type(m).__name__ for m in self.model.modules() if isinstance(m, nn.Conv2d)}
        self.layouts.add(self.model.layer2[0].weight.is_contiguous(memory_format=torch.channels_last))
        self.learn.save('within', with_opt=True)


class Break(Callback):
    """Fails in the second training batch, between backward pass and step."""
    def before_step(self):
        if self.iter == 1: raise ZeroDivisionError('broken')


@pytest.mark.parametrize(('precision', 'amx', 'width', 'classes', 'tolerance'), [
    ('fp32', False, 64, {'WinogradConv2d', 'Conv2d'}, 0.02), ('bf16', True, 8, {'SideBySideConv2d'}, 0.2),
    ('bf16', False, 8, {'Conv2d'}, 0.2)])
def test_fast_trains_the_same_and_leaves_it_plain(dls, tmp_path, monkeypatch, precision, amx, width, classes,
                                                  tolerance):
    set_amx(monkeypatch, amx)
    learners = [make(dls, ResNet(3, 3, width=width), precision=precision, path=tmp_path) for _ in range(2)]
    stock, ours = learners
    ours.model.load_state_dict(stock.model.state_dict())
    start = weights(stock)
    stock.fit(1, 1e-3)
    with fast(ours):
        ours.fit(1, 1e-3, cbs=(look := Look()))
        predicted = ours.get_preds()[0]
    assert_plain(ours)
    assert (look.classes, look.layouts) == (classes, {True})
    moves = [torch.cat([(weights(learn)[k] - v).flatten() for k, v in start.items() if v.is_floating_point()])
             for learn in learners]
    assert (moves[0] - moves[1]).norm() < tolerance * moves[0].norm()
    torch.testing.assert_close(predicted, ours.get_preds()[0], atol=tolerance, rtol=0)
    saved = torch.load(tmp_path/'models/within.pth', weights_only=True)
    tensors = [*saved['model'].values(), *(v for state in saved['opt']['state'].values() for v in state.values())]
    assert len(tensors) > 100
    assert all(v.is_contiguous() for v in tensors)
    with pytest.raises(ZeroDivisionError), fast(ours): fit(ours, 1, cbs=Break())
    assert_plain(ours)
    network, x = ours.model.eval(), torch.randn(2, 3, 32, 32)
    operations = [str(n.target) for n in torch.export.export(network, (x,)).graph.nodes]
    assert sum('conv2d' in o for o in operations) == 8
    assert not [o for o in operations if any(word in o for word in ('permute', 'transpose', 'pad', 'slice'))]
    assert all(p.view(-1).numel() for p in network.parameters()), 'views work'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_ctrl_c_leaves_nothing_and_the_next_fit_is_right(dls, tmp_path, precision):
    learn, other = (make(dls, precision=precision, path=tmp_path) for _ in range(2))
    with pytest.raises(KeyboardInterrupt), fast(learn): fit(learn, cbs=Interrupt())  # within autocast
    assert_plain(learn)
    assert not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    class Fail(Callback):
        def before_batch(self): self.learn.xb = (self.x[:, :1],)  # a forward pass that fails
    with pytest.raises(RuntimeError), fast(learn), learn.added_cbs(Fail()): learn.get_preds()
    assert_plain(learn)
    with fast(other): fit(other)
    learn = make(dls, precision=precision, path=tmp_path)
    with fast(learn): fit(learn)
    assert equal(weights(learn), weights(other)), 'no cache of weights that an interrupted fit has cast'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_ctrl_c_in_lr_find_leaves_weights_and_moments(dls, tmp_path, precision):
    learn = make(dls, precision=precision, path=tmp_path)
    with fast(learn): fit(learn, 1)
    before, moments = weights(learn), deepcopy(learn.opt.state_dict())
    with pytest.raises(KeyboardInterrupt), fast(learn), learn.added_cbs(Interrupt()): learn.lr_find(show_plot=False)
    assert_plain(learn)
    assert equal(weights(learn), before)
    for i, state in learn.opt.state_dict()['state'].items(): assert equal(state, moments['state'][i])
    assert not [f for f in tmp_path.rglob('*') if f.is_file()], 'no temporary model'
    with fast(learn): fit(learn, 1)
    assert len(learn.history.rows) == 2


class Loads(Callback):
    """Goes back to a saved model with its optimizer, at the first event of a kind."""
    loaded = False
    def __init__(self, event): setattr(self, event, self.load)
    def load(self):
        if not self.loaded: self.learn.load('half', with_opt=True)
        self.loaded = True


@pytest.mark.parametrize(('event', 'opt_func'), [
    ('before_fit', partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)), ('before_train', FusedAdam),
    ('before_epoch', partial(OptimWrapper, opt=torch.optim.AdamW, fused=True)), ('before_batch', FusedAdam)])
def test_moments_that_are_loaded_find_their_weights(dls, tmp_path, event, opt_func):
    """Saved ones are contiguous, the weights in `fast` are not, and fused AdamW on a CPU pairs by memory."""
    learners = [make(dls, opt_func=opt_func, ema=0, path=tmp_path) for _ in range(3)]
    def go_on(learn, cbs=None):
        learn.seed_epochs.done = 1
        with fast(learn): learn.fit(1, 1e-3, cbs=cbs)
        return weights(learn)
    with fast(learners[0]):
        learners[0].fit(1, 1e-3)
        learners[0].save('half', with_opt=True)
    expected = go_on(learners[0])
    learners[1].load('half', with_opt=True)
    assert equal(go_on(learners[1]), expected), 'loaded before'
    assert equal(go_on(learners[2], Loads(event)), expected), 'loaded by a callback'


class SeeConv(Callback):
    """Notes what becomes of the convolution of `Views`."""
    def before_fit(self): self.found = []
    def after_step(self): self.found.append((type(self.model.conv), self.model.conv.weight.is_contiguous()))


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Linear(64, 3)
    def forward(self, x): return self.fc(self.conv(x).view(len(x), 64, -1).mean(-1))


def test_fast_leaves_layouts_alone_that_are_not_its_own(dls, tmp_path, monkeypatch):
    set_amx(monkeypatch, True)
    learn = make(dls, Views(), precision='bf16', path=tmp_path)
    with fast(learn): fit(learn, 1, cbs=(seen := SeeConv()))
    assert seen.found == [(nn.Conv2d, True)] * 3
    learn = make(dls, path=tmp_path)
    learn.model.to(memory_format=torch.channels_last)
    with fast(learn): fit(learn, 1)
    assert learn.model.layer2[0].weight.is_contiguous(memory_format=torch.channels_last), 'what somebody chose'


def test_fast_twice_within_itself_and_around_a_bare_learner(dls, tmp_path):
    learn, once = (make(dls, path=tmp_path) for _ in range(2))
    with fast(learn), fast(learn): fit(learn, 1)
    assert_plain(learn)
    with fast(once): fit(once, 1)
    assert equal(weights(learn), weights(once))
    with fast(once): pass
    assert equal(weights(learn), weights(once))
    bare = Learner(dls, ResNet(3, 3), opt_func=FusedAdam, default_cbs=False)
    with fast(bare): bare.model(dls.one_batch()[0])
    assert_plain(bare)


@pytest.mark.skipif(sys.platform != 'linux', reason='a matter of glibc')
def test_fast_keeps_what_tensors_free_and_then_returns_it(dls, tmp_path):
    import resource  # which Windows lacks

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int: return 4 * int(Path('/proc/self/statm').read_text().split()[1]) // 1024  # MiB

    def goes_on() -> bool:
        held = [torch.ones(2**24) for _ in range(16)]  # they fill whatever gap the heap has
        return bool(held) and any(faults() < 16_000 for _ in range(5))
    learn = make(dls.cpu(), path=tmp_path)
    with fast(learn):
        fit(learn, 1)
        # Small things settle beside the first few places and make them too small; what was returned is never reused.
        assert any(faults() < 1000 for _ in range(25))
        before = resident()
        for o in [torch.ones(2**20) for _ in range(128)]: del o  # 512 MiB
        at_its_end = resident()
        assert at_its_end > before + 200
    assert resident() < at_its_end - 200
    assert not goes_on()
    with pytest.raises(ZeroDivisionError), fast(learn): fit(learn, 1, cbs=Break())
    assert not goes_on(), 'after an error'


def test_bfloat16_on_a_cpu_computes_in_bfloat16(dls, tmp_path):
    losses, dtypes = [], []
    for precision in ('fp32', 'bf16'):
        learn = make(dls, precision=precision, path=tmp_path)
        hook = learn.model.prep[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        fit(learn, 1)
        hook.remove()
        losses.append(torch.tensor([float(o) for o in learn.recorder.losses]))
        assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert (dtypes[0], dtypes[-1]) == (torch.float32, torch.bfloat16)
    assert not torch.equal(*losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(('flags', 'allowed', 'expected'), [
    ({}, True, 'fp32'), (dict(avx512_f=True), True, 'fp32'), (dict(avx512_bf16=True), True, 'bf16'),
    (dict(amx_bf16=True), True, 'bf16'), (dict(amx_bf16=True), False, 'fp32')])
def test_auto_takes_what_a_processor_is_made_for(monkeypatch, flags, allowed, expected):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: allowed)
    assert resolve_precision('auto', torch.device('cpu')) == expected
    assert resolve_precision('auto', torch.device('mps')) == 'fp32'


@pytest.mark.parametrize(('capability', 'expected'), [((7, 5), 'fp16'), ((8, 0), 'bf16'), ((9, 0), 'bf16')])
def test_auto_takes_what_a_gpu_is_made_for(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert resolve_precision('auto', torch.device('cuda')) == expected


@pytest.mark.parametrize(('precision', 'device', 'message'), [
    ('int8', 'cpu', '--precision int8 is not one of auto, fp32'),
    ('fp16', 'cpu', '--precision fp16 needs a CUDA GPU, not "cpu"'),
    ('bf16', 'mps', '--precision bf16 needs a CUDA GPU or a CPU, not "mps"')])
def test_a_precision_that_does_not_exist(precision, device, message):
    with pytest.raises(InputError, match=message): resolve_precision(precision, torch.device(device))


def test_nothing_special_is_done_on_mps(dls, tmp_path, monkeypatch):
    """Asynchronous copies and channels-last batch norm were wrong there (pytorch issues 139550 and 189690)."""
    mps = torch.device('mps')
    on_mps = SimpleNamespace(train_ds=dls.train_ds, valid_ds=dls.valid_ds, vocab=dls.vocab, device=mps)
    cache_images(on_mps)
    assert dls.train_ds.images.device.type == dls.train_ds.labels.device.type == 'cpu'
    model = SimpleNamespace(memory_format=torch.channels_last, parameters=lambda: iter([SimpleNamespace(device=mps)]))
    with fast_layout(SimpleNamespace(model=model)): pass  # it would ask for the model's modules
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, **kwargs: SimpleNamespace(param_groups=[kwargs]))
    assert FusedAdam([SimpleNamespace(device=mps)], 1e-3).opt.param_groups[0]['fused'] is False


@pytest.mark.parametrize('memory', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(('n', 'h', 'w'), [(5, 4, 4), (1, 8, 8), (3, 7, 5), (2, 1, 1), (2, 9, 9)])
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


def test_only_small_maps_lie_side_by_side(dls, tmp_path, monkeypatch):
    set_amx(monkeypatch, True)
    pad, calls = F.pad, []
    monkeypatch.setattr(F, 'pad', lambda *args, **kwargs: calls.append(args) or pad(*args, **kwargs))
    learn = make(dls, precision='bf16', path=tmp_path)
    with fast(learn): fit(learn, 1)
    assert len(calls) == 5 * 3, 'of five batches, in layer 3 alone'


@pytest.fixture
def recorded(monkeypatch) -> list:
    """The networks whose step a `CUDAGraph` records; on a CPU what torch would record is noted and left undone."""
    networks = []
    def record(model, images):
        networks.append(model)
        model.forward = partial(type(model).forward, model)
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record)
    warnings.filterwarnings('ignore', '.*CUDA is not available')
    return networks


def own_forward(learn):
    def forward(self, x):
        self.calls = getattr(self, 'calls', 0) + 1
        return type(self).forward(self, x)
    return MethodType(forward, learn.model)


CHANGES = dict(
    nothing=lambda learn: None,
    forward=lambda learn: setattr(learn.model, 'forward', own_forward(learn)),
    forward_of_a_layer=lambda learn: setattr(learn.model.fc, 'forward', learn.model.fc.forward),
    hook=lambda learn: learn.model.layer1.register_forward_hook(lambda *_: None),
    backward_hook=lambda learn: learn.model.fc.register_full_backward_hook(lambda *_: None),
    backward_pre_hook=lambda learn: learn.model.fc.register_full_backward_pre_hook(lambda *_: None),
    partial_batches=lambda learn: setattr(learn.dls.train, 'drop_last', False),
    accumulation=lambda learn: learn.add_cb(GradientAccumulation(8)),
    wrapped=lambda learn: setattr(learn, 'model', nn.DataParallel(learn.model)))


@pytest.mark.parametrize('change', CHANGES)
def test_a_step_is_recorded_only_where_nothing_is_lost(dls, tmp_path, recorded, change):
    learn = make(dls, path=tmp_path)
    CHANGES[change](learn)
    theirs = vars(learn.model).get('forward')
    for _ in range(2): fit(learn, 1, cbs=CUDAGraph())
    assert recorded == ([learn.model] * 2 if change == 'nothing' else []), 'once a fit'
    assert vars(learn.model).get('forward') is theirs
    if change == 'forward': assert learn.model.calls == 2 * (3 + 2), 'of every batch'


def test_a_recorded_step_ends_with_its_fit(dls, tmp_path, recorded):
    learn = make(dls, path=tmp_path)
    class Look(Callback):
        def after_batch(self): self.found = 'forward' in vars(self.model)
    fit(learn, 1, cbs=[CUDAGraph(), look := Look()])
    assert look.found
    statistics = [b.clone() for b in learn.model.buffers()]
    with learn.added_cbs(graph := CUDAGraph()):
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 0., cbs=Interrupt())
        graph.clean_up()
    assert 'forward' not in vars(learn.model)
    def theirs(x): return ResNet.forward(learn.model, x)
    class Swap(Callback):
        def after_epoch(self): self.model.forward = theirs
    fit(learn, 1, cbs=[CUDAGraph(), Swap()])
    assert vars(learn.model)['forward'] is theirs, 'which somebody put in its place'
    assert len(statistics) == len([*learn.model.buffers()])


def test_on_a_gpu_recorder_and_bar_are_stock_afterwards(dls, tmp_path, monkeypatch, recorded):
    """As far as a CPU can tell."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    learn, stock = (make(dls, path=tmp_path) for _ in range(2))
    fit(stock)
    with fast(learn): fit(learn)
    assert recorded == [learn.model]
    for name in ('losses', 'lrs', 'values', 'iters'):
        ours, theirs = (torch.tensor([[*L(o)] for o in getattr(o.recorder, name)]) for o in (learn, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    assert type(learn.recorder.smooth_loss) is type(stock.recorder.smooth_loss)
    assert 'after_batch' not in vars(learn.progress)
    learn.recorder.plot_loss()
    with pytest.raises(KeyboardInterrupt), fast(learn): fit(learn, cbs=Interrupt())
    assert_plain(learn)
    assert type(learn.recorder.smooth_loss) is type(stock.recorder.smooth_loss)
    fit(learn, 1)
    assert len(learn.recorder.values) == 1


def test_the_network_inside_another():
    network = nn.Linear(2, 2)
    for wrap in (nn.DataParallel, partial(torch.compile, backend='eager'), lambda m: torch.compile(nn.DataParallel(m))):
        assert unwrap(wrap(network)) is network
    set_seed(0)
    assert unwrap(network) is network
