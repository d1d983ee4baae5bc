"""Our learner keeps the habits of a fastai learner: lines of public scripts and bug reports, beside a stock learner."""
import contextlib
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fastai.callback.channelslast  # noqa: F401, gives `Learner` its to_channelslast
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fit, make_folder
from fastai.callback.data import CollectDataCallback, PartialDL, WeightedDL
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.rnn import ModelResetter, RNNRegularizer
from fastai.callback.training import BnFreeze, ShortEpochCallback
from fastai.vision.all import (
    SGD,
    ActivationStats,
    Adam,
    Callback,
    ClassificationInterpretation,
    CrossEntropyLossFlat,
    CSVLogger,
    CutMix,
    DataLoaders,
    EarlyStoppingCallback,
    F1Score,
    FetchPredsCallback,
    FocalLossFlat,
    GradientAccumulation,
    GradientClip,
    L,
    Lamb,
    Learner,
    Lookahead,
    MixedPrecision,
    MixUp,
    OptimWrapper,
    ParamScheduler,
    ProgressCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    SchedCos,
    SchedLin,
    ShowGraphCallback,
    Tensor,
    TerminateOnNaNCallback,
    accuracy,
    error_rate,
    load_learner,
    params,
    ranger,
    set_seed,
)
from PIL import Image
from torch import nn

from arch import ResNet
from callbacks import History, SeedEpochs
from lab import learner, loader, speed
from lab.errors import InputError
from lab.evaluate import get_log_probs
from lab.speed import SideBySideConv2d
from predict import load_run
from train_fastai import find_lrs, get_dls, get_learner
from train_fastai import main as train


@pytest.fixture
def learn(dls, tmp_path): return get_learner(dls, precision='fp32', path=tmp_path)


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def assert_same(one, other):
    for k, v in one.items(): assert torch.equal(v, other[k]), k


# What callbacks look for

def test_a_graph_is_drawn_into_a_log_file(learn, monkeypatch, capsys):
    monkeypatch.setattr(learner, 'SHOW_PROGRESS', False)
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
    params = [*learn.model.parameters()]
    tensors = [*learn.model.state_dict().values(), *params, *(p.grad for p in params)]
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
    assert {*special} == {(8 if amx else 0, True)}, 'maps that are large enough are convolved as ever'
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


