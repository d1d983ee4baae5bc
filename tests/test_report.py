import json
import re
from functools import partial

import pandas as pd
import pytest
from conftest import ROOT, one_cycle
from fastai.vision.all import CrossEntropyLossFlat, ranger
from lab.learner import TorchOptimizer
from torch import nn, optim

from lab.report import format_rate, percent, write_report
from lab.results import describe_recipe
from lab.runs import Run
from train_fastai import Options, get_dls, get_learner

RECIPE = dict(network='ResNet', last_stage='LogSoftmax', loss='CrossEntropy', label_smoothing=0.1, optimizer='AdamW',
              wd=0.1, ema=0.995, augmentation=['PadCrop(pad=4)', 'FlipLR()', 'Cutout(size=8)'])
OPTIONS = dict(lr_min=None, lr_end=None, quick=False)
METRICS = dict(parameters=6_573_130, lr_min=1.6e-4, lr_max=2.3e-3, epochs=24, batch_size=512, precision='bf16',
               device='cpu', train_accuracy=0.98, test_accuracy=0.9273, test_loss=0.24, first_epoch_over_90=16,
               seconds_training=3000.4, seconds_total=3600., train_images=50_000, test_images=10_000,
               versions=dict(torch='2.14.1'), recipe=RECIPE, options=OPTIONS)
HISTORY = [dict(train_loss=1.5, test_loss=1.25), dict(train_loss=0.05, test_loss=0.25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 24 * 97, 1.6e-4, 2.3e-3)) for i in range(24 * 97)]


CLASSES = pd.DataFrame([('cat', 10, 0.7, 7 / 11), ('d|g', 10, 1., 10 / 13), ('eel', 5, 0., float('nan'))],
                       columns=['class', 'images', 'recall', 'precision'])
CONFUSED = pd.DataFrame([('eel', 'cat', 4), ('cat', 'd|g', 2)])
PUBLISHED = ROOT/'docs/cifar10'


def report(classes=CLASSES, **changes):
    return write_report(METRICS | changes, 'python train_fastai.py', HISTORY, SCHEDULE, 8, classes, CONFUSED)


def published() -> tuple:
    """The published run: its metrics, then the tables history, schedule, misclassified and classes."""
    tables = (pd.read_csv(PUBLISHED/f'{name}.csv') for name in ('history', 'schedule', 'misclassified', 'classes'))
    return json.loads((PUBLISHED/'metrics.json').read_text()), *tables


def test_the_published_report_is_that_of_the_published_files():
    m, history, schedule, wrong, classes = published()
    confused = wrong.groupby(['actual', 'predicted']).size().reset_index(name='images').nlargest(3, 'images')
    text = write_report(m, Run(Options(**m['options']), set()).command, history.to_dict('records'),
                        schedule.to_dict('records'), len(wrong), classes, confused)
    assert (PUBLISHED/'report.md').read_text() == text


def test_the_published_run_has_all_files_of_a_run():
    text = (PUBLISHED/'report.md').read_text()
    linked = {*re.findall(r'\]\((\w+\.\w+)\)', text)}
    others = {'lr_find.csv', 'schedule.csv', 'metrics.json', 'model.pth', 'report.md'}
    assert {f.name for f in PUBLISHED.iterdir() if f.is_file()} == linked | others


def test_the_published_reports_numbers_are_those_of_the_published_files():
    m, history, schedule, wrong, classes = published()
    text = (PUBLISHED/'report.md').read_text().replace(' %', '%')
    last = history.iloc[-1]
    assert m['test_accuracy'] == last.test_accuracy == pytest.approx(1 - len(wrong) / 10_000)
    assert (len(history), len(schedule)) == (24, 24 * 97)
    over = history.epoch[history.test_accuracy > 0.9].iloc[0]
    assert over == m['first_epoch_over_90']
    for part in (f'| test accuracy, last epoch | {m["test_accuracy"]:.2%} | 93.07% |',
                 f'| training accuracy, last epoch | {last.train_accuracy:.2%} | 98.60% |',
                 f'| first epoch over 90% test accuracy | {over} | 19 |',
                 f'| LRMIN, LRMAX | by the LR finder | {format_rate(m["lr_min"])}, {format_rate(m["lr_max"])}, by',
                 f'peak at training batch {schedule.lr.argmax() + 1} of 2,328', f'{len(wrong)} of 10,000 test images',
                 *(f'| {o["class"]} | 1,000 | {o.recall:.1%} | {o.precision:.1%} |' for _, o in classes.iterrows())):
        assert part in text, part
    worst, = wrong.groupby(['actual', 'predicted']).size().nlargest(1).items()
    assert f'{worst[0][0]} → {worst[0][1]} ({worst[1]})' in text


