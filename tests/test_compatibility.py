"""The learner keeps the habits of a fastai learner: lines of public scripts and bug reports, each beside a stock one."""
import copy
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, fit, make_folder
from fastai.callback.channelslast import ChannelsLast  # noqa: F401, gives `Learner` its to_channelslast
from fastai.vision.all import (
    Adam,
    Callback,
    ClassificationInterpretation,
    DataLoaders,
    EarlyStoppingCallback,
    Lamb,
    Learner,
    MixedPrecision,
    ParamScheduler,
    ProgressCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    SGD,
    ShowGraphCallback,
    accuracy,
    load_learner,
    noop,
    ranger,
    untar_data,
)
from fastcore.basics import Path
from PIL import Image
from torch import nn

from arch import ResNet
from lab import loader
from lab.evaluate import get_log_probs
from lab.speed import SideBySideConv2d
from predict import load_run
from train_fastai import get_dls, get_learner


@pytest.fixture
def learn(dls, tmp_path): return get_learner(dls, precision='fp32', path=tmp_path)


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def assert_same(one, other):
    for k, v in one.items(): assert torch.equal(v, other[k]), k


# What the recorder holds

def test_the_recorder_has_the_columns_that_all_scripts_count_on(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path, ema=0)
    learn.fit(2, 1e-3, cbs=SaveModelCallback(monitor='accuracy'))
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert [len(v) for v in learn.recorder.values] == [3, 3]
    learn.fit(1, 1e-3)
    row = learn.recorder.values[-1]
    assert list(row[1:]) == pytest.approx(list(learn.validate()))


def test_a_graph_is_drawn_into_a_log_file(learn, monkeypatch, capsys):
    monkeypatch.setattr(loader, 'SHOW_PROGRESS', False)
    learn.fit(2, 1e-3, cbs=ShowGraphCallback())
    assert capsys.readouterr().out.count('\n') == 3, 'names of columns and a line an epoch'
    with learn.no_bar(): learn.fit(1, 1e-3)
    assert type(learn.progress) is ProgressCallback  # fastai's own habit


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_tensorboard(dls, tmp_path, precision):
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    learn = get_learner(dls, precision=precision, path=tmp_path)
    learn.fit(1, 1e-3, cbs=TensorBoardCallback(tmp_path/'log', trace_model=precision == 'fp32'))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path/'log')).Reload()
    tags = events.Tags()['scalars']
    assert {'train_loss', 'valid_loss', 'accuracy', 'lr_0', 'mom_0', 'wd_0'} <= {*tags}
    assert events.Scalars('lr_0')[0].value == pytest.approx(1e-3)
    if precision == 'fp32': return
    with pytest.raises(Exception, match="Can't trace model in mixed precision"):  # as fastai, which finds it by name
        learn.fit(1, cbs=TensorBoardCallback(tmp_path/'log'))


@pytest.mark.parametrize('opt_func', [ranger, Adam, SGD, Lamb])
def test_optimizers_of_fastai(learn, opt_func):
    before = weights(learn)
    learn.opt_func = opt_func
    learn.fit(1, 1e-3)
    assert not torch.equal(weights(learn)['fc.weight'], before['fc.weight'])
    assert learn.opt.hypers[0]['wd'] == 0.1


# Precision

def test_to_fp16_on_a_cpu_does_what_fastai_does(dls, tmp_path):
    dls.cpu()
    seen = []
    learn = get_learner(dls, precision='fp32', path=tmp_path).to_fp16()
    learn.model.prep[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with pytest.warns(UserWarning, match='CUDA is not available'): learn.fit(1, 1e-3)
    assert {*seen} == {torch.float32}
    get_log_probs(learn, dls.valid_ds.images)
    assert {*seen} == {torch.float32}


def test_fastai_finds_the_precision_by_its_name(dls, tmp_path):
    learn = get_learner(dls, precision='bf16', path=tmp_path)
    learn.to_channelslast()
    assert len([cb for cb in learn.cbs if isinstance(cb, MixedPrecision)]) == 1
    assert learn.mixed_precision in learn.cbs
    learn.to_contiguous()
    learn.export()
    with pytest.warns(UserWarning, match='insecure pickle'): loaded = load_learner(tmp_path/'export.pkl', cpu=True)
    assert not hasattr(loaded, 'mixed_precision')


# What a user holds is plain

class Break(Callback):
    """Fails in the second training batch."""
    def before_batch(self):
        if self.training and self.iter == 1: raise ZeroDivisionError('broken')


def is_plain(learn) -> bool:
    """Whether the model and the moments are as stock ones: classes, contiguous tensors."""
    tensors = [*learn.model.state_dict().values(), *learn.model.parameters(), *(p.grad for p in learn.model.parameters())]
    if learn.opt: tensors += [v for state in learn.opt.state_dict()['state'].values() for v in state.values()]
    return (all(t.is_contiguous() for t in tensors if isinstance(t, torch.Tensor))
            and not any(isinstance(m, SideBySideConv2d) for m in learn.model.modules()))


@pytest.mark.parametrize('amx', [False, True])
def test_classes_and_layout_are_special_during_a_fit_alone(dls, tmp_path, monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=amx))
    dls.cpu()
    learn, special = get_learner(dls, precision='bf16', path=tmp_path), []

    class Look(Callback):
        def after_step(self):
            special.append((sum(type(m) is SideBySideConv2d for m in self.model.modules()),
                            self.model.prep[0].weight.is_contiguous(memory_format=torch.channels_last)))
            assert all(v.is_contiguous() for v in self.model.state_dict().values())
            self.learn.save('within', with_opt=True)
    assert is_plain(learn)
    learn.fit(1, 1e-3, cbs=Look())
    assert {*special} == {(3 if amx else 0, True)}
    assert is_plain(learn)
    with pytest.raises(ZeroDivisionError): learn.fit(1, 1e-3, cbs=Break())
    assert is_plain(learn)
    saved = torch.load(tmp_path/'models/within.pth', weights_only=True)
    assert all(v.is_contiguous() for v in saved['model'].values())
    moments = [v for state in saved['opt']['state'].values() for v in state.values()]
    assert len(moments) > 30
    assert all(v.is_contiguous() for v in moments)
    learn.export()
    with pytest.warns(UserWarning, match='insecure pickle'): assert is_plain(load_learner(tmp_path/'export.pkl'))


