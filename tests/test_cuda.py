"""What only a CUDA GPU can show; skipped where there is none."""
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, Interrupt, Spoil, args, disturbed, equal, interrupt, make_folder, read_metrics, weights
from fastai.vision import all as fv
from fastai.vision.all import Callback, ClassificationInterpretation, default_device, set_seed
from torch.nn import functional as F

import predict
from arch import ResNet
from lab.errors import RunError
from lab.runs import load_state
from lab.speed import fast
from predict import load_run
from train_fastai import find_lrs, get_dls, get_learner, main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU')


@pytest.fixture(scope='module')
def path(tmp_path_factory): return make_folder(tmp_path_factory.mktemp('data')/'d', train=64, test=16)


@pytest.fixture(scope='module')
def run(path, tmp_path_factory):
    """A whole run through the command line, with the finder."""
    out = tmp_path_factory.mktemp('runs')/'bf16'
    command = [sys.executable, ROOT/'train_fastai.py', *args(data=path, out=out, bs=16, epochs=4)]
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return out


@pytest.fixture
def on_the_cpu():
    """fastai's default device is the CPU in this test."""
    default_device(False)
    yield
    default_device(None)


def test_a_whole_run_and_its_predictions(run, path, capsys):
    m = read_metrics(run)
    assert m['device'] == torch.cuda.get_device_name()
    assert m['precision'] == ('bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp16')
    assert m['test_accuracy'] > 0.8
    assert all((run/f'{name}.png').exists() for name in ('lr_find', 'history', 'misclassified', 'top_losses'))
    assert all(v.is_contiguous() for v in load_state(run/'model.pth').values())
    for images, shown in ((path/'test', '48 images of 3 classes'), (path/'test/red/0.png', 'red')):
        predict.main(args(run, images))
        assert shown in capsys.readouterr().out


def test_fp16_scales_the_loss_and_resumes_with_its_scale(path, tmp_path):
    options, scales = dict(data=path, out=tmp_path/'run', bs=16, epochs=3, lr_min=1e-4, lr_max=1e-3), []
    def look(cb): scales.append(cb.learn.scaler.get_scale())
    with disturbed(interrupt, epoch=2, batch=0), pytest.raises(SystemExit): main(args(**options, precision='fp16'))
    scaler = next(o for o in load_state(tmp_path/'run/checkpoint.pth')['states'] if '_growth_tracker' in o)
    assert scaler['scale'] > 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fv.MixedPrecision, 'before_train', look, raising=False)
        main(args(resume=tmp_path/'run'))
    assert scales == [scaler['scale']], 'of the last epoch'
    assert read_metrics(tmp_path/'run')['precision'] == 'fp16'


@pytest.mark.parametrize('item_by_item', [False, True])
def test_both_ways_to_make_batches_end_on_the_gpu(path, item_by_item):
    dls = get_dls(path, bs=16)
    for dl in dls:
        if item_by_item: dl.after_item.add(fv.Transform(lambda x: x))
        assert dl.makes_whole_batches != item_by_item
        x, y = fv.first(dl)
        assert (x.device.type, y.device.type, x.shape[1:], x.dtype) == ('cuda', 'cuda', (3, 32, 32), torch.float32)


def test_a_run_of_the_gpu_is_used_on_both(run, path, on_the_cpu):
    file = fv.get_image_files(path/'test').sorted()[0]
    learn = load_run(run, path)
    assert next(learn.model.parameters()).device.type == learn.dls.device.type == 'cpu'
    found = learn.predict(file)
    assert len(ClassificationInterpretation.from_learner(learn).losses) == 48
    lr_min, lr_max = find_lrs(learn)
    assert lr_min < lr_max
    default_device(None)
    learn = load_run(run, path)
    assert next(learn.model.parameters()).device.type == 'cuda'
    assert learn.predict(file)[2].cpu().numpy() == pytest.approx(found[2].numpy(), abs=0.05)
    assert len(ClassificationInterpretation.from_learner(learn).losses) == 48
    with fast(learn):
        assert find_lrs(learn, show_plot=True)[0] > 0
        learn.fit_one_cycle(1, 1e-4)
    learn.recorder.plot_loss()


def test_a_run_of_the_cpu_is_used_on_the_gpu(path, tmp_path, on_the_cpu):
    main(args(data=path, out=tmp_path/'run', bs=16, epochs=1, lr_min=1e-4, lr_max=1e-3))
    default_device(None)
    found, expected = load_run(tmp_path/'run', path).validate()[1], read_metrics(tmp_path/'run')['test_accuracy']
    assert found == pytest.approx(expected, abs=0.05)


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
    try:
        with fast(learn): learn.fit_one_cycle(3, 1e-3, cbs=[NoWaiting(), Waiting()])
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.history.schedule) == 3 * 12


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_recorded_step_is_that_of_the_plain_network(path, tmp_path, precision):
    class See(Callback):
        def after_train(self): assert ('forward' in vars(self.model)) == (within is fast)
    runs = []
    for within in (fast, nullcontext):
        set_seed(42)
        learn = get_learner(get_dls(path, bs=16), ResNet(3, 3, width=64), precision=precision, path=tmp_path)
        with within(learn): learn.fit_one_cycle(2, 1e-3, cbs=See())
        assert 'forward' not in vars(learn.model)
        runs.append((learn.history.rows, learn.model.state_dict(), learn.recorder.values))
    for one, other in zip(*(rows for rows, *_ in runs), strict=True):
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=0.05)
        assert one['test_loss'] == pytest.approx(other['test_loss'], rel=0.2)
    (_, one, values), (_, other, _) = runs
    for k in one: assert torch.allclose(one[k].float(), other[k].float(), rtol=0.2, atol=0.05), k
    assert [row[1] for row in values] == pytest.approx([row['test_loss'] for row in runs[0][0]], rel=1e-3)


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_ctrl_c_in_fast_leaves_nothing(path, tmp_path, precision):
    learn = get_learner(get_dls(path, bs=16), precision=precision, path=tmp_path)
    with pytest.raises(KeyboardInterrupt), fast(learn): learn.fit_one_cycle(2, 1e-3, cbs=Interrupt())
    assert not torch.is_autocast_enabled('cuda')
    assert 'forward' not in vars(learn.model)
    assert 'after_batch' not in vars(learn.progress)
    assert type(learn.recorder.smooth_loss) is fv.AvgSmoothLoss
    assert all(p.is_contiguous() for p in learn.model.parameters())
    before = weights(learn)
    with pytest.raises(KeyboardInterrupt), fast(learn), learn.added_cbs(Interrupt()): learn.lr_find(show_plot=False)
    assert equal(weights(learn), before)
    with fast(learn): learn.fit_one_cycle(2, 1e-3)
    assert len(learn.history.rows) == 2
    assert learn.validate()[0] < 2


def test_a_loss_that_is_not_finite_is_found_at_its_batch(path, tmp_path):
    learn = get_learner(get_dls(path, bs=16), path=tmp_path, ema=0)
    with pytest.raises(RunError, match='not finite at batch 8 of 12 of epoch 2'), fast(learn):
        learn.fit_one_cycle(3, 1e-3, cbs=Spoil(True, 1, 7))
