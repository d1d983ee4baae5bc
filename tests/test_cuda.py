"""What only a CUDA GPU can show; skipped where there is none."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_folder
from fastai.vision.all import (
    Callback,
    ClassificationInterpretation,
    MixedPrecision,
    default_device,
    first,
    get_image_files,
    set_seed,
)
from torch.nn import functional as F

import predict
from arch import ResNet
from lab.errors import RunError
from lab.runs import Checkpoint, load_state
from predict import load_run
from train_fastai import find_lrs, get_dls, get_learner, main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU')


@pytest.fixture(scope='module')
def path(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('data')/'d', train=64, test=16)


@pytest.fixture(scope='module')
def run(path, tmp_path_factory):
    """A whole run through the command line, with the finder."""
    out = tmp_path_factory.mktemp('runs')/'bf16'
    command = [sys.executable, ROOT/'train_fastai.py', '--data', path, '--out', out, '--bs', 16, '--epochs', 4]
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return out


@pytest.fixture
def on_the_cpu():
    """fastai's default device is the CPU in this test."""
    default_device(False)
    yield
    default_device(None)


def test_a_whole_run(run):
    m = json.loads((run/'metrics.json').read_text())
    assert m['device'] == torch.cuda.get_device_name()
    assert m['precision'] == ('bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp16')
    assert m['test_accuracy'] > 0.8
    assert all((run/f'{name}.png').exists() for name in ('lr_find', 'history', 'misclassified', 'top_losses'))


def test_fp16_scales_the_loss_and_resumes_with_its_scale(path, tmp_path, monkeypatch):
    options = dict(data=path, out=tmp_path/'run', bs=16, epochs=3, lr_min=1e-4, lr_max=1e-3, precision='fp16')
    save = Checkpoint.save
    def interrupted(self, epochs_done):
        save(self, epochs_done)
        if epochs_done == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'save', interrupted)
        with pytest.raises(SystemExit): main(**options)
    scaler = load_state(tmp_path/'run/checkpoint.pth')['callbacks']['mixed_precision']
    assert scaler['scale'] > 1
    scales = []
    monkeypatch.setattr(Checkpoint, 'save', lambda self, n: (scales.append(self.scaler.get_scale()), save(self, n)))
    main(resume=tmp_path/'run')
    assert scales == [scaler['scale']]
    assert json.loads((tmp_path/'run/metrics.json').read_text())['precision'] == 'fp16'
    assert len((tmp_path/'run/schedule.csv').read_text().splitlines()) == 1 + 3 * 12


@pytest.mark.parametrize('stock', [False, True])
def test_both_loaders_give_batches_on_the_gpu(path, stock):
    dls = get_dls(path, bs=16, num_workers=0 if stock else None)
    for dl in dls:
        x, y = first(dl)
        assert (x.device.type, y.device.type, x.shape[1:], x.dtype) == ('cuda', 'cuda', (3, 32, 32), torch.float32)


def test_a_run_of_the_gpu_is_used_on_the_gpu_and_on_the_cpu(run, path, on_the_cpu):
    file = get_image_files(path/'test').sorted()[0]
    learn = load_run(run, path)
    assert next(learn.model.parameters()).device.type == learn.dls.device.type == 'cpu'
    found = learn.predict(file)
    assert len(ClassificationInterpretation.from_learner(learn).losses) == 48
    lr_min, lr_max = find_lrs(learn)
    assert lr_min < lr_max
    default_device(None)
    learn = load_run(run, path)
    assert next(learn.model.parameters()).device.type == 'cuda'
    assert learn.predict(file)[0] == found[0]
    assert learn.predict(file)[2].cpu().numpy() == pytest.approx(found[2].numpy(), abs=0.05)
    assert len(ClassificationInterpretation.from_learner(learn).losses) == 48
    assert find_lrs(learn, show_plot=True)[0] > 0
    learn.fit_one_cycle(1, 1e-4)
    learn.recorder.plot_loss()


