import errno
import http.server
import json
import math
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, ends, make_folder, one_cycle
from fastai.data.external import fastai_cfg
from fastai.vision.all import (
    Adam,
    Callback,
    ClassificationInterpretation,
    Learner,
    URLs,
    accuracy,
    defaults,
    load_learner,
)
from kill import command, differences, kill_runs, run_options
from PIL import Image

import data
import figures
import train_fastai
from arch import ResNet
from callbacks import History, SeedEpochs
from data import get_data, get_dls
from errors import InputError
from learner import get_learner
from run import check_options, load_state, locked
from train_fastai import main

FILES = {'metrics.json', 'history.csv', 'schedule.csv', 'lr_find.csv', 'misclassified.csv', 'lr_find.png',
         'schedule.png', 'history.png', 'misclassified.png', 'top_losses.png', 'confusion_matrix.png', 'augmented.png',
         'checkpoint.pth', 'model.pth', 'report.md', 'classes.csv'}
METRICS = {'parameters', 'lr_min', 'lr_max', 'epochs', 'batch_size', 'seed', 'precision', 'device', 'train_accuracy',
           'test_accuracy', 'test_loss', 'first_epoch_over_90', 'seconds_training', 'seconds_total', 'train_images',
           'test_images', 'classes', 'fingerprint', 'versions', 'options'}


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
    """A run as a user starts it, with the whole network and the finder: its folder and what it printed."""
    out = tmp_path_factory.mktemp('runs')/'finder'
    done = run_program('--data', folder, '--out', out, '--epochs', 3, '--bs', 6, script=ROOT/'train_fastai.py')
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """A run that nothing disturbed, with the options that the disturbed ones have."""
    out = tmp_path_factory.mktemp('runs')/'whole'
    start(folder, out)
    return out


@pytest.fixture
def no_pictures(monkeypatch): monkeypatch.setattr(train_fastai, 'save_figure', lambda *_: None)


def run_program(*args, **kwargs): return subprocess.run(command(*args, **kwargs), capture_output=True, text=True)


def start(folder, out): main(data=str(folder), out=str(out), epochs=6, bs=8, lr_min=1e-4, lr_max=1e-3)


