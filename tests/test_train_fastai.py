import contextlib
import io
import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIX_EPOCHS, Interrupt, args, disturbed, ends, interrupt, make_folder, one_cycle, read_metrics
from fastai.vision import all as fv
from fastai.vision.all import Learner, accuracy, cifar_stats
from PIL import Image
from torch import nn

import predict
import train_fastai
from arch import ResNet
from callbacks import History, SeedEpochs
from lab import figures, results
from lab.errors import InputError
from lab.loader import BatchDL
from lab.runs import check_options
from lab.speed import fast
from predict import load_run
from train_fastai import MEAN_COLOUR, Cutout, FlipLR, Options, PadCrop, get_dls, get_learner, main

PICTURES = {'augmented.png', 'schedule.png', 'history.png', 'misclassified.png', 'top_losses.png',
            'confusion_matrix.png'}
FILES = PICTURES | {'metrics.json', 'report.md', 'errors.html', 'model.pth', 'history.csv', 'schedule.csv',
                    'misclassified.csv', 'classes.csv'}
METRICS = {'parameters', 'lr_min', 'lr_max', 'epochs', 'batch_size', 'seed', 'precision', 'device', 'train_accuracy',
           'test_accuracy', 'test_loss', 'first_epoch_over_90', 'seconds_training', 'seconds_total', 'train_images',
           'test_images', 'classes', 'fingerprint', 'versions', 'recipe', 'options', 'commit', 'weights_of_epoch'}


def test_mean_colour_is_zero_once_normalised():
    for colour, mean, std in zip(MEAN_COLOUR, *cifar_stats, strict=True):
        assert abs(colour / 255 - mean) / std <= 0.5 / 255 / std


def load(path, whole: bool):
    """The loaders, which make whole batches, or, because of a transform of another kind, item by item."""
    dls = get_dls(path, bs=8, item_tfms=[PadCrop(), FlipLR(), Cutout(), *([] if whole else [fv.Transform()])])
    assert type(dls.train) is BatchDL
    assert dls.train.makes_whole_batches == whole
    return dls


