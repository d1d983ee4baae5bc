import json
import math
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, end, ends, ends_unforeseen, make_folder, one_cycle
from fastai.vision.all import (
    Adam,
    Callback,
    ClassificationInterpretation,
    Learner,
    Pipeline,
    TensorImage,
    accuracy,
    cifar_stats,
    defaults,
    load_learner,
    ranger,
    set_seed,
)
from kill import command, differences, kill_runs, run_options
from PIL import Image
from torch import nn

import predict
import train_fastai
from arch import ResNet
from callbacks import History, SeedEpochs
from lab import figures, results
from lab.errors import InputError, WriteError
from lab.learner import TorchOptimizer
from lab.loader import BatchDL
from lab.runs import Run, check_options, load_state, locked
from predict import load_run
from train_fastai import MEAN_COLOUR, Cutout, FlipLR, Options, PadCrop, get_dls, get_learner, main

FILES = {'metrics.json', 'history.csv', 'schedule.csv', 'lr_find.csv', 'misclassified.csv', 'lr_find.png',
         'schedule.png', 'history.png', 'misclassified.png', 'top_losses.png', 'confusion_matrix.png', 'augmented.png',
         'checkpoint.pth', 'model.pth', 'report.md', 'classes.csv', 'errors.html'}
METRICS = {'quick_look', 'parameters', 'lr_min', 'lr_max', 'epochs', 'batch_size', 'seed', 'precision', 'device',
           'train_accuracy', 'test_accuracy', 'test_loss', 'first_epoch_over_90', 'seconds_training', 'seconds_total',
           'train_images', 'test_images', 'classes', 'fingerprint', 'versions', 'recipe', 'options'}
N = 400
GREY = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None]


@pytest.fixture
def batch():
    """Random images without a pixel of the mean colour."""
    torch.manual_seed(1)
    x = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8)
    x[:, 0][x[:, 0] == MEAN_COLOUR[0]] += 1
    return TensorImage(x)


def is_grey(x): return (x == GREY).all(dim=-3)


def test_mean_colour_is_zero_once_normalised():
    for colour, mean, std in zip(MEAN_COLOUR, *cifar_stats, strict=True):
        assert abs(colour / 255 - mean) / std <= 0.5 / 255 / std


def test_pad_crop_shifts_by_up_to_four_and_pads_with_a_reflection(batch):
    out = PadCrop(4)(batch, split_idx=0)
    assert (out.shape, out.dtype, type(out)) == (batch.shape, torch.uint8, TensorImage)
    places = [4, 3, 2, 1, *range(32), 30, 29, 28, 27]
    padded = batch[:, :, places][:, :, :, places]
    shifts = set()
    for img, whole in zip(out, padded, strict=True):
        found = [(i, j) for i in range(9) for j in range(9) if (whole[:, i:i+32, j:j+32] == img).all()]
        assert len(found) == 1
        shifts.update(found)
    assert {i for i, _ in shifts} == {j for _, j in shifts} == set(range(9))
    assert len(shifts) > 70  # of 81: each image draws its own


def test_flip_mirrors_about_half_of_a_batch_and_nothing_else(batch):
    out = FlipLR()(batch, split_idx=0)
    flipped = (out == batch.flip(-1)).flatten(1).all(1)
    assert (flipped | (out == batch).flatten(1).all(1)).all()
    assert 0.4 * N < flipped.sum() < 0.6 * N  # 4 standard deviations


def test_cutout_covers_one_8x8_square_inside_the_image(batch):
    before = batch.clone()
    out = Cutout(8)(batch, split_idx=0)
    assert (batch == before).all(), 'changed its input'
    corners = set()
    for hole, img, old in zip(is_grey(out), out, before, strict=True):
        rows, cols = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert len(rows) == len(cols) == 8
        assert hole.sum() == 64
        assert (img == old)[:, ~hole].all()
        corners.add((rows[0].item(), cols[0].item()))
    assert {i for i, _ in corners} == {j for _, j in corners} == set(range(25))