class TestRunFolder:
    def test_holds_every_file_and_no_other(self, run): assert {f.name for f in run[0].iterdir()} == FILES

    def test_metrics(self, run, folder):
        out, _, _ = run
        m = json.loads((out/'metrics.json').read_text())
        assert set(m) == METRICS
        last = pd.read_csv(out/'history.csv').iloc[-1]
        assert [m[k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')] == pytest.approx(
            [last[k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')])
        assert m['parameters'] == sum(p.numel() for p in ResNet(n_out=3).parameters())
        assert (m['epochs'], m['batch_size'], m['seed']) == (3, 6, 42)
        assert (m['train_images'], m['test_images']) == (24, 12)
        assert 0 < m['lr_min'] < m['lr_max']
        assert 0 < m['seconds_training'] < m['seconds_total']
        assert torch.__version__.startswith(m['versions']['torch'])
        assert m['options']['data'] == str(folder)
        assert m['options']['lr_min'] is None
        over = [i for i, a in enumerate(pd.read_csv(out/'history.csv').test_accuracy, 1) if a > 0.9]
        assert m['first_epoch_over_90'] == (over[0] if over else None)

    def test_tables(self, run):
        out, _, _ = run
        history = pd.read_csv(out/'history.csv')
        assert list(history) == ['epoch', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy', 'seconds']
        assert list(history.epoch) == [1, 2, 3]
        schedule = pd.read_csv(out/'schedule.csv')
        assert list(schedule) == ['batch', 'lr', 'momentum']
        assert list(schedule.batch) == list(range(1, 13))
        finder = pd.read_csv(out/'lr_find.csv')
        assert list(finder) == ['lr', 'loss']
        assert finder.lr[0] == pytest.approx(1e-7)
        assert finder.lr.is_monotonic_increasing
        m = json.loads((out/'metrics.json').read_text())
        assert list(schedule.lr) == pytest.approx([one_cycle(i, 12, m['lr_min'], m['lr_max']) for i in range(12)])
        assert finder.lr.min() < m['lr_min'] < m['lr_max'] < finder.lr.max()
        classes = pd.read_csv(out/'classes.csv')
        assert list(classes) == ['class', 'images', 'recall', 'precision']
        assert (classes.recall * classes.images).sum() / 12 == pytest.approx(m['test_accuracy'])
        wrong = pd.read_csv(out/'misclassified.csv')
        assert list(wrong) == ['file', 'actual', 'predicted', 'probability', 'loss']
        assert len(wrong) == round(12 * (1 - m['test_accuracy']))
        assert wrong.loss.is_monotonic_decreasing

    def test_figures_show_something(self, run):
        for file in run[0].glob('*.png'):
            image = Image.open(file)
            assert min(image.size) >= 400, file
            assert len(image.convert('RGB').getcolors(10**6)) > 20, file

    def test_report_shows_every_figure_and_the_numbers(self, run):
        out, _, _ = run
        text = (out/'report.md').read_text()
        links = re.findall(r'\]\((.*?)\)', text)
        assert {f.name for f in out.glob('*.png')} <= set(links)
        assert all((out/link).exists() for link in links)
        m = json.loads((out/'metrics.json').read_text())
        for part in (f'{m["parameters"]:,}', f'{m["test_accuracy"]:.2%}', '6,573,130', '98.60%', '93.07%', '19'):
            assert part in text

    def test_weights_are_a_plain_state_dict_that_gives_the_recorded_accuracy(self, run, folder):
        out, _, _ = run
        net = ResNet(n_out=3)
        net.load_state_dict(torch.load(out/'model.pth', weights_only=True))
        net.eval()
        right = sum((net(x.as_subclass(torch.Tensor)).argmax(1) == y).sum() for x, y in get_dls(folder, bs=6).valid)
        assert right.item() / 12 == pytest.approx(json.loads((out/'metrics.json').read_text())['test_accuracy'])

    def test_what_the_figures_show_is_printed(self, run):
        out, printed, errors = run
        m = json.loads((out/'metrics.json').read_text())
        for part in (f'LRMIN {m["lr_min"]:.2e}', f'LRMAX {m["lr_max"]:.2e}', f'{m["parameters"]:,} parameters',
                     f'test accuracy {m["test_accuracy"]:.2%}', f'training accuracy {m["train_accuracy"]:.2%}',
                     str(out), '24 training and 12 test images', 'first epoch over 90 %'):
            assert part in printed
        table = [line.split() for line in printed.splitlines() if re.match(r'\d+ +[\d.]+ ', line)]
        for line, row in zip(table, pd.read_csv(out/'history.csv').to_dict('records'), strict=True):
            assert [float(o) for o in line[:5]] == pytest.approx(list(row.values())[:5], abs=1e-6)
        assert '\r' not in printed
        assert errors == ''

    def test_only_its_folder_was_written(self, run, folder):
        assert len(list(folder.rglob('*'))) == 36 + 6 + 2


class BatchLosses(Callback):
    """The loss of every training batch."""
    def __init__(self): self.batches = []

    def after_loss(self):
        if self.training: self.batches.append(self.loss.item())


def test_a_real_slice_is_learned_and_the_fast_step_follows_the_plain_one(cifar10, tmp_path):
    """Three classes, 36 batches: in the processor's own precision, and in float32 with fastai's Adam; chance is 1/3."""
    for split, n in (('train', 128), ('test', 50)):
        for name in ('automobile', 'frog', 'ship'):
            (tmp_path/'slice'/split/name).mkdir(parents=True)
            for file in sorted((cifar10/split/name).iterdir())[:n]:
                (tmp_path/'slice'/split/name/file.name).symlink_to(file)
    dls = get_dls(tmp_path/'slice', bs=32)
    fast = get_learner(dls, path=tmp_path, wd=0.01, label_smoothing=0, ema=0, width=32)
    plain = Learner(dls, ResNet(n_out=3, width=32), opt_func=partial(Adam, sqr_mom=0.99, eps=1e-5), metrics=accuracy,
                    cbs=[SeedEpochs(42), History()], path=tmp_path)
    plain.fitting = True
    plain.model.load_state_dict(fast.model.state_dict())
    losses, accuracies = [], []
    for learn in (fast, plain):
        learn.fit_one_cycle(3, 1e-3, div=10, div_final=10, pct_start=5/24, cbs=(spy := BatchLosses()))
        losses.append(torch.tensor(spy.batches))
        accuracies.append(learn.validate()[-1])
    # Four seeds kept to these bounds; in accuracy, of 150 images, they differed by up to 0.10.
    assert (losses[0] - losses[1])[:3].abs().max() < 0.025
    by_epoch = [o.view(3, 12).mean(1) for o in losses]
    assert (by_epoch[0] - by_epoch[1]).abs().max() < 0.15
    assert by_epoch[0][2] < 0.5 < by_epoch[0][0]
    assert accuracies[0] > max(0.65, accuracies[1] - 0.15)


def test_plain_fastai_from_here_on(folder, tmp_path):
    """What the README promises of a learner."""
    learn = get_learner(get_dls(folder, bs=8), precision='fp32', path=tmp_path)
    learn.fit_one_cycle(1, 1e-3)
    file = learn.dls.valid_ds.items[0]
    name, index, probabilities = learn.predict(file)
    assert learn.dls.vocab[index] == name
    assert probabilities.sum().item() == pytest.approx(1)
    preds, targets = learn.get_preds()
    assert preds.shape == (12, 3)
    torch.testing.assert_close(preds[0], probabilities)
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_top_losses(9)
    assert interp.confusion_matrix().sum() == 12
    learn.show_results()
    learn.export()
    with pytest.warns(UserWarning, match='insecure pickle'): again = load_learner(tmp_path/'export.pkl')
    torch.testing.assert_close(again.predict(file)[2], probabilities)


OPTIONS = dict(epochs=24, bs=512, seed=42, lr_min=None, lr_max=None, final_div=1, wd=0.1, label_smoothing=0.1, ema=0.99,
               precision='auto')
BAD_OPTIONS = [
    (dict(epochs=0), '--epochs 0'), (dict(epochs=-3), '--epochs -3'), (dict(bs=0), '--bs 0'),
    (dict(seed=-1), '--seed -1'), (dict(seed=2**32), '--seed'), (dict(lr_min=1e-3), 'go together'),
    (dict(lr_max=1e-3), 'go together'), (dict(lr_min=1e-2, lr_max=1e-3), '0 < LRMIN < LRMAX'),
    (dict(lr_min=1e-3, lr_max=1e-3), '0 < LRMIN'), (dict(lr_min=0., lr_max=1e-3), '0 < LRMIN'),
    (dict(lr_min=1e-3, lr_max=math.inf), '0 < LRMIN'), (dict(lr_min=math.nan, lr_max=1e-3), '0 < LRMIN'),
    (dict(final_div=0), '--final-div 0'), (dict(final_div=-1), '--final-div -1'),
    (dict(final_div=math.inf), '--final-div'), (dict(final_div=math.nan), '--final-div'),
    (dict(wd=-1), '--wd -1'), (dict(wd=math.inf), '--wd inf'), (dict(wd=math.nan), '--wd nan'),
    (dict(label_smoothing=1), '--label-smoothing 1'), (dict(label_smoothing=-0.1), '--label-smoothing -0.1'),
    (dict(precision='int8'), '--precision int8 is not one of'), (dict(ema=1), '--ema 1'),
    (dict(ema=-0.1), '--ema -0.1'), (dict(ema=math.nan), '--ema nan'),
]


@pytest.mark.parametrize(('change', 'message'), BAD_OPTIONS, ids=lambda o: ' '.join(o) if isinstance(o, dict) else '')
def test_options_out_of_range(change, message):
    check_options(**OPTIONS)
    with pytest.raises(InputError) as e: check_options(**OPTIONS | change)
    assert message in str(e.value)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(epochs=0), '--epochs 0'),
    (dict(precision='fp16'), '--precision fp16 needs a CUDA GPU'),
    (dict(bs=25), 'fewer than one batch of 25'),
    (dict(data='nowhere'), 'data folder nowhere does not exist'),
    (dict(resume='nowhere', bs=512), 'nowhere cannot be used for a run (No such file'),
    (dict(data=''), '--data is empty'),
    (dict(resume='.', bs=512), 'checkpoint.pth does not exist; start a run without --resume'),
    (dict(resume='.'), '--bs: --resume takes --data and no other option'),
], ids=str)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(defaults, 'use_cuda', False)
    monkeypatch.chdir(tmp_path)
    assert message in ends(capsys, 2, main, **dict(data=str(folder), bs=8) | options)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_costs_a_line_and_no_result(folder, tmp_path, capsys, monkeypatch):
    def fail(*_): raise ValueError('no picture')
    for name in ('augmented', 'history', 'misclassified', 'top_losses'): monkeypatch.setattr(figures, name, fail)
    start(folder, tmp_path/'out')
    err = capsys.readouterr().err
    assert err.count('was not written: no picture\n') == err.count('\n') == 4
    assert {f.name for f in (tmp_path/'out').iterdir()} == FILES - {
        'lr_find.csv', 'lr_find.png', 'augmented.png', 'history.png', 'misclassified.png', 'top_losses.png'}


def test_a_run_that_only_lacks_its_pictures_is_finished(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(figures, 'misclassified', interrupt)
    assert f'resume it with: python train_fastai.py --resume {out}' in ends(capsys, 130, start, folder=folder, out=out)
    assert (out/'model.pth').exists()
    monkeypatch.undo()
    main(resume=out)
    assert differences(whole, out) == []
    assert {f.name for f in out.iterdir()} == FILES - {'lr_find.csv', 'lr_find.png'}


@pytest.mark.usefixtures('no_pictures')
def test_a_table_that_cannot_be_written_costs_a_line_and_no_checkpoint(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    disturbed(monkeypatch, lambda: ((out/'history.csv').unlink(), (out/'history.csv').mkdir()))
    start(folder, out)
    assert 'history.csv was not written' in capsys.readouterr().err
    assert load_state(out/'checkpoint.pth')['epochs_done'] == 6
    assert (out/'model.pth').exists()


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize(('error', 'message'), [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate\n2 GiB'), 'out of memory; try a smaller --bs'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 'try a smaller --bs'),
    (RuntimeError('CUDA error: no kernel image is available for execution on the device'), 'the device failed: CUDA')])
@pytest.mark.parametrize('given', [{}, dict(lr_min=1e-4, lr_max=1e-3)], ids=['finder', 'rates'])
def test_trouble_of_the_device_is_one_line(folder, tmp_path, capsys, monkeypatch, error, message, given):
    def fail(*_): raise error
    monkeypatch.setattr(ResNet, 'forward', fail)
    line = ends(capsys, 1, main, data=folder, out=tmp_path/'out', bs=8, **given)
    assert message in line
    assert '--lr-min' not in line


def test_bad_input_on_the_command_line(tmp_path):
    """A default that is given counts as given."""
    done = run_program('--resume', tmp_path/'out', '--bs', 512)
    assert done.returncode == 2
    assert done.stderr == 'train_fastai.py: error: --bs: --resume takes --data and no other option\n'
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, run, tmp_path, capsys):
    before = {f: f.stat().st_mtime_ns for f in run[0].iterdir()}
    assert 'already holds a run' in ends(capsys, 2, main, data=str(folder), out=str(run[0]), bs=8)
    assert {f: f.stat().st_mtime_ns for f in run[0].iterdir()} == before
    (tmp_path/'file').touch()
    assert 'is a file' in ends(capsys, 2, main, data=str(folder), out=str(tmp_path/'file'), bs=8)


def test_a_folder_in_use_is_refused(folder, tmp_path, capsys):
    with locked(tmp_path):
        assert 'in use by another run' in ends(capsys, 2, start, folder=folder, out=tmp_path)
        assert 'in use by another run' in ends(capsys, 2, main, resume=tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_record(folder, tmp_path, capsys):
    out = tmp_path/'out'
    message = ends(capsys, 1, main, data=str(folder), out=str(out), bs=8, epochs=6, lr_min=1e-3, lr_max=1e25)
    epoch = int(re.search(r'not finite at (?:batch \d of 3|the test after) (?:of )?epoch (\d)', message)[1])
    assert '--lr-max' in message
    assert len(pd.read_csv(out/'history.csv')) == epoch - 1
    assert (out/'schedule.png').exists()
    assert not (out/'model.pth').exists()


class Disturb(Callback):
    """Calls `act` before batch 2 of epoch 4."""
    def __init__(self, act): self.act = act

    def before_batch(self):
        if self.training and self.epoch == 3 and self.iter == 1: self.act()


def disturbed(monkeypatch, act):
    """Makes the next run call `act` in the middle of an epoch."""
    def get(*args, **kwargs):
        monkeypatch.undo()
        return get_learner(*args, **kwargs).add_cb(Disturb(act))
    monkeypatch.setattr(train_fastai, 'get_learner', get)


def test_ctrl_c_and_resume_end_like_the_run_that_was_left_alone(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    disturbed(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    message = ends(capsys, 130, start, folder=folder, out=out)
    assert f'--resume {out}' in message
    assert len(pd.read_csv(out/'history.csv')) == 3
    assert (out/'history.png').exists()
    assert not (out/'model.pth').exists()
    assert '--out: --resume takes' in ends(capsys, 2, main, resume=str(out), out=str(tmp_path/'elsewhere'))
    assert '--epochs: --resume takes' in ends(capsys, 2, main, resume=str(out), epochs=7)
    other = make_folder(tmp_path/'other', seed=1)
    assert 'the images are not those that the run' in ends(capsys, 2, main, resume=str(out), data=str(other))
    main(resume=str(out))
    assert differences(whole, out) == []
    assert 'this run is finished' in ends(capsys, 2, main, resume=str(out))


@pytest.mark.usefixtures('no_pictures')
def test_resume_from_elsewhere(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    with monkeypatch.context() as m:
        m.chdir(folder.parent)
        disturbed(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
        ends(capsys, 130, start, folder=folder.name, out=out)
    main(resume=out)
    assert differences(whole, out) == []


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize(('error', 'code'), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, 'disk full'), 1)])
def test_a_run_that_only_lacks_its_results_is_finished(folder, whole, tmp_path, capsys, monkeypatch, error, code):
    out = tmp_path/'out'
    def die(*_): raise error
    monkeypatch.setattr(train_fastai, 'misclassified', die)
    assert f'resume it with: python train_fastai.py --resume {out}' in ends(capsys, code, start, folder=folder, out=out)
    monkeypatch.undo()
    main(resume=str(out))
    assert differences(whole, out) == []


def test_an_interrupted_finder_leaves_nothing_that_stands_in_the_way(folder, tmp_path, capsys, monkeypatch):
    class Interrupt(Callback):
        def before_batch(self):
            if hasattr(self, 'lr_finder') and self.iter == 1: signal.raise_signal(signal.SIGINT)
    out = tmp_path/'out'
    options = dict(data=folder, out=out, epochs=1, bs=6)
    monkeypatch.setattr(train_fastai, 'get_learner', lambda *a, **k: get_learner(*a, **k).add_cb(Interrupt()))
    assert 'interrupted; nothing was trained yet' in ends(capsys, 130, main, **options)
    monkeypatch.undo()
    main(**options)
    assert {f.name for f in out.iterdir()} == FILES


def test_an_interruption_while_images_are_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_fastai, 'get_dls', lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert 'interrupted; nothing was trained yet' in ends(capsys, 130, start, folder=folder, out=tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_sigterm(folder, whole, tmp_path):
    out = tmp_path/'out'
    process = subprocess.Popen(command(*run_options(folder, out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if line.startswith('1 '): break
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143
    assert err == f'train_fastai.py: interrupted; resume it with: python train_fastai.py --resume {out}\n'
    main(resume=str(out))
    assert differences(whole, out) == []


def test_kills_at_random_moments(folder, whole, tmp_path):
    print('seed', seed := random.randrange(10**6))
    assert kill_runs(folder, whole, tmp_path, 2, random.Random(seed)) == []


def full_disk(out): (out/'checkpoint.pth.part').symlink_to('/dev/full')
def read_only_folder(out): out.chmod(0o555)


@pytest.mark.parametrize(('fault', 'message'), [
    pytest.param(full_disk, 'checkpoint.pth: No space left on device', marks=pytest.mark.skipif(
        not Path('/dev/full').exists(), reason='this system has no device that is always full')),
    (read_only_folder, 'Permission denied')])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(folder, whole, tmp_path, capsys, monkeypatch,
                                                                permissions_bind, fault, message):
    out = tmp_path/'out'
    disturbed(monkeypatch, lambda: fault(out))
    line = ends(capsys, 1, start, folder=folder, out=out)
    assert message in line
    assert f'--resume {out}' in line
    out.chmod(0o755)
    main(resume=str(out))
    assert differences(whole, out) == []
    assert {f.name for f in out.iterdir()} == FILES - {'lr_find.csv', 'lr_find.png'}


def test_an_out_folder_that_cannot_be_written(folder, tmp_path, capsys, permissions_bind):
    (tmp_path/'closed').mkdir(mode=0o555)
    for out in ('closed', 'closed/in it'):
        assert str(tmp_path/out) in ends(capsys, 2, start, folder=folder, out=tmp_path/out)
    assert not list((tmp_path/'closed').iterdir())


@pytest.mark.usefixtures('no_pictures')
def test_a_damaged_or_foreign_checkpoint_is_named(folder, whole, tmp_path, capsys):
    file = tmp_path/'checkpoint.pth'
    content = (whole/'checkpoint.pth').read_bytes()
    file.write_bytes(content[:len(content) // 2])
    assert 'checkpoint.pth is damaged' in ends(capsys, 2, main, resume=str(tmp_path))
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    file.write_bytes(flipped)
    assert 'checkpoint.pth is damaged' in ends(capsys, 2, main, resume=str(tmp_path))
    for other in (dict(a=1), dict(epochs_done=1), torch.ones(2)):
        torch.save(other, file)
        assert 'is not of this program' in ends(capsys, 2, main, resume=str(tmp_path))
    state = torch.load(whole/'checkpoint.pth', weights_only=True)
    del state['options']['ema']
    torch.save(state, file)
    assert 'the run is of another version of this program' in ends(capsys, 2, main, resume=str(tmp_path))
    torch.save(dict(a=Path), file)
    assert 'holds more than weights' in ends(capsys, 2, main, resume=str(tmp_path))


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """A source of CIFAR-10 on this machine; its `send` makes the answer of an archive of 36 images."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.send(archive)
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): pass
    (tmp_path/'cifar10').symlink_to(folder)
    archive = Path(shutil.make_archive(tmp_path/'archive', 'gztar', folder.parent, folder.name)).read_bytes()
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    server.send = lambda archive: archive
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(URLs, 'CIFAR', f'http://127.0.0.1:{server.server_port}/cifar10.tgz')
    monkeypatch.setattr(data, 'CIFAR_IMAGES', 36)
    fastai_cfg.cache_clear()  # which would keep the true home
    yield server
    fastai_cfg.cache_clear()
    server.shutdown()
    server.server_close()


def breaks_off(archive): return archive[:len(archive) // 2]
def is_no_archive(archive): return b'<html>'.ljust(len(archive))


@pytest.mark.parametrize('fault', [breaks_off, is_no_archive])
def test_a_download_that_fails_is_one_line_and_leaves_nothing_that_stands_in_the_way(server, tmp_path, capsys, fault):
    whole, server.send = server.send, fault
    for _ in range(2):
        assert 'CIFAR-10 could not be downloaded' in ends(capsys, 2, main, out=tmp_path/'out')
        assert not (tmp_path/'home/data/cifar10').exists()
        assert not (tmp_path/'out').exists()
    server.send = whole
    assert len(list(get_data().rglob('*.png'))) == 36


def test_no_network_is_one_line(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    assert 'check network and disk, or pass a folder' in ends(capsys, 2, main, out=tmp_path/'out')


def test_half_a_data_set_is_not_taken_for_the_whole(server, tmp_path, capsys):
    """Python unpacks what there is of an archive whose rest is lost."""
    whole, server.send = server.send, lambda archive: archive[:len(archive) // 2].ljust(len(archive), b'\0')
    for _ in range(2):
        message = ends(capsys, 2, main, out=tmp_path/'out')
        home = tmp_path/'home'
        found = re.match(r'error: (.*) holds (\d+) of the 36 images of CIFAR-10; remove it, and (.*) if', message)
        assert found.groups() == (f'{home}/data/cifar10', found[2], f'{home}/archive/cifar10.tgz')
        assert 0 < int(found[2]) < 36
    shutil.rmtree(found[1])
    Path(found[3]).unlink()
    server.send = whole
    assert len(list(get_data().rglob('*.png'))) == 36


def test_paths_from_python_a_dollar_sign_and_a_models_folder(tmp_path):
    path = make_folder(tmp_path/'d')
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'$\\a_{$')
    out = tmp_path/'out'
    (out/'models/rest').mkdir(parents=True)
    main(data=path, out=out, bs=6, epochs=1)
    assert (out/'model.pth').exists()
    assert (out/'models/rest').exists()
    assert f'python train_fastai.py --data {path} --epochs 1 --bs 6\n' in (out/'report.md').read_text()


def test_a_taste_is_short_whatever_else_is_said_and_can_be_done_again(tmp_path, capsys, monkeypatch):
    path, out = make_folder(tmp_path/'d', train=41, test=11), tmp_path/'out'
    assert 'has 15 training images, taking one in 10, fewer than one batch of 64' in ends(
        capsys, 2, main, data=path, out=out, taste=True)
    main(data=path, out=out, taste=True, bs=4, lr_min=1e-4, lr_max=1e-3)
    printed = capsys.readouterr().out
    assert 'A taste' in printed
    assert '--epochs 24 is lowered to 4\n' in printed
    m = json.loads((out/'metrics.json').read_text())
    assert (m['epochs'], m['batch_size'], m['train_images'], m['test_images']) == (4, 4, 15, 6)
    disturbed(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    again = dict(taste=True, epochs=9, bs=4, lr_min=1e-4, lr_max=1e-3)
    ends(capsys, 130, main, data=path, out=tmp_path/'other', **again)
    main(resume=tmp_path/'other')
    assert differences(out, tmp_path/'other') == []
    assert f'--data {path} --epochs 4 --bs 4 --lr-min 0.0001 --lr-max 0.001 --taste\n' in (out/'report.md').read_text()


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='cannot see when a process begins to catch signals')
@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_while_modules_are_imported(number, code):
    process = subprocess.Popen(command('--help'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def caught(): return int(re.search(r'SigCgt:\t(\w+)', Path(f'/proc/{process.pid}/status').read_text())[1], 16)
    while process.poll() is None and not caught() >> (signal.SIGTERM - 1) & 1: time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate() == ('', 'train_fastai.py: interrupted\n')
    assert process.returncode == code


def test_environment_yml_installs_the_same_requirements():
    import yaml
    environment = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d['pip'] for d in environment['dependencies'] if isinstance(d, dict))
    assert pip == ['-r requirements.txt']
    assert 'python=3.11' in environment['dependencies']
    lines = [line for line in (ROOT/'requirements.txt').read_text().splitlines() if line and not line.startswith('#')]
    assert all(re.fullmatch(r'[\w-]+==[\d.]+', line) for line in lines)
    assert {'torch==2.14.1', 'torchvision==0.29.1', 'fastai==2.8.12'} <= set(lines)
