import json

import pandas as pd
import pytest
from conftest import ROOT, one_cycle

from report import run_report
from train_fastai import command_line

OPTIONS = dict(lr_min=None, final_div=1, wd=0.1, label_smoothing=0.1, ema=0.995, taste=False)
METRICS = dict(parameters=6_573_130, lr_min=1.6e-4, lr_max=2.3e-3, epochs=24, batch_size=512, precision='bf16',
               device='cpu', train_accuracy=0.98, test_accuracy=0.9273, test_loss=0.24, first_epoch_over_90=16,
               seconds_training=3000.4, seconds_total=3600., train_images=50_000, test_images=10_000,
               versions=dict(torch='2.14.1'), options=OPTIONS)
HISTORY = [dict(train_loss=1.5, test_loss=1.25), dict(train_loss=0.05, test_loss=0.25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 24 * 97, 1.6e-4, 2.3e-3)) for i in range(24 * 97)]


CLASSES = pd.DataFrame([('cat', 10, 0.7, 7 / 11), ('d|g', 10, 1., 10 / 13), ('eel', 5, 0., float('nan'))],
                       columns=['class', 'images', 'recall', 'precision'])
CONFUSED = pd.DataFrame([('eel', 'cat', 4), ('cat', 'd|g', 2)])
PUBLISHED = ROOT/'docs/cifar10'


def report(classes=CLASSES, **changes):
    return run_report(METRICS | changes, 'python train_fastai.py', HISTORY, SCHEDULE, 8, classes, CONFUSED)


def test_the_published_report_is_that_of_the_published_files():
    m = json.loads((PUBLISHED/'metrics.json').read_text())
    history, schedule, wrong, classes = (pd.read_csv(PUBLISHED/f'{name}.csv') for name in (
        'history', 'schedule', 'misclassified', 'classes'))
    confused = wrong.groupby(['actual', 'predicted']).size().reset_index(name='images').nlargest(3, 'images')
    text = run_report(m, command_line(m['options']), history.to_dict('records'), schedule.to_dict('records'),
                      len(wrong), classes, confused)
    assert (PUBLISHED/'report.md').read_text() == text
    assert m['test_accuracy'] == pytest.approx(1 - len(wrong) / 10_000)


def test_it_sets_what_was_done_beside_what_was_asked():
    text = report()
    for part in ('| parameters | 6,573,130 | 6,573,130 |', '| test accuracy, last epoch | 92.73% | 93.07% |',
                 '| training accuracy, last epoch | 98.00% | 98.60% |',
                 '| first epoch over 90% test accuracy | 16 | 19 |',
                 '| epochs | 24 | 24 |', 'moving average, decay 0.995 per step |', 'label smoothing 0.1',
                 'weight decay 0.1 (',
                 'computed after the epoch, with the averaged weights.', '(labels smoothed) goes',
                 '| batch size | 512 | 512 |', '| test accuracy | 90% | 92.73% |',
                 '1.60·10⁻⁴ → 2.30·10⁻³ at epoch 5 of 24 → 1.60·10⁻⁴',
                 'peak at training batch 486', 'no annihilation', 'by `learn.lr_find`',
                 r'| d\|g | 10 | 100.0% | 76.9% |', 'eel → cat (4)', '8 of 10,000 test images', 'torch 2.14.1',
                 '1.500 to 0.050', '5.3 points above', '| eel | 5 | 0.0% | – |', '    python train_fastai.py\n'):
        assert part in text, part
    assert 'taste' not in text


def test_it_says_what_was_different():
    text = report(first_epoch_over_90=None, train_accuracy=0.5,
                  options=dict(lr_min=1.6e-4, final_div=100, wd=0., label_smoothing=0, ema=0, taste=True))
    for part in ('90% was not reached', '| first epoch over 90% test accuracy | none |', ', given |',
                 'A taste', '42.7 points below', '| those of the last step |', 'computed after the epoch.'):
        assert part in text, part
    assert 'lr_find.png' not in text
    assert 'no annihilation' not in text


def test_of_many_classes_the_worst_and_the_best_are_listed():
    many = pd.DataFrame([(f'c{i}', 10, i / 100, 0.5) for i in range(100)], columns=list(CLASSES))
    text = report(classes=many)
    listed = [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('| c')]
    assert listed == ['class', *(f'c{i}' for i in range(10)), *(f'c{i}' for i in range(95, 100))]
    assert 'The 10 worst and the 5 best of 100 classes' in text