@pytest.mark.parametrize('tfm', [PadCrop(4), FlipLR(), Cutout(8)], ids=lambda t: type(t).__name__)
class TestEachTransform:
    def test_leaves_test_images_alone(self, tfm, batch):
        assert (tfm(batch, split_idx=1) == batch).all()

    def test_image_and_batch_forms_agree(self, tfm, batch):
        one = batch[:1]
        for seed in range(20):
            torch.manual_seed(seed)
            as_batch = tfm(one, split_idx=0)[0]
            torch.manual_seed(seed)
            as_image = tfm(one[0], split_idx=0)
            assert type(as_image) is TensorImage
            assert (as_image == as_batch).all()

    def test_draws_anew_for_each_image(self, tfm, batch):
        same = TensorImage(batch[:1].repeat(64, 1, 1, 1))
        assert len({img.numpy().tobytes() for img in tfm(same, split_idx=0)}) > 1


def test_transforms_come_in_the_assignments_order():
    assert [type(t) for t in Pipeline([Cutout(), FlipLR(), PadCrop()]).fs] == [PadCrop, FlipLR, Cutout]


@pytest.mark.parametrize('stock', [False, True])
def test_loaders(folder, stock):
    dls = get_dls(folder, bs=8, num_workers=0 if stock else None)
    assert isinstance(dls.train, BatchDL) != stock
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (24, 12, 3, 2)
    assert list(dls.vocab) == ['blue', 'green', 'red']
    x, y = dls.train.one_batch()
    assert (x.shape, x.dtype, y.shape) == ((8, 3, 32, 32), torch.float32, (8,))
    means = torch.tensor(cifar_stats[0])[:, None, None], torch.tensor(cifar_stats[1])[:, None, None]
    seen = []
    for x, y in dls.valid:  # test images: as in the files, normalised, in order, none left out
        for img, label in zip(x, y, strict=True):
            file = dls.valid_ds.items[len(seen)]
            pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
            torch.testing.assert_close(img.as_subclass(torch.Tensor), (pixels - means[0]) / means[1])
            assert dls.vocab[label] == file.parent.name
            seen.append(file)
    assert seen == list(dls.valid_ds.items) == sorted(seen)


@pytest.mark.parametrize('stock', [False, True])
def test_training_images_are_each_padded_cropped_flipped_and_cut_and_test_images_are_not(tmp_path, stock):
    """On images whose red tells the column and whose green the row that a pixel came from."""
    path = make_folder(tmp_path/'d')
    place = np.arange(32, dtype='uint8') * 4
    image = np.stack(np.broadcast_arrays(place, place[:, None], np.uint8(250)), -1)
    for file in path.rglob('*.png'): Image.fromarray(image).save(file)
    torch.manual_seed(0)
    dls = get_dls(path, bs=8, num_workers=0 if stock else None)
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)

    def pixels(batch): return ((batch[0].as_subclass(torch.Tensor) * std + mean) * 255).round().int()

    for batch in dls.valid: assert (pixels(batch) == torch.from_numpy(image).permute(2, 0, 1)).all()
    i, j = torch.meshgrid(torch.arange(32), torch.arange(32), indexing='ij')
    seen = []
    for img in [img for _ in range(5) for batch in dls.train for img in pixels(batch)]:
        covered = img[2] != 250
        inside = ~covered & (i >= 4) & (i < 28) & (j >= 4) & (j < 28)  # never padding
        column, row = img[0, inside] // 4, img[1, inside] // 4
        flipped = (column - j[inside]).unique().numel() > 1
        dx = (column + j[inside] - 31 if flipped else column - j[inside]).unique()
        dy = (row - i[inside]).unique()
        assert len(dx) == len(dy) == 1
        dx, dy = dx.item(), dy.item()
        x, y = (31 - j if flipped else j) + dx, i + dy
        x, y = (31 - (31 - o.abs()).abs() for o in (x, y))  # reflected at the border
        assert (img[0] == 4 * x)[~covered].all()
        assert (img[1] == 4 * y)[~covered].all()
        seen.append((dx, dy, flipped, covered.sum().item()))
    dxs, dys, flips, holes = zip(*seen, strict=True)
    assert set(dxs) == set(dys) == set(range(-4, 5))
    assert 40 < sum(flips) < 80  # of 120
    assert set(holes) == {64}
    for k in (0, 1, 2): assert any(len({o[k] for o in seen[b:b + 8]}) > 1 for b in range(0, 120, 8)), 'one a batch'


