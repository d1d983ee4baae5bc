import re
from functools import partial

import pandas as pd
import pytest
from conftest import ROOT, one_cycle, read_metrics
from fastai.vision.all import FlipItem
from torch import nn, optim

from arch import ResNet
from lab.optim import TorchOptimizer
from lab.report import write_report
from lab.results import describe_recipe
from lab.runs import Run
from train_fastai import Options, get_dls, get_learner

PUBLISHED = ROOT/'docs/cifar10'
RUN = read_metrics(PUBLISHED)
OPTIONS, RECIPE = vars(Options()), RUN['recipe'] | dict(ema=0.995, layers=[('fc: Linear', '10', 5130)])
METRICS = RUN | dict(train_accuracy=0.98, test_accuracy=0.9273, first_epoch_over_90=16, weights_of_epoch=24,
                     commit='abc1234+', versions=dict(torch='2.14.1'), recipe=RECIPE, options=OPTIONS)
HISTORY = [dict(epoch=i, train_loss=1.5 / i, test_loss=1.25 / i, train_accuracy=0.4, test_accuracy=0.9273)
           for i in range(1, 25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 24 * 97, 1.6e-4, 2.3e-3)) for i in range(24 * 97)]
CLASSES = pd.DataFrame([('cat', 10, 0.7, 7 / 11), ('d|g', 10, 1., 10 / 13), ('eel', 5, 0., float('nan'))],
                       columns=['class', 'images', 'recall', 'precision'])
WRONG = pd.DataFrame([('cat', 'd|g')] * 2 + [('eel', 'cat')] * 4, columns=['actual', 'predicted'])


def report(classes=CLASSES, **changes):
    return write_report(METRICS | changes, 'python train_fastai.py', HISTORY, SCHEDULE, WRONG, classes)


def test_published_report_is_that_of_the_published_files():
    m, text = RUN, (PUBLISHED/'report.md').read_text()
    history, schedule, wrong, classes = (pd.read_csv(PUBLISHED/f'{o}.csv')
                                         for o in ('history', 'schedule', 'misclassified', 'classes'))
    assert text == write_report(m, Run(Options(**m['options'])).command(), history.to_dict('records'),
                                schedule.to_dict('records'), wrong, classes)
    assert m['test_accuracy'] == history.test_accuracy.iloc[-1] == pytest.approx(1 - len(wrong) / 10_000)
    assert m['test_accuracy'] == pytest.approx((classes.recall * classes.images).sum() / 10_000)
    assert m['first_epoch_over_90'] == history.epoch[history.test_accuracy > 0.9].iloc[0]
    assert (len(history), len(schedule), schedule.lr.max()) == (24, 24 * 97, pytest.approx(m['lr_max'], rel=1e-4))
    for name in re.findall(r'\]\((\w+\.\w+)\)', text): assert (PUBLISHED/name).exists()


def test_it_sets_what_was_done_beside_what_was_asked():
    text = report()
    for part in ('| parameters | 6,573,130 | 6,573,130 |', '| test accuracy | 92.73 % | 93.07 % |',
                 '| training accuracy, last epoch | 98.00 % | 98.60 % |', '| epochs | 24 | 24 |',
                 '| first epoch over 90 % test accuracy | 16 | 19 |', 'moving average, decay 0.995 per step |',
                 'label smoothing 0.1', 'weight decay 0.1 (', '| batch size | 512 | 512 |',
                 '| test accuracy | 90 % | 92.73 % |', '1.60·10⁻⁴ → 2.30·10⁻³ at epoch 5 of 24 → 1.60·10⁻⁴',
                 'peak at training batch 486 of 2,328', 'no annihilation', 'by `learn.lr_find`', 'lr_find.png',
                 '| 24 | 0.062 | 40.00 % | 0.052 | 92.73 % |', '| fc: Linear | 10 | 5,130 |',
                 r'| d\|g | 10 | 100.0 % | 76.9 % |', '| eel | 5 | 0.0 % | – |', r'eel → cat (4), cat → d\|g (2)',
                 "letter:\n\n- **Log-softmax**", 'weight decay** (AdamW;', 'the same) of 0.1;', '- **Reflected padding',
                 '6 of 10,000 test images', 'torch 2.14.1, at commit abc1234+', '    python train_fastai.py\n'):
        assert part in text, part
    for part in ('quick look', 'were planned', 'not those of the last epoch', '--plain', '**size', 'lrmin is a tenth'):
        assert part not in text.lower()
    assert '- **LRMIN is a tenth of LRMAX.**' in report(lr_min=METRICS['lr_max'] / 10)


def test_it_says_what_was_different():
    text = report(first_epoch_over_90=None, epochs=6, weights_of_epoch=3, commit=None,
                  options=OPTIONS | dict(lr_min=1.6e-4, lr_end=1.6e-6, quick=True, plain=True),
                  recipe=RECIPE | dict(label_smoothing=0., ema=0., wd=0., augmentation=[]))
    for part in ('not reached', '| first epoch over 90 % test accuracy | not reached |', ', given |', '`--plain`',
                 '- **Size:** 6 epochs', '# Quick look: 92.73 % in 6 epochs', '**A quick look**',
                 'ended after 6 epochs; 24 were planned',
                 'tested after epoch 3', '| those of the last step |', 'no weight decay |', 'cutout 8×8 | none |'):
        assert part in text, part
    for part in ('lr_find.png', 'no annihilation', 'smooth', 'averaged', 'commit'): assert part not in text
    assert 'were changed after the last test' in report(weights_of_epoch=None)
    assert '- **Another network**, ResNet, with 9 parameters and LogSoftmax at its end.' in report(parameters=9)


def test_of_many_classes_the_worst_and_the_best_are_listed():
    many = pd.DataFrame([(f'c{i}', 10, 1 - i / 100, 0.5) for i in range(100)], columns=list(CLASSES))
    listed = [line.split('|')[1].strip() for line in report(classes=many).splitlines() if line.startswith('| c')]
    assert listed == ['class', *(f'c{i}' for i in (*range(99, 89, -1), *range(4, -1, -1)))]


def test_it_names_what_the_learner_has(folder, dls):
    def describe(*args, **kwargs):
        learn = get_learner(*args, **kwargs)
        learn.fit(0)  # sets the weight decay
        return describe_recipe(learn)

    layers = (found := describe(dls))['layers']
    assert found == RECIPE | dict(ema=0.99, layers=layers, augmentation=[
        'PadCrop(pad=4, padding_mode=reflect)', 'FlipLR()', 'Cutout(size=8)'])
    assert sum(n for *_, n in layers) == sum(p.numel() for p in ResNet(n_out=3).parameters())
    assert layers[0] == ('prep.0: Conv2d', '8 × 32 × 32', 216)
    net, plain = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), get_dls(folder, bs=8, item_tfms=[FlipItem(0.3)])
    sgd = partial(TorchOptimizer, opt=optim.SGD, momentum=0.9)
    assert describe(plain, net, sgd, wd=0.3, ema=0, label_smoothing=0) == dict(
        network='Sequential', last_stage='Linear', loss='CrossEntropy', label_smoothing=0, optimizer='SGD', wd=0.3,
        ema=0., augmentation=['FlipItem(p=0.3)'], layers=[('0: Flatten', '3072', 0), ('1: Linear', '3', 9219)])