@pytest.fixture
def network(dls, tmp_path, monkeypatch):
    """The network of full width after a fit that failed, on a processor with AMX."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=True))
    learn = get_learner(dls.cpu(), ResNet(3, 3, width=64), precision='bf16', path=tmp_path)
    with pytest.raises(ZeroDivisionError): learn.fit(1, 1e-3, cbs=Break())
    return learn.model.eval()


def test_other_tools_see_the_plain_network(network):
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(network)(x), network(x))
    operations = [str(n.target) for n in torch.export.export(network, (x,)).graph.nodes]
    assert sum('conv2d' in o for o in operations) == 8
    assert not [o for o in operations if any(word in o for word in ('permute', 'transpose', 'pad', 'slice'))]
    assert sum(p.view(-1).numel() for p in network.parameters()) == 6_569_539, 'views work'


def test_a_counter_that_goes_by_type_counts_all_of_it(network):
    thop = pytest.importorskip('thop')
    macs, parameters = thop.profile(deepcopy(network), (torch.randn(1, 3, 32, 32),), verbose=False)
    assert parameters == 6_569_539
    assert macs == pytest.approx(380e6, rel=0.01)


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


def test_batches_are_plain_and_a_network_may_view_them(dls, tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3072, 3)

        def forward(self, x): return self.layer(x.view(len(x), -1))
    for i in range(2): assert dls[i].one_batch()[0].is_contiguous()
    learn = get_learner(dls, Views(), path=tmp_path)
    learn.fit(1, 1e-3)
    assert learn.validate()[1] > 0.5
    get_log_probs(learn, dls.valid_ds.images)


def test_the_default_network_is_asked_in_its_fastest_layout(dls, tmp_path):
    """In channels-last memory it answers a third faster, and a bf16 batch norm several times."""
    learn, seen = get_learner(dls, precision='fp32', path=tmp_path), []
    learn.model.prep[0].register_forward_hook(
        lambda _, args, out: seen.append((args[0].is_contiguous(memory_format=torch.channels_last),
                                          out.is_contiguous(memory_format=torch.channels_last))))
    inputs = learn.get_preds(with_input=True)[0]
    get_log_probs(learn, dls.valid_ds.images)
    assert {*seen} == {(True, True)}
    assert inputs.is_contiguous(), 'what the caller gets'


# The process around it

def test_a_server_gives_memory_back_and_a_notebook_needs_no_launch(tmp_path, folder):
    """A process that only predicts is as with stock fastai; what a launcher left in its environment means nothing."""
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
fit(learn, 1)  # for what stays after the first one: code, and oneDNN's own buffers
print('fit', kept_by(lambda: fit(learn, 1, cbs=Look())))
print('afterwards', kept_by(lambda: torch.ones(2**26)))  # larger than any hole that was left
learn.save('m')
learn.export()
learn.lr_find(num_it=20, show_plot=False)
print('files', sorted(p.name for p in path.rglob('*.p*') if p.suffix != '.png'))
"""
    Image.new('RGB', (7000, 7000)).save(tmp_path/'large.png')
    Image.new('RGB', (32, 32)).save(tmp_path/'small.png')
    env = dict(os.environ, RANK='0', WORLD_SIZE='2', PYTHONPATH=f'{ROOT}:{ROOT/"tests"}')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, tmp_path, folder], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    found = {key: float(line.split()[1]) for key in ('predicting', 'training', 'fit', 'afterwards')
             for line in done.stdout.splitlines() if line.startswith(key)}
    assert found['training'] > 60, 'MiB, of 128'
    assert found['predicting'] < 60, 'of the 140 of a large photograph'
    assert found['fit'] < 40, 'of the 128 that the fit kept while it ran'
    assert found['afterwards'] < 20
    assert "['export.pkl', 'm.pth']" in done.stdout


def test_predictions_of_many_threads_leave_the_learner_as_it_was(dls, tmp_path):
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    bar, logger = learn.progress, learn.logger
    images = [np.array(Image.open(f)) for f in dls.valid_ds.items]
    expected = [learn.predict(i)[0] for i in images]
    found, errors = [[None] * len(images) for _ in range(4)], []

    def work(mine: list):
        try:
            for i, image in enumerate(images):
                mine[i] = learn.predict(image)[0]
                get_log_probs(learn, dls.valid_ds.images)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)  # threads take turns as often as they can
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(interval)
    assert errors == []
    assert found == [expected] * 4
    assert (learn.logger, learn.create_mbar, learn.progress) == (logger, True, bar)


# Loaders of another kind

def test_a_weighted_loader(dls, folder, tmp_path):
    train = WeightedDL(dls.train_ds, bs=8, wgts=[1] * 8 + [0] * 16, shuffle=True, after_item=dls.train.after_item,
                       after_batch=dls.train.after_batch, num_workers=0)
    weighted = DataLoaders(train, dls.valid, path=dls.path)
    weighted._device = None  # what fastai's weighted_dataloaders leave
    seen = []

    class Look(Callback):
        def after_batch(self): seen.extend(self.y.tolist() if self.training else [])
    learn = get_learner(weighted, precision='auto', path=tmp_path)
    learn.fit(1, 1e-3, cbs=Look())
    assert {*seen} == {0}, 'images with a weight of zero were drawn'
    assert learn.validate()[1] > 0


