"""The figures of a run, one function each: recorded numbers, or one of fastai's views, to a matplotlib figure."""
from textwrap import fill

from fastai.vision.all import *
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import ConfusionMatrixDisplay

from lab.processes import alone
from lab.report import format_rate

TRAIN, TEST, MARK = 'tab:blue', 'tab:orange', 'tab:red'  # one colour for one thing in all figures
curves = matplotlib.rc_context({'figure.constrained_layout.use': True, 'axes.grid': True, 'grid.alpha': 0.3})
# Class names are shown letter by letter: one may be called $x$.
pictures = matplotlib.rc_context({'figure.constrained_layout.use': True, 'text.parse_math': False,
                                  'image.interpolation': 'nearest', 'axes.titlesize': 10})


@curves
def draw_lr_finder(lrs: list[float], losses: list[float], lr_min: float, lr_max: float) -> Figure:
    """The LR finder's curve, with the two rates that the run uses."""
    fig, ax = plt.subplots(figsize=(8, 4.5))
    ax.plot(lrs, losses, color=TRAIN)
    low, descent = np.nanmin(losses), losses[0] - np.nanmin(losses)
    ax.set(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
           title='Learning-rate finder', ylim=(low - 0.1 * descent, low + 1.5 * descent))  # it stops far beyond
    for lr, name, align in ((lr_min, 'LRMIN', 'right'), (lr_max, 'LRMAX', 'left')):
        ax.axvline(lr, color=MARK, linestyle='--')
        ax.text(lr, 0.02, f' {name} = {format_rate(lr)} ', transform=ax.get_xaxis_transform(), color=MARK, ha=align)
    return fig


@curves
def draw_schedule(rows: list[dict], batches_per_epoch: float) -> Figure:
    """Learning rate and momentum of every training batch; `rows` as in schedule.csv."""
    batch, lr, momentum = ([row[k] for row in rows] for k in ('batch', 'lr', 'momentum'))
    fig, (top, bottom) = plt.subplots(2, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    top.plot(batch, lr, color='black')
    for at, name, marker in ((0, 'start', '>'), (np.argmax(lr), 'peak', '^'), (len(lr) - 1, 'end', 's')):
        label = f'{name}: {format_rate(lr[at])}, epoch {at / batches_per_epoch:.3g}'
        top.plot(batch[at], lr[at], marker, color=MARK, label=label)
    top.legend(loc='upper right')
    top.set(ylabel='learning rate', title='Learning rate and momentum per iteration', ylim=(0, 1.15 * max(lr)))
    to_epochs = (lambda batch: batch / batches_per_epoch), (lambda epoch: epoch * batches_per_epoch)
    epochs = top.secondary_xaxis('top', functions=to_epochs, xlabel='epoch')
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.plot(batch, momentum, color='black')
    bottom.set(xlabel='iteration (training batch)', ylabel='momentum (β₁)')
    return fig


@curves
def draw_history(rows: list[dict], label_smoothing: float = 0., target: float = 0.9) -> Figure:
    """Loss, in training with `label_smoothing`, and accuracy of both sets by epoch; `rows` as in history.csv."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for ax, name, smoothed in ((left, 'loss', ', labels smoothed' * bool(label_smoothing)), (right, 'accuracy', '')):
        pd.DataFrame(rows).plot(
            'epoch', [f'train_{name}', f'test_{name}'], label=[f'training (augmented{smoothed})', 'test'], ylabel=name,
            color=[TRAIN, TEST], style=['s-', 'o-'], markersize=4, xlim=(0.5, len(rows) + 0.5), ax=ax)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(title='Loss', ylabel='loss (nats)')
    right.set_title(f'Accuracy (test after the last epoch: {100 * rows[-1]["test_accuracy"]:.2f} %)')
    right.axhline(target, color=MARK, linestyle='--', label=f'target, {100 * target:.0f} %')
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=' %'))
    right.legend()
    return fig


def wrap_titles(width: int) -> Figure:
    """The current figure, with titles of at most `width` letters a line."""
    for ax in plt.gcf().axes: ax.set_title(fill(ax.get_title(), width))
    return plt.gcf()


@pictures
def draw_misclassified(images: Tensor, wrong: pd.DataFrame) -> Figure:
    """The first rows of `wrong`, as in misclassified.csv; `images` (n, 3, H, W) uint8, at most ten, are theirs."""
    titles = [f'{o.actual} → {o.predicted} ({100 * o.probability:.0f}\u00a0%)' for o in wrong.itertuples()]
    show_images(images, 2, 5, titles, figsize=(11, 5.4), suptitle=(
        f'Misclassified test images, the worst of {len(wrong):,}: actual → predicted (probability)'))
    for ax in plt.gcf().axes: ax.axis('off')
    return wrap_titles(26)


@pictures
@alone()
def draw_top_losses(learn: Learner, losses: Tensor, n: int = 9) -> Figure:
    """fastai's view of the test images with the largest `losses`, (N,) float on the CPU."""
    interp = ClassificationInterpretation(learn, learn.dls.valid, losses)  # from_learner would test once more
    with learn.no_bar(): interp.plot_top_losses(min(n, len(losses)), figsize=(10, 9.5))
    return wrap_titles(44)


@pictures
def draw_confusions(targets: Tensor, predicted: Tensor, vocab: list[str]) -> Figure:
    """How often each class (row) was taken for each other (column); both (N,) int64."""
    few = len(vocab) <= 30  # more numbers would not be legible
    fig, ax = plt.subplots(figsize=(8, 7.5) if few else (12, 11.5))
    display = ConfusionMatrixDisplay.from_predictions(
        targets, predicted, labels=range_of(vocab), display_labels=[truncstr(c, 20) for c in vocab],
        include_values=few, xticks_rotation='vertical', cmap='Blues', colorbar=False, ax=ax)
    errors = display.confusion_matrix - np.diag(display.confusion_matrix.diagonal())
    display.im_.set_clim(0, 2 * errors.max() or 1)  # beside the diagonal errors would be hard to see
    ax.tick_params(labelsize=min(10, 500 / len(vocab)))
    ax.set(xlabel='predicted', ylabel='actual')
    fig.suptitle('Confusion matrix of the test set')
    return fig


@pictures
def draw_augmented(dls: DataLoaders, augmentations: list[str], n: int = 24) -> Figure:
    """A training batch as the network sees it, from a loader of its own: `dls` draws as before."""
    with no_random(0): dls.train.new().show_batch(max_n=n, nrows=3, figsize=(12, 5.2))
    plt.gcf().suptitle(f'Training images as the network sees them: {", ".join(augmentations)}')
    return wrap_titles(18)