def test_it_sets_what_was_done_beside_what_was_asked():
    text = report()
    for part in ('| parameters | 6,573,130 | 6,573,130 |', '| test accuracy, last epoch | 92.73 % | 93.07 % |',
                 '| training accuracy, last epoch | 98.00 % | 98.60 % |',
                 '| first epoch over 90 % test accuracy | 16 | 19 |',
                 '| epochs | 24 | 24 |', 'moving average, decay 0.995 per step |', 'label smoothing 0.1',
                 'weight decay 0.1 (',
                 '| batch size | 512 | 512 |', '| test accuracy | 90 % | 92.73 % |',
                 '1.60·10⁻⁴ → 2.30·10⁻³ at epoch 5 of 24 → 1.60·10⁻⁴',
                 'peak at training batch 486', 'no annihilation', 'by `learn.lr_find`',
                 r'| d\|g | 10 | 100.0 % | 76.9 % |', 'eel → cat (4)', '8 of 10,000 test images', 'torch 2.14.1',
                 '5.3 points above', '| eel | 5 | 0.0 % | – |', '    python train_fastai.py\n'):
        assert part in text, part
    prose = ' '.join(text.split())
    for part in ('computed after the epoch, with the averaged weights.', '(labels smoothed) goes from 1.500 to 0.050,',
                 'falls towards 1.60·10⁻⁴, where it started: no annihilation. The last batch has 1.60·10⁻⁴.'):
        assert part in prose, part
    assert 'quick look' not in text.lower()
    part = 'The finder sees batches of 256 images.'
    assert part in text
    assert part not in report(batch_size=256)


def test_it_says_what_was_different():
    text = report(first_epoch_over_90=None, train_accuracy=0.5,
                  options=dict(lr_min=1.6e-4, lr_end=1.6e-6, quick=True),
                  recipe=RECIPE | dict(label_smoothing=0., ema=0.))
    prose = ' '.join(text.split())
    for part in ('90 % was not reached', '| first epoch over 90 % test accuracy | none |', ', given |',
                 '# Quick look: 92.73 % in 24 epochs', 'A quick look', 'falls towards 1.60·10⁻⁶. ',
                 '42.7 points below', '| those of the last step |', 'computed after the epoch.'):
        assert part in prose, part
    assert 'lr_find.png' not in text
    assert 'no annihilation' not in text


def test_of_many_classes_the_worst_and_the_best_are_listed():
    many = pd.DataFrame([(f'c{i}', 10, i / 100, 0.5) for i in range(100)], columns=list(CLASSES))
    text = report(classes=many)
    listed = [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('| c')]
    assert listed == ['class', *(f'c{i}' for i in range(10)), *(f'c{i}' for i in range(95, 100))]
    assert 'The 10 worst and the 5 best of 100 classes' in text


def test_numbers_are_written_in_one_style():
    assert [percent(0.9273), percent(0.93955, 2), percent(1.), percent(float('nan'))] == [
        '92.7 %', '93.95 %', '100.0 %', '–']
    assert [format_rate(lr) for lr in (2.29e-3, 1e-12, 15.)] == ['2.29·10⁻³', '1.00·10⁻¹²', '1.50·10¹']


def test_it_names_what_the_learner_has(folder, tmp_path):
    dls = get_dls(folder, bs=8)
    learn = get_learner(dls, path=tmp_path)
    learn.create_opt()
    assert describe_recipe(learn) == RECIPE | dict(ema=0.99, augmentation=[
        'PadCrop(pad=4, padding_mode=reflect)', 'FlipLR()', 'Cutout(size=8)'])
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))
    for opt_func, name in ((ranger, 'ranger'), (partial(TorchOptimizer, opt=optim.SGD, momentum=0.9), 'SGD')):
        learn = get_learner(get_dls(folder, bs=8, item_tfms=[]), net, opt_func, wd=0.3, ema=0, path=tmp_path)
        learn.loss_func = CrossEntropyLossFlat()
        learn.create_opt()
        found = describe_recipe(learn)
        assert found == dict(network='Sequential', last_stage='Linear', loss='CrossEntropyLossFlat',
                             label_smoothing=0., optimizer=name, wd=0.3, ema=0., augmentation=[])
        text = report(recipe=found)
        for part in ("| network | the assignment's ResNet, 6,573,130 parameters | Sequential, 6,573,130 parameters |",
                     '| last stage | SoftMax | Linear |', f'| optimizer | Adam | {name}, weight decay 0.3 ',
                     '| loss | cross-entropy | CrossEntropyLossFlat |',
                     'cutout 8×8 | none |', '| weights tested and kept | not stated | those of the last step |'):
            assert part in text, part