def test_both_loaders_show_the_same_distribution(tmp_path):
    make_folder(tmp_path/'d', train=64, test=1)
    moments = []
    for stock in (False, True):
        torch.manual_seed(0)
        dls = get_dls(tmp_path/'d', bs=64, num_workers=0 if stock else None)
        grey, total = torch.zeros(32, 32), 0.
        for _ in range(4):
            for x, _ in dls.train:
                x = x.as_subclass(torch.Tensor)
                grey += (x.abs() < 0.01).all(1).sum(0)
                total += x.mean((0, 2, 3))
        moments.append((grey / (4 * 192), total / (4 * 3)))
    # How often a pixel is in the hole, by place (binomial, 768 draws), and the mean colour
    assert (moments[0][0] - moments[1][0]).abs().max() < 5.5 * (2 * 0.25 / 768) ** 0.5
    assert (moments[0][0].mean() - moments[1][0].mean()).abs() < 0.01
    assert (moments[0][1] - moments[1][1]).abs().max() < 0.05


def test_fewer_training_images_than_a_batch(folder):
    with pytest.raises(InputError, match='24 training images, fewer than one batch of 25'): get_dls(folder, bs=25)


def test_the_defaults_are_the_recipes(dls, tmp_path):
    learn = get_learner(dls, path=tmp_path)
    learn.fit(0)  # sets the weight decay
    decayed, plain = learn.opt.opt.param_groups
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0)
    assert {(g['eps'], g['betas']) for g in (decayed, plain)} == {(1e-5, (0.95, 0.99))}
    assert (learn.loss_func.label_smoothing, learn.weight_average.decay) == (0.1, 0.99)


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
def no_pictures(monkeypatch): monkeypatch.setattr(Run, 'save_figure', lambda *_: None)


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
        assert m['parameters'] == 6_569_539
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
            assert image.width >= 800, file
            assert image.height >= (350 if file.name == 'misclassified.png' else 400), file  # of a single line
            assert len(image.convert('RGB').getcolors(10**6)) > 20, file

    def test_report_shows_every_figure_and_the_numbers(self, run):
        out, _, _ = run
        text = (out/'report.md').read_text()
        links = re.findall(r'\]\((.*?)\)', text)
        assert {f.name for f in out.glob('*.png')} <= set(links)
        assert all((out/link).exists() for link in links)
        m = json.loads((out/'metrics.json').read_text())
        for part in (f'{m["parameters"]:,}', f'{100 * m["test_accuracy"]:.2f} %', '6,573,130', '98.60 %', '93.07 %',
                     '19'):
            assert part in text

    def test_weights_are_a_plain_state_dict_that_gives_the_recorded_accuracy(self, run, folder):
        out, _, _ = run
        net = ResNet(n_out=3, width=64)
        weights = torch.load(out/'model.pth', weights_only=True)
        assert all(w.is_contiguous() for w in weights.values())
        net.load_state_dict(weights)
        net.eval()
        right = sum((net(x.as_subclass(torch.Tensor)).argmax(1) == y).sum() for x, y in get_dls(folder, bs=6).valid)
        assert right.item() / 12 == pytest.approx(json.loads((out/'metrics.json').read_text())['test_accuracy'])

    def test_what_the_figures_show_is_printed(self, run):
        out, printed, errors = run
        m = json.loads((out/'metrics.json').read_text())
        for part in (f'LRMIN {m["lr_min"]:.2e}', f'LRMAX {m["lr_max"]:.2e}', f'{m["parameters"]:,} parameters',
                     f'test accuracy {100 * m["test_accuracy"]:.2f} %',
                     f'training accuracy {100 * m["train_accuracy"]:.2f} %',
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


def test_a_real_slice_is_learned_and_the_fast_step_follows_the_plain_one(sample, tmp_path):
    """Three classes, 54 batches: in the processor's own precision, and in float32 with fastai's Adam; chance is 1/3."""
    for split, n in (('train', 192), ('test', 50)):
        for name in ('automobile', 'frog', 'ship'):
            (tmp_path/'slice'/split/name).mkdir(parents=True)
            for file in sorted((sample/split/name).iterdir())[:n]:
                (tmp_path/'slice'/split/name/file.name).symlink_to(file)
    dls = get_dls(tmp_path/'slice', bs=32)
    fast = get_learner(dls, ResNet(n_out=3, width=32), path=tmp_path, wd=0.01, label_smoothing=0, ema=0)
    plain = Learner(dls, ResNet(n_out=3, width=32), opt_func=partial(Adam, sqr_mom=0.99, eps=1e-5), metrics=accuracy,
                    cbs=[SeedEpochs(42), History()], path=tmp_path)
    plain.model.load_state_dict(fast.model.state_dict())
    losses, accuracies = [], []
    for learn in (fast, plain):
        learn.fit_one_cycle(3, 1e-3, div=10, div_final=10, pct_start=5/24, cbs=(spy := BatchLosses()))
        losses.append(torch.tensor(spy.batches))
        accuracies.append(learn.validate()[-1])
    # Four seeds kept to these bounds; in accuracy, of 150 images, they differed by up to 0.05.
    assert (losses[0] - losses[1])[:3].abs().max() < 0.025
    by_epoch = [o.view(3, 18).mean(1) for o in losses]
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


BAD_OPTIONS = [
    (dict(epochs=0), '--epochs 0'), (dict(epochs=-3), '--epochs -3'), (dict(bs=0), '--bs 0'),
    (dict(seed=-1), '--seed -1'), (dict(seed=2**32), '--seed'), (dict(lr_min=1e-3), 'go together'),
    (dict(lr_max=1e-3), 'go together'), (dict(lr_min=1e-2, lr_max=1e-3), '0 < LRMIN < LRMAX'),
    (dict(lr_min=1e-3, lr_max=1e-3), '0 < LRMIN'), (dict(lr_min=0., lr_max=1e-3), '0 < LRMIN'),
    (dict(lr_min=1e-3, lr_max=math.inf), '0 < LRMIN'), (dict(lr_min=math.nan, lr_max=1e-3), '0 < LRMIN'),
    (dict(lr_end=0.), '--lr-end 0'), (dict(lr_end=-1), '--lr-end -1'),
    (dict(lr_end=math.inf), '--lr-end'), (dict(lr_end=math.nan), '--lr-end'),
    (dict(lr_min=1e-4, lr_max=1e-3, lr_end=2e-3), '--lr-end 0.002 is larger than LRMAX, 1.00e-03'),
    (dict(wd=-1), '--wd -1'), (dict(wd=math.inf), '--wd inf'), (dict(wd=math.nan), '--wd nan'),
    (dict(label_smoothing=1), '--label-smoothing 1'), (dict(label_smoothing=-0.1), '--label-smoothing -0.1'),
    (dict(precision='int8'), '--precision int8 is not one of'), (dict(ema=1), '--ema 1'),
    (dict(ema=-0.1), '--ema -0.1'), (dict(ema=math.nan), '--ema nan'),
]


@pytest.mark.parametrize(('change', 'message'), BAD_OPTIONS, ids=lambda o: ' '.join(o) if isinstance(o, dict) else '')
def test_options_out_of_range(change, message):
    check_options(Options())
    with pytest.raises(InputError) as e: check_options(Options(**change))
    assert message in str(e.value)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(epochs=0), '--epochs 0'),
    (dict(precision='fp16'), '--precision fp16 needs a CUDA GPU'),
    (dict(bs=25), 'fewer than one batch of 25'),
    (dict(data='nowhere'), 'data folder nowhere does not exist'),
    (dict(resume='nowhere'), 'nowhere cannot be used for a run (No such file'),
    (dict(data=''), '--data is empty'),
    (dict(resume='.'), 'checkpoint.pth does not exist; start a run without --resume'),
    (dict(resume='.', bs=512), '--bs: --resume takes --data and no other option'),
], ids=str)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(defaults, 'use_cuda', False)
    monkeypatch.chdir(tmp_path)
    given = dict(data=str(folder)) if 'resume' in options else dict(data=str(folder), bs=8)
    assert message in ends(capsys, 2, main, **given | options)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_costs_a_line_and_no_result(folder, tmp_path, capsys, monkeypatch):
    def fail(*_): raise ValueError('no picture')
    for name in ('augmented', 'history', 'misclassified', 'top_losses'):
        monkeypatch.setattr(figures, f'draw_{name}', fail)
    monkeypatch.setattr(results, 'write_page', fail)
    start(folder, tmp_path/'out')
    err = capsys.readouterr().err
    assert err.count('was not written: no picture\n') == err.count('\n') == 5
    assert {f.name for f in (tmp_path/'out').iterdir()} == FILES - {
        'lr_find.csv', 'lr_find.png', 'augmented.png', 'history.png', 'misclassified.png', 'top_losses.png',
        'errors.html'}