def test_a_run_of_the_cpu_is_used_on_the_gpu(path, tmp_path, on_the_cpu):
    main(data=path, out=tmp_path/'run', bs=16, epochs=1, lr_min=1e-4, lr_max=1e-3)
    default_device(None)
    assert load_run(tmp_path/'run', path).validate()[1] == pytest.approx(
        json.loads((tmp_path/'run/metrics.json').read_text())['test_accuracy'], abs=0.05)


def test_predict_names_and_evaluates(run, path, capsys):
    predict.main(str(run), str(path/'test'))
    assert '48 images of 3 classes' in capsys.readouterr().out
    predict.main(str(run), str(path/'test/red/0.png'))
    assert 'red' in capsys.readouterr().out


def test_a_step_is_that_of_the_cpu_in_float32(path, tmp_path):
    learn = get_learner(get_dls(path, bs=64), ResNet(3, 3, width=64), path=tmp_path)
    x, y = (o.cpu().as_subclass(torch.Tensor) for o in learn.dls.valid.one_batch())
    model = ResNet(3, 3, width=64)
    model.load_state_dict(learn.model.state_dict())
    expected = F.cross_entropy(model.train()(x), y)
    with torch.autocast('cuda', dtype=torch.bfloat16): loss = F.cross_entropy(learn.model.train()(x.cuda()), y.cuda())
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for o in (expected, loss): o.backward()
    for ours, theirs in zip(learn.model.parameters(), model.parameters(), strict=True):
        assert F.cosine_similarity(ours.grad.cpu().flatten(), theirs.grad.flatten(), dim=0) > 0.9


@pytest.mark.filterwarnings('ignore:Synchronization debug mode is a prototype')
def test_no_training_step_waits_for_the_gpu(path, tmp_path):
    class NoWaiting(Callback):
        order = 1000
        def before_train(self):
            if self.epoch: torch.cuda.set_sync_debug_mode('error')  # what is made once was made in the first epoch
    class Waiting(Callback):
        order = -1000
        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    learn = get_learner(get_dls(path, bs=16), path=tmp_path)
    try: learn.fit_one_cycle(3, 1e-3, cbs=[NoWaiting(), Waiting()])
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.history.schedule) == 3 * 12


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_recorded_step_is_that_of_the_plain_network(path, tmp_path, precision):
    runs = []
    for recorded in (True, False):
        set_seed(42)
        learn = get_learner(get_dls(path, bs=16), ResNet(3, 3, width=64), precision=precision, path=tmp_path)
        if not recorded: learn.remove_cb(learn.cuda_graph)
        learn.fit_one_cycle(2, 1e-3)
        assert 'forward' not in vars(learn.model)
        runs.append((learn.history.rows, learn.model.state_dict()))
    for one, other in zip(*(rows for rows, _ in runs), strict=True):
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=0.05)
        assert one['test_loss'] == pytest.approx(other['test_loss'], rel=0.2)
    (_, one), (_, other) = runs
    for k in one: assert torch.allclose(one[k].float(), other[k].float(), rtol=0.2, atol=0.05), k


def test_a_loss_that_is_not_finite_is_found_at_its_batch(path, tmp_path):
    class Break(Callback):
        def before_batch(self):
            if self.training and (self.epoch, self.iter) == (1, 7): self.learn.xb = (self.x * float('nan'),)
    learn = get_learner(get_dls(path, bs=16), path=tmp_path, ema=0)
    with pytest.raises(RunError, match='not finite at batch 8 of 12 of epoch 2'):
        learn.fit_one_cycle(3, 1e-3, cbs=Break())


def test_to_fp16_takes_the_place_of_our_precision(path, tmp_path):
    learn = get_learner(get_dls(path, bs=16), precision='bf16', path=tmp_path).to_fp16()
    assert [type(cb) for cb in learn.cbs if isinstance(cb, MixedPrecision)] == [type(learn.mixed_precision)]
    losses = []
    class Spy(Callback):
        order = MixedPrecision.order + 1
        def before_backward(self): losses.append((self.loss_grad / self.loss).item())
    learn.fit_one_cycle(1, 1e-3, cbs=Spy())
    assert losses[0] == 65536
    assert learn.validate()[0] < 2