def test_plain_torch_loaders(dls, tmp_path):
    x = torch.cat([torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32) - 1])
    data = torch.utils.data.TensorDataset(x, torch.arange(2).repeat_interleave(8))
    plain = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=4, shuffle=s) for s in (True, False)))
    assert not hasattr(plain, 'device')
    learn = get_learner(plain, nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), path=tmp_path)
    learn.fit(3, 1e-2)
    assert learn.history.rows[-1]['test_accuracy'] > 0.9
    assert learn.lr_find(show_plot=False).valley > 0
    assert 0 < find_lrs(learn)[0] < 10
    assert learn.get_preds(dl=plain.valid)[0].shape == (16, 2)  # fastai needs a loader of its own to find one


# Callbacks within a fit

def look(learn, how: str):
    """What people do in the middle of a training."""
    if how == 'get_preds': assert len(learn.get_preds()[0]) == 12
    elif how == 'predict': learn.predict(learn.dls.valid_ds.items[0])
    elif how == 'validate': assert len(learn.validate()) == 2
    elif how == 'training set': learn.validate(ds_idx=0)
    elif how == 'with loss': learn.get_preds(ds_idx=0, with_loss=True, with_input=True)
    else: ClassificationInterpretation.from_learner(learn).confusion_matrix()


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('ema', [0, 0.9])
def test_predictions_within_a_fit_do_not_change_it(dls, tmp_path, precision, ema):
    make = partial(get_learner, dls, precision=precision, ema=ema, path=tmp_path)

    class Look(Callback):
        order = 70

        def after_epoch(self):
            for how in ('get_preds', 'predict', 'validate', 'training set', 'with loss', 'interpretation'):
                look(self.learn, how)

        def after_batch(self):
            if self.iter == 1 and not self.aside: look(self.learn, 'training set' if self.training else 'predict')
    left_alone, watched = fit(make()), fit(make(), cbs=Look())
    assert_same(weights(watched), weights(left_alone))
    assert watched.history.schedule == left_alone.history.schedule
    assert [o[:3] for o in watched.recorder.values] == [o[:3] for o in left_alone.recorder.values]
    assert watched.recorder.lrs == left_alone.recorder.lrs
    assert watched.recorder.losses == left_alone.recorder.losses
    for row, other in zip(watched.history.rows, left_alone.history.rows, strict=True):
        assert row | dict(seconds=0) == other | dict(seconds=0)
    assert torch.equal(watched.misclassified.log_probs, left_alone.misclassified.log_probs)


def test_the_finder_says_where_the_loss_went(dls, tmp_path):
    from lab.errors import RunError
    learn = get_learner(dls, precision='fp32', path=tmp_path)

    class Explode(Callback):
        def after_loss(self):
            if self.train_iter >= 5: self.learn.loss_grad = self.learn.loss = self.loss_grad * math.nan
    learn.add_cb(Explode())
    with pytest.raises(RunError, match='the loss was not finite from batch 6 on'): find_lrs(learn)


# Whatever an image comes in