def test_a_run_that_only_lacks_its_pictures_is_finished(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(figures, 'draw_misclassified', interrupt)
    assert f'resume it with: python train_fastai.py --resume {out}' in ends(capsys, 130, start, folder=folder, out=out)
    assert not (out/'model.pth').exists()
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
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 'try a smaller --bs')])
@pytest.mark.parametrize('given', [{}, dict(lr_min=1e-4, lr_max=1e-3)], ids=['finder', 'rates'])
def test_too_little_memory_is_one_line(folder, tmp_path, capsys, monkeypatch, error, message, given):
    def fail(*_): raise error
    monkeypatch.setattr(ResNet, 'forward', fail)
    line = ends(capsys, 1, main, data=folder, out=tmp_path/'out', bs=8, **given)
    assert message in line
    assert '--lr-min' not in line


@pytest.fixture
def program(monkeypatch):
    """A function that runs train_fastai.py with arguments, as a command does, but in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['train_fastai.py', *map(str, args)])
        runpy.run_path(str(ROOT/'train_fastai.py'), run_name='__main__')
    yield run
    for number, handler in handlers.items(): signal.signal(number, handler)


@pytest.mark.parametrize('resume', ['--resume', '--resu'])
@pytest.mark.parametrize('more', [['--bs', 512], ['--bs=512'], ['--b', '512']], ids=str)
def test_bad_input_on_the_command_line(program, tmp_path, capsys, resume, more):
    """A default that is given counts as given, also where argparse completes an option's name."""
    for args in ([resume, tmp_path/'out', *more], [*more, resume, tmp_path/'out']):
        assert ends(capsys, 2, program, *args) == 'error: --bs: --resume takes --data and no other option\n'
    assert not list(tmp_path.iterdir())


