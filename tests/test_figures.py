from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from conftest import one_cycle
from matplotlib.colors import same_color

from lab import figures
from lab.loader import decode_images
from lab.results import save_figure
from train_fastai import get_learner

LRS = [10 ** (-7 + i / 10) for i in range(75)]
LOSSES = [3 - min(1, i / 50) + max(0, i - 60) for i in range(75)]
HISTORY = [dict(epoch=i, train_loss=2 / i, train_accuracy=1 - 0.6 / i, test_loss=2.2 / i, test_accuracy=0.92 - 0.5 / i)
           for i in range(1, 25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 240, 1e-4, 2e-3), momentum=0.9) for i in range(240)]


def texts(fig) -> list[str]:
    fig.draw_without_rendering()
    return [o.get_text() for o in fig.findobj(lambda o: isinstance(o, plt.Text) and o.get_visible())]


def overlapping(labels) -> bool:
    """Whether of some texts, beside or above each other, one covers the next."""
    boxes = [o.get_window_extent() for o in labels if o.get_text()]
    return any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))


def test_lr_finder_marks_both_rates():
    fig = figures.draw_lr_finder(LRS, LOSSES, 1.6e-4, 2.3e-3)
    assert [list(line.get_xdata()) for line in fig.axes[0].lines] == [LRS, [1.6e-4] * 2, [2.3e-3] * 2]
    assert {' LRMIN = 1.60·10⁻⁴ ', ' LRMAX = 2.30·10⁻³ ', 'learning rate (log scale)'} <= set(texts(fig))
    assert fig.axes[0].get_xscale() == 'log'


def test_schedule_marks_its_peak_with_its_epoch():
    fig = figures.draw_schedule(SCHEDULE, 10)
    assert {'start: 1.00·10⁻⁴, epoch 0', 'peak: 2.00·10⁻³, epoch 5', 'end: 1.00·10⁻⁴, epoch 23.9'} <= set(texts(fig))
    assert list(fig.axes[0].lines[0].get_ydata()) == [row['lr'] for row in SCHEDULE]


def test_history_has_both_sets_and_the_target():
    fig = figures.draw_history(HISTORY, 0.1)
    for ax, name in zip(fig.axes, ('loss', 'accuracy'), strict=True):
        for line, split, color in zip(ax.lines, ('train', 'test'), (figures.TRAIN, figures.TEST), strict=False):
            assert list(line.get_ydata()) == [row[f'{split}_{name}'] for row in HISTORY]
            assert same_color(line.get_color(), color)
    assert list(fig.axes[1].lines[2].get_ydata()) == [0.9, 0.9]
    assert {'training (augmented)', 'training (augmented, labels smoothed)', 'test', 'target, 90 %', 'loss (nats)',
            'Accuracy (test after the last epoch: 89.92 %)'} <= set(texts(fig))
    for ax in figures.draw_history(HISTORY[:1]).axes: assert {*ax.get_xticks()} <= {0, 1, 2}, 'parts of epochs'


def test_misclassified_images_and_names_are_shown_as_they_are(folder):
    wrong = pd.DataFrame([dict(file=f'test/red/{i}.png', actual='red', predicted='$b$', probability=0.9 - i / 10)
                          for i in range(3)])
    fig = figures.draw_misclassified(decode_images([folder/file for file in wrong.file]), wrong)
    for ax, file, percent in zip(fig.axes, wrong.file, (90, 80, 70), strict=False):
        assert ax.get_title() == f'red → $b$ ({percent}\u00a0%)'
        assert ax.title.get_parse_math() is False
        assert (np.asarray(ax.images[0].get_array()) == plt.imread(folder/file, format='png') * 255).all()
        assert ax.images[0].get_interpolation() == 'nearest'
    assert plt.rcParams['text.parse_math'] is True, 'changed for other figures, too'
    assert 'worst of 0' in figures.draw_misclassified(torch.empty(0, 3, 32, 32), wrong[:0]).get_suptitle()
    long = pd.DataFrame([dict(actual='a long ' * 4, predicted='another_' * 4, probability=0.5)] * 10)
    fig = figures.draw_misclassified(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), long)
    fig.draw_without_rendering()
    assert not overlapping([ax.title for ax in fig.axes[:5]])


def test_confusion_matrix_says_every_number_in_text():
    targets, predicted = torch.tensor([0] * 6 + [1] * 9), torch.tensor([0] * 5 + [1] + [0] * 2 + [1] * 7)
    fig = figures.draw_confusions(targets, predicted, ['cat', 'dog'])
    assert {'5', '1', '2', '7', 'cat', 'dog', 'actual', 'predicted'} <= set(texts(fig))
    assert fig.axes[0].images[0].get_array().tolist() == [[5, 1], [2, 7]]
    many = figures.draw_confusions(*[torch.arange(60)] * 2, [f'a class with a long name, {i}' for i in range(60)])
    many.draw_without_rendering()
    for axis in (many.axes[0].xaxis, many.axes[0].yaxis): assert not overlapping(axis.get_ticklabels())


def test_fastais_grids_are_not_blurred(dls):
    rng = dls.train.rng.getstate()
    for fig in (figures.draw_augmented(dls, ['FlipLR()']), figures.draw_top_losses(get_learner(dls), torch.rand(12))):
        shown = [image.get_interpolation() for ax in fig.axes for image in ax.images]
        assert shown == ['nearest'] * len(shown)
        assert len(shown) >= 8
    assert dls.train.rng.getstate() == rng


def test_figures_of_a_quick_look_say_so(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plt.Figure, 'savefig', lambda fig, file, **_: shown.append('a quick look' in texts(fig)))
    for quick in (True, False):
        run = SimpleNamespace(folder=tmp_path, options=SimpleNamespace(quick=quick))
        save_figure(run, 'x.png', figures.draw_lr_finder, LRS, LOSSES, 1e-4, 1e-3)
    assert shown == [True, False]