def pictures(folder) -> dict:
    """Files of images of every kind that people send to a server."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 48, 4), dtype=np.uint8)
    deep = rng.integers(0, 2**16, (40, 48), dtype=np.uint16)
    images = dict(rgb=Image.fromarray(pixels[..., :3]), rgba=Image.fromarray(pixels), deep=Image.fromarray(deep),
                  grey=Image.fromarray(pixels[..., 0]), palette=Image.fromarray(pixels[..., :3]).quantize(16))
    for name, image in images.items(): image.save(folder/f'{name}.png')
    turned = Image.Exif()
    turned[0x112] = 6
    images['rgb'].save(folder/'turned.jpg', exif=turned)
    images['rgb'].save(folder/'second.jpg', format='MPO', save_all=True, append_images=[images['grey'].convert('RGB')])
    return sorted(folder.iterdir())


def test_an_image_is_the_same_by_path_as_bytes_as_a_file_and_as_a_picture(dls, tmp_path):
    folder = tmp_path/'pictures'
    folder.mkdir()
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    files = pictures(Path(folder))
    assert len(files) == 7
    for file in files:
        expected = learn.predict(file)[2]
        content = file.read_bytes()
        opened = Image.open(file)
        for source in (str(file), content, io.BytesIO(content), opened, Image.open(io.BytesIO(content))):
            torch.testing.assert_close(learn.predict(source)[2], expected, rtol=0, atol=0, msg=f'{file.name}')
    first = Image.open(folder/'second.jpg').convert('RGB')
    torch.testing.assert_close(learn.predict(folder/'second.jpg')[2], learn.predict(first)[2])
    Image.new('RGB', (9, 9)).save(folder/'moving.gif', save_all=True, append_images=[Image.new('RGB', (9, 9), 'red')])
    with pytest.raises(InputError, match='moving.gif cannot be read as an image .it is a sequence of images'):
        learn.predict(folder/'moving.gif')
    with pytest.raises(InputError, match='the image cannot be read as an image'): learn.predict(b'no image')


# A finished run, read back

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('run')
    train(data=make_folder(tmp/'data'), out=tmp/'run', epochs=1, bs=8, lr_min=1e-4, lr_max=1e-3)
    return tmp/'run'


def test_a_run_is_loaded_without_its_images_and_plain(run, monkeypatch):
    for name in ('train_fastai.read_images', 'lab.loader.decode_images'): monkeypatch.setattr(name, None)
    learn = load_run(run)
    assert is_plain(learn)
    assert all(v.is_contiguous() for v in torch.load(run/'model.pth', weights_only=True).values())
    learn.predict(run.parent/'data/test/red/0.png')
    assert 'Total params: 103,499' in learn.summary()
    for needs_data in (learn.show_results, learn.validate, learn.get_preds, lambda: learn.fit(1), learn.lr_find,
                       learn.dls.show_batch, learn.dls.valid.show_batch, learn.tta,
                       lambda: ClassificationInterpretation.from_learner(learn)):
        with pytest.raises(InputError) as e: needs_data()
        assert str(e.value) == 'this learner has no images; load_run(run, data=FOLDER) reads them'


def test_with_its_images_a_loaded_run_does_all_of_it(run):
    learn = load_run(run, data=run.parent/'data')
    assert learn.validate()[1] == pytest.approx(json.loads((run/'metrics.json').read_text())['test_accuracy'])
    learn.show_results()
    learn.fit(1, 1e-4)
    assert is_plain(learn)


def test_the_widget_that_cleans_a_data_set(run, monkeypatch):
    pytest.importorskip('ipywidgets')
    from fastai.vision import widgets
    monkeypatch.setattr(widgets, 'display', print, raising=False)  # what a notebook has
    cleaner = widgets.ImageClassifierCleaner(load_run(run, data=run.parent/'data'))
    assert sorted(map(len, cleaner.iwis)) == [12, 24]
    assert len(cleaner.iw.fns) == 8
    with pytest.raises(InputError, match='has no images'): widgets.ImageClassifierCleaner(load_run(run))


# A Mac

def test_nothing_special_is_done_on_mps(dls, tmp_path, monkeypatch):
    """Asynchronous copies and channels-last batch norm were wrong there (pytorch issues 139550 and 189690)."""
    mps = torch.device('mps')
    assert speed.resolve_precision('auto', mps) == 'fp32'
    for precision in ('bf16', 'fp16'):
        with pytest.raises(InputError, match=f'--precision {precision} needs a CUDA GPU'):
            speed.resolve_precision(precision, mps)
    on_mps = SimpleNamespace(train_ds=dls.train_ds, valid_ds=dls.valid_ds, vocab=dls.vocab, device=mps)
    loader.keep_images(on_mps, [*dls.train_ds.items, *dls.valid_ds.items], torch.zeros(36, 3, 32, 32))
    assert dls.train_ds.images.device.type == dls.train_ds.labels.device.type == 'cpu'
    learn = get_learner(dls, precision='fp32', path=tmp_path)
    monkeypatch.setattr(type(learn), 'device', mps)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: 'state')
    restored = []
    monkeypatch.setattr(torch.mps, 'set_rng_state', restored.append)
    learn.fitting = True
    with speed.fast_layout(learn): assert learn.model.prep[0].weight.is_contiguous()
    with speed.keep_random_state(mps): pass
    assert restored == ['state']
    fused = SimpleNamespace(device=mps)
    monkeypatch.setattr(torch.optim, 'AdamW', lambda params, **kwargs: kwargs)
    monkeypatch.setattr(learner, 'TorchOptimizer', lambda params, opt, **kwargs: kwargs)
    assert learner.fused_adam([fused], 1e-3)['fused'] is False


# The table in docs/notes.md: every habit beside a stock learner

def run_tensorboard(learn):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with tempfile.TemporaryDirectory() as log:
        learn.fit(2, 1e-3, cbs=TensorBoardCallback(log))
        events = EventAccumulator(log).Reload()
    tags = ('train_loss', 'valid_loss', 'accuracy', 'lr_0', 'mom_0', 'wd_0')
    return [e.value for tag in tags for e in events.Scalars(tag)], events.Tags()['images'], events.Tags()['graph']


def run_projector(learn):
    from fastai.callback.tensorboard import TensorBoardProjectorCallback
    with tempfile.TemporaryDirectory() as log:
        learn.get_preds(cbs=TensorBoardProjectorCallback(log, layer=learn.model.pool))
        return (Path(log)/'00000/default/tensors.tsv').read_text().splitlines()[0].split()


def run_csv(learn):
    learn.fit(2, 1e-3, cbs=CSVLogger())
    log = pd.read_csv(learn.path/'history.csv').drop(columns='time')
    return log.to_numpy(), [*log.columns]


def run_save_model(learn, **kwargs):
    learn.fit(2, 1e-3, cbs=SaveModelCallback(monitor='valid_loss', **kwargs))
    files = [f.stem for f in sorted((learn.path/'models').iterdir())]
    return files, [learn.load(f, weights_only=False).get_preds()[0] for f in files]


def run_hook(learn):
    learn.fit(1, 1e-3, cbs=(stats := ActivationStats(with_hist=True)))
    return np.array([list(o) for o in stats.layer_stats(0)])


def run_collect(learn):
    learn.fit(1, 1e-3, cbs=(collect := CollectDataCallback()))
    return [[x[0], y[0], p, loss] for x, y, p, loss in collect.data]


def run_graph(learn):
    learn.fit(2, 1e-3, cbs=(graph := ShowGraphCallback()))
    return graph.nb_batches


def run_save_and_load(learn):
    learn.fit(1, 1e-3)
    learn.save('half', with_opt=True)
    learn.fit(1, 1e-2)
    learn.load('half', with_opt=True)
    learn.fit(1, 1e-3)


def run_export(learn):
    learn.fit(1, 1e-3)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_learner(learn.path/'export.pkl').predict(learn.dls.valid_ds.items[0])


def run_copy(learn, copy_it):
    learn.fit(1, 1e-3)
    other = copy_it(learn)
    other.fit(1, 1e-3)
    return other.get_preds()


def run_fp16(learn):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UserWarning)
        learn.to_fp16().fit(1, 1e-3)
    return sorted({str(w.message)[:60] for w in caught if 'CUDA' in str(w.message)})


def run_bf16(learn):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        learn.to_bf16().fit(1, 1e-3)


def run_nan(learn):
    class Explode(Callback):
        def after_loss(self): self.learn.loss = self.learn.loss_grad = self.loss_grad * math.inf
    with learn.added_cbs(Explode()): learn.fit(1, 1e-3, cbs=TerminateOnNaNCallback())


def run_bn_freeze(learn):
    learn.train_bn = False
    learn.freeze_to(1)
    learn.fit(1, 1e-3, cbs=BnFreeze())
    return [b.clone() for b in learn.model.prep[1].buffers()]


def run_fetch(learn):
    learn.fit(1, 1e-3, cbs=(fetch := FetchPredsCallback()))
    return fetch.preds


def run_summary(learn): return re.sub('(?s)Optimizer used.*', '', learn.summary())


def run_interpretation(learn):
    learn.fit(1, 1e-3)
    interpretation = ClassificationInterpretation.from_learner(learn)
    return interpretation.confusion_matrix(), *interpretation.top_losses(5)


def run_table(learn):
    out = io.StringIO()
    with contextlib.redirect_stdout(out): learn.fit(1, 1e-3)
    return out.getvalue().splitlines()[0].split()


def run_metrics(learn):
    learn.metrics = [error_rate, F1Score(average='macro'), accuracy]
    learn.fit(1, 1e-3)
    return learn.validate()


def with_loader(kind, **kwargs):
    def do(learn):
        train = learn.dls.train.new(cls=kind, num_workers=0, bs=4, **kwargs)
        learn.dls = DataLoaders(train, learn.dls.valid, path=learn.dls.path, device=learn.dls.device)
        learn.fit(2, 1e-3)
    return do


def fit_with(*cbs, epochs=2, lr=1e-3): return lambda learn: learn.fit(epochs, lr, cbs=[cb() for cb in cbs])


def with_optimizer(opt_func):
    def do(learn):
        learn.opt_func = opt_func
        learn.fit(2, 1e-3)
    return do


def grouped(do):
    """`do` to a learner with three groups of layers."""
    def of_groups(learn):
        learn.splitter = lambda m: L(params(nn.ModuleList(part)) for part in (
            [m.prep, m.layer1], [m.layer2, m.layer3], [m.fc]))
        return do(learn)
    return of_groups


def run_no_bar(learn):
    with learn.no_bar(): learn.fit(1, 1e-3)
    learn.fit(1, 1e-3)
    return type(learn.progress).__name__


def in_turn(*steps):
    """Does the `steps` to a learner, one after the other; the last one's result counts."""
    return lambda learn: [do(learn) for do in steps][-1]