def test_help_names_the_choices_of_an_option(program, capsys):
    with pytest.raises(SystemExit) as e: program('--help')
    assert e.value.code == 0
    assert '--precision {auto,fp32,bf16,fp16}' in capsys.readouterr().out
    assert "--precision: invalid choice: 'int8'" in end(capsys, 2, program, '--precision', 'int8')


@pytest.mark.usefixtures('no_pictures')
def test_a_shortened_resume_resumes(program, folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    disturbed(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    ends(capsys, 130, start, folder=folder, out=out)
    program('--resu', out, f'--dat={folder}')
    assert differences(whole, out) == []


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
    assert not (out/'.lock').exists()
    assert '--out: --resume takes' in ends(capsys, 2, main, resume=str(out), out=str(tmp_path/'elsewhere'))
    assert '--epochs: --resume takes' in ends(capsys, 2, main, resume=str(out), epochs=7)
    other = make_folder(tmp_path/'other', seed=1)
    assert 'these are not the images that the run in' in ends(capsys, 2, main, resume=str(out), data=str(other))
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
@pytest.mark.parametrize(('error', 'code'), [(KeyboardInterrupt(), 130), (WriteError('x.csv: disk full'), 1)])
def test_a_run_that_only_lacks_its_results_is_finished(folder, whole, tmp_path, capsys, monkeypatch, error, code):
    out = tmp_path/'out'
    def die(*_): raise error
    monkeypatch.setattr(results, 'save_csv', die)
    assert f'resume it with: python train_fastai.py --resume {out}' in ends(capsys, code, start, folder=folder, out=out)
    monkeypatch.undo()
    main(resume=str(out))
    assert differences(whole, out) == []


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('error', [ValueError('too many values'), OSError(28, 'No space left on device'),
                                   RuntimeError('CUDA error: an illegal memory access was encountered')], ids=repr)
def test_an_error_nobody_foresaw_shows_its_traceback_and_how_to_resume(folder, whole, tmp_path, capsys, monkeypatch,
                                                                     error):
    out = tmp_path/'out'
    def fail(self, x):
        if len(calls := calls_of_forward) == 13: raise error
        calls.append(x)
        return forward(self, x)
    forward, calls_of_forward = ResNet.forward, []
    with monkeypatch.context() as m:
        m.setattr(ResNet, 'forward', fail)
        line = ends_unforeseen(capsys, error, start, folder=folder, out=out)
    assert line.endswith(f'; once that is fixed, resume it with: python train_fastai.py --resume {out}')
    assert len(pd.read_csv(out/'history.csv')) == 2  # of five batches each
    assert not (out/'.lock').exists()
    main(resume=out)
    assert differences(whole, out) == []


@pytest.mark.usefixtures('no_pictures')
def test_a_resumed_run_whose_checkpoint_has_no_answers_tests_once_more(folder, whole, tmp_path):
    state = torch.load(whole/'checkpoint.pth', weights_only=True)
    state['callbacks']['misclassified'] = dict(log_probs=None, targets=None)
    torch.save(state, tmp_path/'checkpoint.pth')
    main(resume=tmp_path)
    ours, theirs = (pd.read_csv(out/'misclassified.csv') for out in (tmp_path, whole))
    assert ours[['file', 'actual', 'predicted']].equals(theirs[['file', 'actual', 'predicted']])
    for name in ('probability', 'loss'): assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), abs=1e-2)