def test_other_tools_see_the_plain_network(dls, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=True))
    dls.cpu()
    learn = get_learner(dls, ResNet(3, 3, width=64), precision='bf16', path=tmp_path)
    with pytest.raises(ZeroDivisionError): learn.fit(1, 1e-3, cbs=Break())
    model, x = learn.model.eval(), torch.randn(2, 3, 32, 32)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    operations = [str(n.target) for n in torch.export.export(model, (x,)).graph.nodes]
    assert not [o for o in operations if any(word in o for word in ('permute', 'transpose', 'pad', 'slice'))]
    assert sum(p.view(-1).numel() for p in model.parameters()) == 6_569_539, 'views work'
    thop = pytest.importorskip('thop')
    macs, parameters = thop.profile(copy.deepcopy(model), (x[:1],), verbose=False)
    assert parameters == 6_569_539
    assert 379e6 < macs < 381e6


def train_on(learn, epochs=1):
    learn.fit(epochs, 1e-3)
    return weights(learn)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_saved_and_loaded_moments_go_on_as_if_they_had_stayed(dls, tmp_path, precision):
    make = partial(get_learner, dls, precision=precision, path=tmp_path)
    stayed = make()
    stayed.fit(1, 1e-3)
    stayed.save('half', with_opt=True)
    expected = train_on(stayed)
    loaded = make().load('half', with_opt=True)
    loaded.history.rows = stayed.history.rows[:1]  # epochs are counted across fits
    assert_same(train_on(loaded), expected)
    within = make()

    class Reload(Callback):  # as a callback does that goes back to the best epoch
        def after_epoch(self): self.learn.load(self.learn.save('now', with_opt=True).stem, with_opt=True)
    within.fit(2, 1e-3, cbs=Reload())
    unharmed = make()
    unharmed.fit(2, 1e-3)
    assert_same(weights(within), weights(unharmed))


def test_a_step_by_hand_after_a_fit_and_a_load_is_the_right_one(learn):
    """Fused AdamW pairs weights and moments by memory, and says nothing where they lie differently."""
    learn.fit(1, 1e-3)
    learn.save('m', with_opt=True)
    torch.manual_seed(0)
    grads = [torch.randn_like(p) for p in learn.model.parameters()]

    def step(opt):
        for p, g in zip(opt.all_params().itemgot(0), grads, strict=True): p.grad = g.clone()
        opt.step()
    before = weights(learn)
    step(learn.opt)
    after = weights(learn)
    stepped = (after['prep.0.weight'] - before['prep.0.weight']).abs().max()
    assert 0 < stepped < 0.02, 'a pairing by memory would be off by more'
    learn.load('m', with_opt=True)
    assert_same(weights(learn), before)
    step(learn.opt)
    assert_same(weights(learn), after)


# The process around it

def test_a_server_gives_memory_back_and_a_notebook_needs_no_launch(tmp_path, folder):
    """A process that only predicts behaves as with stock fastai; leftovers of a launcher in its environment are nothing."""
    program = """
import resource, sys
from conftest import fit
from fastai.vision.all import *
from PIL import Image
from predict import get_empty_dls
from train_fastai import get_dls, get_learner

def resident() -> float:
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20

path = Path(sys.argv[1])
learn = get_learner(get_empty_dls(['a', 'b', 'c']), path=path)
learn.predict(path/'small.png')

def kept_by(f) -> float:
    before = resident()
    f()
    return resident() - before
print('predicting', kept_by(lambda: learn.predict(path/'large.png')))
learn = get_learner(get_dls(sys.argv[2], bs=8), path=path)
class Look(Callback):
    def after_epoch(self): print('training', kept_by(lambda: torch.ones(2**25)))
fit(learn, 1, cbs=Look())
print('afterwards', kept_by(lambda: [torch.ones(2**25), learn.predict(path/'large.png')]))
learn.save('m')
learn.export()
learn.lr_find(num_it=20, show_plot=False)
print('files', sorted(p.name for p in path.rglob('*.p*') if p.suffix != '.png'))
"""
    Image.new('RGB', (4500, 4500)).save(tmp_path/'large.png')
    Image.new('RGB', (32, 32)).save(tmp_path/'small.png')
    env = dict(os.environ, RANK='0', WORLD_SIZE='2', PYTHONPATH=f'{ROOT}:{ROOT/"tests"}')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, tmp_path, folder], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    found = {key: float(line.split()[1]) for key in ('predicting', 'training', 'afterwards')
             for line in done.stdout.splitlines() if line.startswith(key)}
    assert found['training'] > 100, 'MiB, of 128'
    assert found['predicting'] < 20, 'of the 58 of a large photograph'
    assert found['afterwards'] < 20
    assert "['export.pkl', 'm.pth']" in done.stdout
