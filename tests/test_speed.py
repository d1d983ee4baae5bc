import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fit
from fastai.vision.all import Callback
from torch import nn

from lab.errors import InputError
from lab.speed import CUDAGraph, SideBySideConv2d, best_precision, resolve_precision
from train_fastai import get_learner


@pytest.mark.skipif(sys.platform != 'linux', reason='a matter of glibc')
def test_on_a_cpu_a_fit_keeps_what_tensors_free_and_returns_it_at_its_end(dls, tmp_path, monkeypatch):
    import resource  # which Windows lacks

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int: return 4 * int(Path('/proc/self/statm').read_text().split()[1]) // 1024  # MiB

    class Look(Callback):
        def after_train(self):
            # Small things settle beside the first few places and make them too small; memory that was returned is never
            # reused.
            self.kept = any(faults() < 1000 for _ in range(25))
            self.before = resident()
            for o in [torch.ones(2**20) for _ in range(128)]: del o  # 512 MiB
            self.at_its_end = resident()
    learn = get_learner(dls.cpu(), precision='fp32', path=tmp_path)
    fit(learn, 1, cbs=(look := Look()))
    assert look.kept
    assert look.at_its_end > look.before + 200
    assert resident() < look.at_its_end - 200
    def goes_on() -> bool:
        held = [torch.ones(2**24) for _ in range(16)]  # they fill whatever gap the heap has
        return bool(held) and any(faults() < 16_000 for _ in range(5))
    assert not goes_on()
    def fail(self): raise ValueError('no more')
    monkeypatch.setattr(Look, 'after_train', fail)
    with pytest.raises(ValueError, match='no more'): fit(learn, 1, cbs=Look())
    assert not goes_on(), 'after an error'


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
def test_small_maps_lie_side_by_side_in_a_fit_where_the_processor_has_amx(dls, tmp_path, monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=amx))
    pad, calls = nn.functional.pad, []
    monkeypatch.setattr(nn.functional, 'pad', lambda *args, **kwargs: calls.append(args) or pad(*args, **kwargs))
    dls.cpu()
    class Look(Callback):
        def after_train(self): self.classes = {type(m) for m in self.model.modules() if isinstance(m, nn.Conv2d)}
    for precision in ('bf16', 'fp32'):
        learn = get_learner(dls, precision=precision, path=tmp_path)
        calls.clear()
        fit(learn, 1, cbs=(see := Look()))
        assert len(calls) == (5 * 3 if amx and precision == 'bf16' else 0), 'of five batches, in layer 3 alone'
        assert see.classes == {SideBySideConv2d if amx and precision == 'bf16' else nn.Conv2d}
        assert {type(m) for m in learn.model.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}


def test_a_processor_that_is_told_to_leave_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=True))
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    assert best_precision(torch.device('cpu')) == 'fp32'


def test_a_precision_that_does_not_exist():
    with pytest.raises(InputError, match='--precision int8 is not one of auto, fp32'):
        resolve_precision('int8', torch.device('cpu'))
    with pytest.raises(InputError, match='--precision fp16 needs a CUDA GPU'):
        resolve_precision('fp16', torch.device('cpu'))


@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('loader', [SimpleNamespace(drop_last=True), SimpleNamespace(drop_last=False), []])
def test_a_step_is_recorded_only_if_all_batches_have_one_shape(monkeypatch, loader):
    recorded, images = [], torch.zeros(2, 3, 4, 4)
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', lambda _, images: recorded.append(images[0].shape))
    graph = CUDAGraph()
    graph.learn = SimpleNamespace(training=True, is_training_fast=True, model=nn.BatchNorm2d(3), x=images,
                                  dls=SimpleNamespace(train=loader))
    graph.before_batch()
    assert recorded == ([images.shape] if getattr(loader, 'drop_last', False) else [])