@pytest.mark.usefixtures('no_pictures')
def test_the_rate_ends_at_lr_end(folder, tmp_path):
    main(data=folder, out=tmp_path/'out', epochs=4, bs=8, lr_min=1e-4, lr_max=1e-3, lr_end=1e-6)
    lrs = pd.read_csv(tmp_path/'out/schedule.csv').lr
    assert list(lrs) == pytest.approx([one_cycle(i, 12, 1e-4, 1e-3, 1e-6) for i in range(12)])


@pytest.mark.usefixtures('no_pictures')
def test_the_rate_cannot_end_above_a_peak_that_was_found(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_fastai, 'find_lrs', lambda _: (1e-4, 1e-3))
    monkeypatch.setattr(train_fastai, 'save_finder', lambda *_: None)
    line = ends(capsys, 2, main, data=folder, out=tmp_path/'out', bs=8, lr_end=2e-3)
    assert '--lr-end 0.002 is larger than LRMAX, 1.00e-03' in line


def small_network() -> nn.Module:
    """A network of somebody's own, which ends in logits."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
                         nn.Flatten(), nn.Linear(32, 3))


def ours_in_logits() -> nn.Module:
    """The network of `whole`, with the same initial weights, but for its last stage."""
    set_seed(42)
    net = ResNet(3, 3)
    net.softmax = nn.Identity()
    return net


CHANGES = dict(Adam=dict(opt_func=Adam), ranger=dict(opt_func=ranger),
               torch_SGD=dict(opt_func=partial(TorchOptimizer, opt=torch.optim.SGD, momentum=0.9)),
               torch_Adam=dict(opt_func=partial(TorchOptimizer, opt=torch.optim.Adam)),
               own_network=dict(model=small_network))


def changed(monkeypatch, changes: dict, *cbs):
    """Makes runs use a learner that somebody has changed, with these callbacks."""
    def get(*args, **kwargs):
        made = {k: v() if k == 'model' else v for k, v in changes.items()}
        return get_learner(*args, **kwargs | made).add_cbs(cbs)
    monkeypatch.setattr(train_fastai, 'get_learner', get)


@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('change', CHANGES)
def test_a_run_with_another_optimizer_or_network_resumes_like_any(folder, whole, tmp_path, capsys, monkeypatch, change):
    set_seed(0)
    changed(monkeypatch, CHANGES[change])
    start(folder, tmp_path/'undisturbed')
    assert 'model.pth' in differences(whole, tmp_path/'undisturbed')
    set_seed(0)
    changed(monkeypatch, CHANGES[change], Disturb(lambda: signal.raise_signal(signal.SIGINT)))
    ends(capsys, 130, start, folder=folder, out=tmp_path/'out')
    changed(monkeypatch, CHANGES[change])
    main(resume=tmp_path/'out')
    assert differences(tmp_path/'undisturbed', tmp_path/'out') == []


@pytest.mark.usefixtures('no_pictures')
def test_a_network_that_ends_in_logits_gives_the_same_tables(folder, tmp_path, monkeypatch):
    options = dict(data=folder, epochs=4, bs=8, lr_min=1e-4, lr_max=1e-3, precision='fp32')
    main(out=tmp_path/'ours', **options)
    changed(monkeypatch, dict(model=ours_in_logits))
    main(out=tmp_path/'theirs', **options)
    ours, theirs = (pd.read_csv(tmp_path/name/'misclassified.csv') for name in ('ours', 'theirs'))
    assert 0 < len(ours) < 12
    assert ours[['file', 'actual', 'predicted']].equals(theirs[['file', 'actual', 'predicted']])
    for name in ('probability', 'loss'): assert theirs[name].tolist() == pytest.approx(ours[name].tolist(), abs=1e-5)
    assert (tmp_path/'ours/classes.csv').read_bytes() == (tmp_path/'theirs/classes.csv').read_bytes()
    report = (tmp_path/'theirs/report.md').read_text()
    assert '| last stage | SoftMax | Identity |' in report


@pytest.mark.usefixtures('no_pictures')
def test_a_run_of_another_network_is_loaded_into_that_network(folder, tmp_path, capsys, monkeypatch):
    changed(monkeypatch, dict(model=small_network))
    start(folder, out := tmp_path/'out')
    line = f'{out}/model.pth does not hold the weights of ResNet; load_run(…, model=…) takes another network'
    with pytest.raises(InputError) as e: load_run(out)
    assert str(e.value) == line
    assert ends(capsys, 2, predict.main, str(out), str(folder/'test/red/0.png')) == f'error: {line}\n'
    learn = load_run(out, folder, model=small_network())
    m = json.loads((out/'metrics.json').read_text())
    assert list(learn.validate()) == pytest.approx([m['test_loss'], m['test_accuracy']], abs=1e-2)
    assert load_run(out, model=small_network()).predict(folder/'test/red/0.png')[0] in ('blue', 'green', 'red')
    with pytest.raises(InputError, match='does not hold the weights of Linear'): load_run(out, model=nn.Linear(2, 2))


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
        assert 'was not written by this program' in ends(capsys, 2, main, resume=str(tmp_path))
    state = torch.load(whole/'checkpoint.pth', weights_only=True)
    options = state['options']
    unlike = {k: v for k, v in options.items() if k != 'ema'}
    earlier = {k: v for k, v in options.items() if k not in ('quick', 'lr_end')} | dict(taste=False, final_div=1)
    for state['options'] in (unlike, earlier):
        torch.save(state, file)
        line = ends(capsys, 2, main, resume=str(tmp_path))
        assert 'this run was started by another version of the program; resume it with that version' in line
    torch.save(dict(a=Path), file)
    assert 'holds more than weights' in ends(capsys, 2, main, resume=str(tmp_path))


def test_paths_from_python_a_dollar_sign_and_a_models_folder(tmp_path):
    path = make_folder(tmp_path/'d')
    for split in ('train', 'test'): (path/split/'red').rename(path/split/'$\\a_{$')
    out = tmp_path/'out'
    (out/'models/rest').mkdir(parents=True)
    main(data=path, out=out, bs=6, epochs=1)
    assert (out/'model.pth').exists()
    assert (out/'models/rest').exists()
    assert f'python train_fastai.py --data {path} --epochs 1 --bs 6\n' in (out/'report.md').read_text()


def test_a_quick_look_is_short_whatever_else_is_said_and_can_be_done_again(tmp_path, capsys, monkeypatch):
    path, out = make_folder(tmp_path/'d', train=41, test=11), tmp_path/'out'
    assert 'has 15 training images, taking one in 10, fewer than one batch of 64' in ends(
        capsys, 2, main, data=path, out=out, quick=True)
    main(data=path, out=out, quick=True, bs=4, lr_min=1e-4, lr_max=1e-3)
    printed = capsys.readouterr().out
    assert 'A quick look' in printed
    assert '--epochs 24 is lowered to 4\n' in printed
    m = json.loads((out/'metrics.json').read_text())
    assert (m['epochs'], m['batch_size'], m['train_images'], m['test_images']) == (4, 4, 15, 6)
    disturbed(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    again = dict(quick=True, epochs=9, bs=4, lr_min=1e-4, lr_max=1e-3)
    ends(capsys, 130, main, data=path, out=tmp_path/'other', **again)
    main(resume=tmp_path/'other')
    assert differences(out, tmp_path/'other') == []
    assert f'--data {path} --epochs 4 --bs 4 --lr-min 0.0001 --lr-max 0.001 --quick\n' in (out/'report.md').read_text()


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
    *named, rest = next(d['pip'] for d in environment['dependencies'] if isinstance(d, dict))
    assert 'python=3.11' in environment['dependencies']
    assert [o.split('==')[0] for o in named] == ['fastai', 'torch', 'torchvision', 'matplotlib', 'pytest']
    assert rest == '-r requirements-dev.txt'
    to_run, (all_of_them, *to_develop) = ((ROOT/name).read_text().splitlines() for name in (
        'requirements.txt', 'requirements-dev.txt'))
    assert all_of_them == '-r requirements.txt'
    assert all(re.fullmatch(r'[\w-]+==[\d.]+(post\d+)?', line) for line in to_run + to_develop)
    assert set(named) <= {*to_run, *to_develop}
    assert {'torch==2.14.1', 'torchvision==0.29.1', 'fastai==2.8.12'} <= set(to_run)


def test_a_network_made_by_a_function_has_the_initial_weights_of_the_seed(dls, tmp_path):
    weights = [get_learner(dls, model=partial(ResNet, n_out=3), seed=seed, path=tmp_path).model.fc.weight
               for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0], get_learner(dls, seed=1, path=tmp_path).model.fc.weight)