@pytest.mark.parametrize('whole', [True, False])
def test_loaders(folder, whole):
    dls = load(folder, whole=whole)
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (24, 12, 3, 2)
    assert list(dls.vocab) == ['blue', 'green', 'red']
    x, y = dls.train.one_batch()
    assert (x.shape, x.dtype, y.shape) == ((8, 3, 32, 32), torch.float32, (8,))
    files = sorted(folder.glob('test/*/*'))
    x, y = (torch.cat(o) for o in zip(*dls.valid, strict=True))
    assert list(dls.valid_ds.items) == files, 'in order, none left out'
    assert [dls.vocab[label] for label in y] == [file.parent.name for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    torch.testing.assert_close(x.as_subclass(torch.Tensor), (pixels - mean) / std)


@pytest.mark.parametrize('whole', [True, False])
def test_each_training_image_is_shifted_flipped_and_cut(tmp_path, whole):
    """On images whose red tells the column and whose green the row that a pixel came from."""
    path = make_folder(tmp_path/'d')
    place = np.arange(32, dtype='uint8') * 4
    image = np.stack(np.broadcast_arrays(place, place[:, None], np.uint8(250)), -1)
    for file in path.rglob('*.png'): Image.fromarray(image).save(file)
    torch.manual_seed(0)
    dls = load(path, whole=whole)
    mean, std = (torch.tensor(o)[:, None, None] for o in cifar_stats)
    i, j = torch.meshgrid(torch.arange(32), torch.arange(32), indexing='ij')
    seen = []
    for img in [img.as_subclass(torch.Tensor) for _ in range(5) for x, _ in dls.train for img in x]:
        img = ((img * std + mean) * 255).round().int()
        covered = img[2] != 250
        top, left = (covered.any(dim).nonzero().min().item() for dim in (1, 0))
        assert covered[top:top + 8, left:left + 8].sum() == covered.sum() == 64
        assert (img[:, covered] == torch.tensor(MEAN_COLOUR)[:, None]).all()
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
        seen.append((dx, dy, flipped, top, left))
    dxs, dys, flips, tops, lefts = zip(*seen, strict=True)
    assert set(dxs) == set(dys) == set(range(-4, 5))
    assert 40 < sum(flips) < 80  # of 120
    assert {0, 24} < {*tops} & {*lefts}, 'the hole lies anywhere inside the image'
    for o in zip(*seen, strict=True): assert any(len({*o[b:b + 8]}) > 1 for b in range(0, 120, 8)), 'one a batch'


def test_cutout_leaves_the_image_that_it_is_given():
    Cutout(8)(x := fv.TensorImage(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), split_idx=0)
    assert (x == 0).all()


def test_a_real_slice_is_learned_fast_as_by_stock_fastai(sample, tmp_path):
    """Three classes, 54 batches: in the processor's own precision, and in float32 with fastai's Adam; chance is 1/3."""
    for split, n in (('train', 192), ('test', 50)):
        for name in ('automobile', 'frog', 'ship'):
            (tmp_path/'slice'/split/name).mkdir(parents=True)
            for file in sorted((sample/split/name).iterdir())[:n]:
                (tmp_path/'slice'/split/name/file.name).symlink_to(file)
    dls = get_dls(tmp_path/'slice', bs=32)
    quick = get_learner(dls, path=tmp_path, wd=0.01, label_smoothing=0, ema=0)
    plain = Learner(dls, ResNet(n_out=3), opt_func=partial(fv.Adam, sqr_mom=0.99, eps=1e-5), metrics=accuracy,
                    cbs=[SeedEpochs(42), History()], path=tmp_path)
    plain.model.load_state_dict(quick.model.state_dict())
    cycle = partial(Learner.fit_one_cycle, n_epoch=3, lr_max=2e-3, div=10, div_final=10, pct_start=5/24)
    for learn in (quick, plain): learn.recorder.smooth_loss.beta = 0.  # so that it records each batch's own loss
    with fast(quick): cycle(quick)
    cycle(plain)
    losses, others = (torch.stack(learn.recorder.losses) for learn in (quick, plain))
    # Three seeds kept to half of these bounds; in accuracy, of 150 images, they differed by up to 0.06.
    assert (losses - others)[:3].abs().max() < 0.025
    assert (losses - others).view(3, 18).mean(1).abs().max() < 0.1
    assert losses[-18:].mean() < 0.65 < 0.8 < losses[:18].mean()
    assert quick.validate()[-1] > max(0.65, plain.validate()[-1] - 0.15)


@pytest.fixture(scope='module')
def found(folder, tmp_path_factory):
    """A run with the finder, which says nothing on stderr: its folder and what it printed."""
    out, err = tmp_path_factory.mktemp('runs')/'finder', io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(err):
        main(args(data=folder, out=out, epochs=2, bs=6))
    assert err.getvalue() == ''
    return out, printed.getvalue()


class TestRunFolder:
    def test_holds_every_file_and_no_other(self, found, folder):
        assert {f.name for f in found[0].glob('[!.]*')} == FILES | {'lr_find.csv', 'lr_find.png'}
        assert len(list(folder.rglob('*'))) == 36 + 6 + 2, 'something was written beside the images'

    def test_metrics(self, found, folder):
        m, last = read_metrics(found[0]), pd.read_csv(found[0]/'history.csv').iloc[-1]
        assert set(m) == METRICS
        assert [m[k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')] == pytest.approx(
            [last[k] for k in ('train_accuracy', 'test_accuracy', 'test_loss')])
        assert all(w.is_contiguous() for w in torch.load(found[0]/'model.pth', weights_only=True).values())
        assert m['parameters'] == sum(p.numel() for p in ResNet(n_out=3).parameters())
        assert (m['epochs'], m['weights_of_epoch'], m['batch_size'], m['seed']) == (2, 2, 6, 42)
        assert (m['train_images'], m['test_images'], m['classes']) == (24, 12, ['blue', 'green', 'red'])
        assert 0 < m['seconds_training'] < m['seconds_total']
        assert torch.__version__.startswith(m['versions']['torch'])
        assert (m['options']['data'], m['options']['lr_min']) == (str(folder), None)
        over = [i for i, a in enumerate(pd.read_csv(found[0]/'history.csv').test_accuracy, 1) if a > 0.9]
        assert m['first_epoch_over_90'] == (over[0] if over else None)

    def test_tables(self, found):
        out, m = found[0], read_metrics(found[0])
        tables = {f.stem: pd.read_csv(f) for f in out.glob('*.csv')}
        assert {name: ' '.join(table) for name, table in tables.items()} == dict(
            history='epoch train_loss train_accuracy test_loss test_accuracy seconds', schedule='batch lr momentum',
            lr_find='lr loss', classes='class images recall precision',
            misclassified='file actual predicted probability loss')
        assert list(tables['history'].epoch) == [1, 2]
        schedule, finder, classes, wrong = (tables[o] for o in ('schedule', 'lr_find', 'classes', 'misclassified'))
        assert list(schedule.batch) == list(range(1, 9))
        assert list(schedule.lr) == pytest.approx([one_cycle(i, 8, m['lr_min'], m['lr_max']) for i in range(8)])
        assert finder.lr[0] == pytest.approx(1e-7)
        assert finder.lr.is_monotonic_increasing
        assert finder.lr.min() < m['lr_min'] < m['lr_max'] < finder.lr.max()
        assert (classes.recall * classes.images).sum() / 12 == pytest.approx(m['test_accuracy'])
        assert wrong.loss.is_monotonic_decreasing

    def test_figures_show_something_and_the_report_shows_them(self, found):
        links = re.findall(r'\]\((.*?)\)', (found[0]/'report.md').read_text())
        assert PICTURES | {'lr_find.png'} <= set(links)
        assert all((found[0]/link).exists() for link in links)
        for file in found[0].glob('*.png'):
            image = Image.open(file)
            assert image.width >= 800, file
            assert image.height >= (350 if file.name == 'misclassified.png' else 400), file  # of a single line
            assert len(image.convert('RGB').getcolors(10**6)) > 20, file

    def test_what_is_printed(self, found):
        (out, printed), m = found, read_metrics(found[0])
        for part in (f'LRMIN {m["lr_min"]:.2e}, LRMAX {m["lr_max"]:.2e}', f'{m["parameters"]:,} parameters', str(out),
                     f'test accuracy {100 * m["test_accuracy"]:.2f} %', '24 training and 12 test images'):
            assert part in printed
        lines = [line for line in printed.splitlines() if line.startswith('epoch')]
        for line, row in zip(lines, pd.read_csv(out/'history.csv').to_dict('records'), strict=True):
            shown = dict(re.findall(r'(\w+) ([\d.:]+)', line))
            assert [float(shown[k]) for k in ('epoch', 'valid_loss', 'accuracy', 'train_accuracy')] == pytest.approx(
                [row['epoch'] - 1, row['test_loss'], row['test_accuracy'], row['train_accuracy']], abs=1e-4)
        assert '\r' not in printed, 'a progress bar in a log'


@pytest.mark.parametrize('change', [
    dict(epochs=0), dict(bs=0), dict(seed=2**32), dict(lr_min=1e-3), dict(lr_min=None, lr_max=1e-3),
    dict(lr_min=2e-3, lr_max=1e-3), dict(lr_min=0., lr_max=1e-3), dict(lr_max=math.inf, lr_min=1e-3), dict(lr_end=0.),
    dict(lr_end=math.nan), dict(lr_end=2e-3, lr_min=1e-4, lr_max=1e-3), dict(wd=-1), dict(wd=math.inf),
    dict(label_smoothing=1), dict(ema=1), dict(ema=math.nan)], ids=str)
def test_options_out_of_range(change):
    check_options(Options())
    name, value = next(iter(change.items()))
    with pytest.raises(InputError, match=f'^--{name.replace("_", "-")} ({value}|and)'): check_options(Options(**change))


@pytest.mark.parametrize(('options', 'message'), [
    (dict(epochs=0), '--epochs 0'),
    (dict(precision='fp16'), '--precision fp16 '),
    (dict(bs=25), 'fewer than one batch of 25'),
    (dict(data='nowhere'), 'there is no folder /'),
    (dict(resume='nowhere'), 'nowhere/checkpoint.pth cannot be read (No such file or directory)'),
    (dict(resume='.', bs=512), '--bs does not go with --resume; a run keeps its own options'),  # given, if a default
], ids=str)
def test_bad_input_is_one_line_and_nothing_written(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(fv.defaults, 'use_cuda', False)
    monkeypatch.chdir(tmp_path)
    usual = dict(data=folder) if 'resume' in options else dict(data=folder, bs=8)
    assert message in ends(capsys, 2, main, **usual | options)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_costs_a_line(folder, tmp_path, capsys, monkeypatch):
    def fail(*_): raise ValueError('no\npicture')
    for name in ('augmented', 'schedule', 'history', 'misclassified', 'confusions', 'top_losses'):
        monkeypatch.setattr(figures, f'draw_{name}', fail)
    monkeypatch.setattr(results, 'write_page', fail)
    main(args(data=folder, out=tmp_path/'out', epochs=1, bs=8, lr_min=1e-4, lr_max=1e-3))
    err = capsys.readouterr().err
    assert err.count('was not written: no picture\n') == err.count('\n') == 7
    assert {f.name for f in (tmp_path/'out').glob('[!.]*')} == FILES - PICTURES - {'errors.html'}


def test_a_loss_that_is_no_number_keeps_the_record(folder, tmp_path, capsys, monkeypatch, no_pictures):
    def spoil(self):
        if self.training and self.epoch == 2 and self.iter == 1: self.learn.xb = (self.x * math.nan,)
    monkeypatch.setattr(SeedEpochs, 'before_batch', spoil, raising=False)
    line = ends(capsys, 1, main, data=folder, out=(out := tmp_path/'out'), **SIX_EPOCHS)
    assert line.startswith('error: the loss was not finite in epoch 3; lower --lr-max')
    assert 'resume' not in line, 'it would happen again'
    assert len(pd.read_csv(out/'history.csv')) == 2
    assert not (out/'model.pth').exists()


def test_the_rate_cannot_end_above_a_peak_that_was_found(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_fastai, 'find_lrs', lambda _, **__: (1e-4, 1e-3))
    monkeypatch.setattr(train_fastai, 'save_finder', lambda *_: None)
    line = ends(capsys, 2, main, data=folder, out=tmp_path/'out', bs=8, lr_end=2e-3)
    assert '--lr-end 0.002 is not in 1e-12 … 0.001' in line


def test_a_quick_look_is_short_also_when_it_is_resumed(tmp_path, capsys, no_pictures):
    """And its rate ends at --lr-end."""
    path, out = make_folder(tmp_path/'d', train=41, test=11), tmp_path/'out'
    (out/'models/rest').mkdir(parents=True)  # somebody else's
    message = '15 training images are fewer than one batch of 64'
    assert message in ends(capsys, 2, main, data=path, out=out, quick=True)
    rates = dict(lr_min=1e-4, lr_max=1e-3, lr_end=1e-6)
    with disturbed(interrupt, 2): ends(capsys, 130, main, data=path, out=out, quick=True, bs=4, **rates)
    main(args(resume=out))
    m = read_metrics(out)
    assert (m['epochs'], m['batch_size'], m['train_images'], m['test_images']) == (3, 4, 15, 6)
    assert len(pd.read_csv(out/'history.csv')) == 3
    assert list(pd.read_csv(out/'schedule.csv').lr) == pytest.approx([one_cycle(i, 9, **rates) for i in range(9)])
    assert (out/'models/rest').exists()
    command = f'--data {path} --epochs 3 --bs 4 --lr-min 0.0001 --lr-max 0.001 --lr-end 1e-06 --quick\n'
    assert command in (out/'report.md').read_text()


def test_a_run_of_another_network_is_loaded_into_it(folder, tmp_path, capsys, monkeypatch, no_pictures):
    def small(): return nn.Sequential(nn.MaxPool2d(8), nn.Flatten(), nn.Linear(48, 3))
    monkeypatch.setattr(train_fastai, 'get_learner', partial(get_learner, model=small))
    main(args(data=folder, out=(out := tmp_path/'out'), **SIX_EPOCHS))
    line = f"{out} cannot be used ('prep.0.weight'); copy all of the run; load_run(…, model=…) takes another network"
    assert line in ends(capsys, 2, predict.main, out, folder/'test/red/0.png')
    m = read_metrics(out)
    learn = load_run(out, folder, model=small())
    assert list(learn.validate()) == pytest.approx([m['test_loss'], m['test_accuracy']], abs=1e-2)
    assert load_run(out, model=small()).predict(folder/'test/red/0.png')[0] in m['classes']
    with pytest.raises(InputError, match='state_dict for Linear'): load_run(out, model=nn.Linear(2, 2))


def test_an_interrupted_finder_leaves_nothing_in_the_way(folder, tmp_path, capsys, monkeypatch, no_pictures):
    monkeypatch.setattr(train_fastai, 'get_learner', lambda *a, **k: get_learner(*a, **k).add_cb(Interrupt()))
    options = dict(data=folder, out=tmp_path/'out', epochs=1, bs=6)
    for _ in range(2): assert 'interrupted; nothing was trained yet' in ends(capsys, 130, main, **options)
    assert not [f for f in (tmp_path/'out').rglob('[!.]*') if f.is_file()]