FIT = fit_with(epochs=1)
# What is done to a learner; where that does not end the same on ours, why, and the arguments that make ours.
HABITS = {
    '`MixUp`': fit_with(MixUp), '`CutMix`': fit_with(CutMix),
    '`SaveModelCallback`': run_save_model,
    '`SaveModelCallback(every_epoch=True, with_opt=True)`': partial(run_save_model, every_epoch=True, with_opt=True),
    '`SaveModelCallback`, with averaged weights': (
        run_save_model, 'it saves the averages, which are what was tested', dict(ema=0.9)),
    '`EarlyStoppingCallback`': fit_with(partial(EarlyStoppingCallback, min_delta=100.), epochs=3),
    '`ReduceLROnPlateau`': fit_with(partial(ReduceLROnPlateau, min_delta=100.), epochs=4),
    '`TerminateOnNaNCallback`': (
        run_nan, 'the fit raises `RunError`, with this callback or without; fastai just ends it'),
    '`GradientAccumulation`': fit_with(partial(GradientAccumulation, n_acc=16)),
    '`GradientClip`': fit_with(partial(GradientClip, 0.1)),
    '`ShortEpochCallback`': fit_with(partial(ShortEpochCallback, 0.4)),
    '`BnFreeze`': grouped(run_bn_freeze),
    '`ParamScheduler`': fit_with(partial(ParamScheduler, dict(lr=SchedCos(1e-3, 1e-5), mom=SchedLin(.9, .8)))),
    '`CSVLogger`': run_csv, '`ShowGraphCallback`': run_graph,
    '`ProgressCallback`, the table it prints': (
        run_table, 'epochs count from 1; it also shows the mean training loss and the training accuracy'),
    '`no_bar`': run_no_bar,
    '`ActivationStats`': run_hook, '`CollectDataCallback`': run_collect, '`FetchPredsCallback`': run_fetch,
    '`MCDropoutCallback`': lambda learn: learn.get_preds(cbs=MCDropoutCallback()),
    '`PartialDL`': with_loader(PartialDL, partial_n=8),
    '`WeightedDL`': with_loader(WeightedDL, wgts=[1] * 8 + [0] * 16),
    '`TensorBoardCallback`': run_tensorboard,
    '`TensorBoardProjectorCallback`': (run_projector, 'it has no rule for the plain tensors that fastai hands it'),
    '`ModelResetter`, `RNNRegularizer`': (fit_with(ModelResetter, RNNRegularizer), 'they are for recurrent networks'),
    '`to_fp16`, on a CPU': run_fp16,
    '`to_bf16`, on a CPU': (run_bf16, 'it trains in bfloat16; fastai warns and trains in float32'),
    '`to_non_native_fp16`, on a CPU': (lambda learn: FIT(learn.to_non_native_fp16()), 'it needs a GPU'),
    '`to_channelslast`, `to_contiguous`': in_turn(
        partial(Learner.to_channelslast, use_amp=False), FIT, Learner.to_contiguous, FIT),
    '`Adam`': with_optimizer(Adam), '`SGD`': with_optimizer(SGD), '`Lamb`': with_optimizer(Lamb),
    '`Lookahead`': with_optimizer(lambda p, **kw: Lookahead(SGD(p, **kw))), '`ranger`': with_optimizer(ranger),
    '`OptimWrapper`': with_optimizer(partial(OptimWrapper, opt=torch.optim.RMSprop)),
    '`fit`, with another weight decay': lambda learn: learn.fit(2, 1e-3, wd=0.3),
    '`fit`, with `start_epoch`': lambda learn: learn.fit(3, 1e-3, start_epoch=1),
    '`fit_one_cycle`': lambda learn: learn.fit_one_cycle(2, 1e-3),
    '`fit_flat_cos`': lambda learn: learn.fit_flat_cos(2, 1e-3),
    '`fit_sgdr`': lambda learn: learn.fit_sgdr(2, 1, 1e-3),
    '`fine_tune`': grouped(lambda learn: learn.fine_tune(1, 1e-3)),
    '`freeze`, `unfreeze`': grouped(in_turn(Learner.freeze, FIT, Learner.unfreeze, FIT)),
    'a `slice` of rates': grouped(lambda learn: learn.fit(2, slice(1e-5, 1e-3))),
    '`lr_find`': lambda learn: (learn.lr_find(num_it=30, show_plot=False)[0], learn.recorder.lrs,
                                [float(o) for o in learn.recorder.losses]),
    'other `metrics`': run_metrics,
    'another `loss_func`': in_turn(lambda learn: setattr(learn, 'loss_func', FocalLossFlat()), FIT),
    '`validate`': in_turn(FIT, Learner.validate),
    '`get_preds`': in_turn(FIT, partial(Learner.get_preds, with_input=True, with_loss=True, with_decoded=True)),
    '`predict`': lambda learn: learn.predict(learn.dls.valid_ds.items[0], with_input=True),
    '`tta`': in_turn(FIT, lambda _: set_seed(0), partial(Learner.tta, n=2)),
    '`show_results`': in_turn(partial(Learner.show_results, max_n=4), lambda _: len(plt.gcf().axes)),
    '`recorder.plot_loss`': in_turn(FIT, lambda learn: [o.get_ydata() for o in learn.recorder.plot_loss(0).lines]),
    '`ClassificationInterpretation`': run_interpretation,
    '`summary`': run_summary,
    '`save`, `load`, with the optimizer': run_save_and_load,
    '`export`, `load_learner`': run_export,
    '`deepcopy`': partial(run_copy, copy_it=deepcopy),
    '`pickle`': partial(run_copy, copy_it=lambda learn: pickle.loads(pickle.dumps(learn))),
    '`clone`': (lambda learn: learn.clone(), 'fastai has no such method'),
}


