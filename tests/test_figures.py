import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_folder, one_cycle
from matplotlib.colors import same_color

import figures
from data import decode_images, get_dls
from learner import get_learner
from run import save_figure, tell_once

LRS = [10 ** (-7 + i / 10) for i in range(75)]
LOSSES = [3 - min(1, i / 50) + max(0, i - 60) for i in range(75)]
HISTORY = [dict(epoch=i, train_loss=2 / i, train_accuracy=1 - 0.6 / i, test_loss=2.2 / i, test_accuracy=0.92 - 0.5 / i)
           for i in range(1, 25)]
SCHEDULE = [dict(batch=i + 1, lr=one_cycle(i, 240, 1e-4, 2e-3), momentum=0.9) for i in range(240)]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close('all')


def texts(fig) -> list[str]:
    fig.canvas.draw()
    found = fig.findobj(lambda o: isinstance(o, plt.Text) and o.get_visible())
    return [o.get_text() for o in found if o.get_text()]


def overlapping(labels) -> bool:
    boxes = [o.get_window_extent() for o in labels if o.get_text()]
    return any(one.x1 > other.x0 for one, other in zip(boxes, boxes[1:], strict=False))


def test_importing_changes_nothing_for_other_figures(): assert plt.rcParams['text.parse_math'] is True


def test_lr_finder_marks_both_rates():
    fig = figures.lr_finder(LRS, LOSSES, 1.6e-4, 2.3e-3)
    ax = fig.axes[0]
    curve, *marks = ax.lines
    assert list(curve.get_xdata()) == LRS
    assert [m.get_xdata()[0] for m in marks] == [1.6e-4, 2.3e-3]
    assert {' LRMIN = 1.60e-04 ', ' LRMAX = 2.30e-03 '} <= set(texts(fig))
    assert (ax.get_xscale(), ax.get_xlabel()) == ('log', 'learning rate (log scale)')
    assert not overlapping(ax.get_xticklabels())


def test_schedule_marks_its_peak_with_its_epoch():
    fig = figures.schedule(SCHEDULE, 10)
    assert {'start: 1.00e-04, epoch 0', 'peak: 2.00e-03, epoch 5', 'end: 1.00e-04, epoch 23.9'} <= set(texts(fig))
    top, bottom = fig.axes[:2]
    assert list(top.lines[0].get_ydata()) == [row['lr'] for row in SCHEDULE]
    assert (top.get_ylabel(), bottom.get_xlabel()) == ('learning rate', 'iteration (training batch)')


def test_history_has_the_90_percent_line_and_says_which_set_is_which():
    fig = figures.history(HISTORY)
    for ax, name in zip(fig.axes, ('loss', 'accuracy'), strict=True):
        for line, split, color in zip(ax.lines, ('train', 'test'), (figures.TRAIN, figures.TEST), strict=False):
            assert list(line.get_ydata()) == [row[f'{split}_{name}'] for row in HISTORY]
            assert same_color(line.get_color(), color)
        assert not overlapping(ax.get_xticklabels())
    assert list(fig.axes[1].lines[2].get_ydata()) == [0.9, 0.9]
    shown = texts(fig)
    assert {'training (augmented)', 'test', 'target, 90%', 'loss (nats)', 'accuracy', 'epoch'} <= set(shown)
    assert any(f'{HISTORY[-1]["test_accuracy"]:.2%}' in t for t in shown)


def test_misclassified_images_are_as_in_their_files_and_labelled(folder):
    wrong = pd.DataFrame([dict(file=f'test/red/{i}.png', actual='red', predicted='$b$', probability=0.9 - i / 10)
                          for i in range(3)])
    fig = figures.misclassified(decode_images([folder/file for file in wrong.file]), wrong)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in shown] == [f'red → $b$ ({p}%)' for p in (90, 80, 70)]
    for ax, file in zip(shown, wrong.file, strict=True):
        image, = ax.images
        assert (np.asarray(image.get_array()) == plt.imread(folder/file, format='png') * 255).all()
        assert image.get_interpolation() == 'nearest'
        assert ax.title.get_parse_math() is False
    assert 'worst of 3' in fig.get_suptitle()
    assert len(fig.axes) == 5, 'an empty line'


def test_confusion_matrix_says_every_number_in_text():
    fig = figures.confusion_matrix(torch.tensor([[5, 1], [2, 7]]), ['cat', 'dog'])
    assert {'5', '1', '2', '7', 'cat', 'dog', 'actual', 'predicted'} <= set(texts(fig))
    assert fig.axes[0].images[0].get_array().tolist() == [[0, 1], [2, 0]]  # the colour is that of the errors


@pytest.mark.parametrize('n', [100, 600])
def test_names_of_many_classes_do_not_cover_each_other(n):
    vocab = [f'a class with a long name, {i}' for i in range(n)]
    fig = figures.confusion_matrix(torch.eye(n, dtype=torch.long), vocab)
    fig.draw_without_rendering()
    ax, = fig.axes
    labels = ax.get_yticklabels()
    assert labels[1].get_text() == f'{vocab[n // 50][:19]}…'
    boxes = [o.get_window_extent() for o in labels]
    assert not any(lower.y1 > upper.y0 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_long_names_do_not_run_into_each_other():
    row = dict(actual='an unreasonably long name', predicted='another unreasonably long name', probability=0.5)
    fig = figures.misclassified(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), pd.DataFrame([row] * 10))
    fig.draw_without_rendering()
    assert not overlapping([ax.title for ax in fig.axes[:5]])


def test_letters_that_no_font_has_are_a_single_line(tmp_path, capsys):
    for vocab, lines in ((['été', 'красный'], 0), (['\U00013000', '\U00013001'], 1)):
        tell_once.cache_clear()
        for _ in range(2):
            save_figure(tmp_path/'x.png', figures.confusion_matrix, torch.eye(2, dtype=torch.long), vocab)
        assert capsys.readouterr().err == lines * (
            'No installed font has all letters of the class names; figures show boxes for the others.\n')
    assert plt.imread(tmp_path/'x.png').size


def test_fastais_grids_are_not_blurred(tmp_path):
    learn = get_learner(dls := get_dls(make_folder(tmp_path/'d'), bs=8), precision='fp32', path=tmp_path)
    for fig in (figures.augmented(dls), figures.top_losses(learn, torch.rand(12))):
        images = [image for ax in fig.axes for image in ax.images]
        assert len(images) >= 8
        assert {image.get_interpolation() for image in images} == {'nearest'}