def close(one, other) -> bool:
    """Whether two results are equal, numbers to a thousandth: Adam's first steps magnify roundings."""
    if isinstance(one, dict | list | tuple | L) and type(one) is type(other) and len(one) == len(other):
        if isinstance(one, dict): return one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
        return all(map(close, one, other))
    if isinstance(one, Tensor | np.ndarray | float | int) and isinstance(other, Tensor | np.ndarray | float | int):
        one, other = (np.asarray(o, dtype=float) for o in (one, other))
        return one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)
    return type(one) is type(other) and one == other


def moved_alike(one, other, start) -> bool:
    """Whether two networks went the same way from `start`, to a thousandth of it."""
    steps = [torch.cat([(o[k] - start[k]).flatten().float() for k in start]) for o in (one, other)]
    return bool((steps[0] - steps[1]).norm() <= 1e-3 * steps[1].norm())


def try_habit(do, learn):
    """What `do(learn)` returns, or its error, and what the recorder holds afterwards."""
    set_seed(0)
    with contextlib.redirect_stdout(None):
        try: result = do(learn)
        except Exception as e: result = f'{type(e).__name__}: {e}'
    plt.close('all')
    return result, [[*o] for o in getattr(learn.recorder, 'values', [])]


def find_habit(folder, path, do, **kwargs) -> str:
    """How our learner, made with `kwargs`, takes what `do` does to it, beside a stock one of the same recipe."""
    for kind in ('ours', 'stock'): (path/kind).mkdir(parents=True)
    ours_dls, stock_dls = (get_dls(folder, bs=8, device=torch.device('cpu')) for _ in range(2))
    ours = get_learner(ours_dls, path=path/'ours', **dict(wd=0.01, label_smoothing=0, ema=0, precision='fp32') | kwargs)
    network = deepcopy(ours.model).to(memory_format=torch.channels_last)  # as ours in a fit: both round alike
    stock = Learner(stock_dls, network, CrossEntropyLossFlat(), wd=0.01, metrics=accuracy,
                    opt_func=partial(Adam, mom=0.95, sqr_mom=0.99, eps=1e-5), cbs=[SeedEpochs(42), History()],
                    path=path/'stock')  # with the randomness of ours
    start = weights(ours)
    (found, *_), (expected, *_) = outcomes = try_habit(do, ours), try_habit(do, stock)
    if all(isinstance(o, str) and 'Error: ' in o for o in (found, expected)): return 'fails in both'
    return 'same' if close(*outcomes) and moved_alike(weights(ours), weights(stock), start) else 'different'


def test_the_table_of_habits_is_what_is_found(folder, tmp_path):
    pytest.importorskip('tensorboard')
    rows = ['| fastai | beside a stock learner |', '|---|---|']
    for i, (name, habit) in enumerate(HABITS.items()):
        do, why, kwargs = (*habit, {})[:3] if isinstance(habit, tuple) else (habit, '', {})
        found = find_habit(folder, tmp_path/str(i), do, **kwargs)
        rows.append(f'| {name} | {found}{": " if why else ""}{why} |')
        assert (found == 'same') != bool(why), rows[-1]
    table = '\n'.join(rows)
    assert table in (ROOT/'docs/notes.md').read_text(), table


def test_the_table_would_tell_learners_apart(folder, tmp_path):
    for i, kwargs in enumerate((dict(wd=1.), dict(label_smoothing=0.01), dict(ema=0.9))):
        assert find_habit(folder, tmp_path/str(i), fit_with(), **kwargs) == 'different', kwargs
    assert find_habit(folder, tmp_path/'raises', lambda learn: learn.history.nothing) == 'fails in both'


def test_the_averages_that_were_best_are_saved(dls, tmp_path):
    learn = get_learner(dls, ema=0.9, precision='fp32', path=tmp_path)
    learn.fit(3, 1e-2, cbs=SaveModelCallback())
    tested = [row[1] for row in learn.recorder.values]
    assert learn.load('model', with_opt=False).validate()[0] == pytest.approx(min(tested))
    assert len({*tested}) == 3
