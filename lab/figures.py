"""The figures of a run, one function each: recorded numbers, or one of fastai's views, to a matplotlib figure."""
from fastai.vision.all import *
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import ConfusionMatrixDisplay

from lab.processes import alone
from lab.report import format_rate

TRAIN, TEST, MARK = 'tab:blue', 'tab:orange', 'tab:red'  # one colour for one thing in all figures
# Class names are shown letter by letter: one may be called $x$.
with_names = matplotlib.rc_context({'text.parse_math': False})


def short(name: str, width: int = 16) -> str:
    """`name`, cut to `width` letters."""
    return name if len(name) <= width else f'{name[:width - 1]}…'


def draw_lr_finder(lrs: list[float], losses: list[float], lr_min: float, lr_max: float) -> Figure:
    """The LR finder's curve, with the two rates that the run uses."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.plot(lrs, losses, color=TRAIN)
    start, low = losses[0], np.nanmin(losses)
    ax.set_ylim(low - 0.1 * (start - low), start + 0.5 * (start - low))  # the finder stops only far beyond the minimum
    for lr, name, align in ((lr_min, 'LRMIN', 'right'), (lr_max, 'LRMAX', 'left')):
        ax.axvline(lr, color=MARK, linestyle='--')
        text, place = f' {name} = {format_rate(lr)} ', (lr, 0.02)
        ax.annotate(text, place, xycoords=('data', 'axes fraction'), color=MARK, ha=align)
    ax.set(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
           title='Learning-rate finder')
    ax.grid(alpha=0.3)
    return fig


def draw_schedule(rows: list[dict], batches_per_epoch: float) -> Figure:
    """Learning rate and momentum of every training batch; `rows` as in schedule.csv."""
    batch, lr, momentum = ([row[k] for row in rows] for k in ('batch', 'lr', 'momentum'))
    fig, (top, bottom) = plt.subplots(2, figsize=(8, 6), sharex=True, layout='constrained', height_ratios=(2, 1))
    top.plot(batch, lr, color='black')
    for at, name, marker in ((0, 'start', '>'), (int(np.argmax(lr)), 'peak', '^'), (len(lr) - 1, 'end', 's')):
        label = f'{name}: {format_rate(lr[at])}, epoch {at / batches_per_epoch:.3g}'
        top.plot(batch[at], lr[at], marker, color=MARK, label=label)
    top.legend(loc='upper right')
    top.set(ylabel='learning rate', title='Learning rate and momentum per iteration', ylim=(0, 1.15 * max(lr)))
    epochs = top.secondary_xaxis('top', functions=(lambda b: b / batches_per_epoch, lambda e: e * batches_per_epoch))
    epochs.set_xlabel('epoch')
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.plot(batch, momentum, color='black')
    bottom.set(xlabel='iteration (training batch)', ylabel='momentum (β₁)')
    for ax in (top, bottom): ax.grid(alpha=0.3)
    return fig


def draw_history(rows: list[dict], label_smoothing: float = 0., target: float = 0.9) -> Figure:
    """Loss and accuracy of both sets, epoch by epoch; `rows` as in history.csv.

    `label_smoothing` is that of the training loss, which the legend mentions.
    """
    epoch = [row['epoch'] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for ax, name in ((left, 'loss'), (right, 'accuracy')):
        for split, color, marker in (('train', TRAIN, 's'), ('test', TEST, 'o')):
            smoothed = ', labels smoothed' if label_smoothing and name == 'loss' else ''
            ax.plot(epoch, [row[f'{split}_{name}'] for row in rows], color=color, marker=marker, markersize=4,
                    label=f'training (augmented{smoothed})' if split == 'train' else 'test')
        ax.set(xlabel='epoch', ylabel=name, xlim=(0.5, len(rows) + 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
    left.set(title='Loss', ylabel='loss (nats)')
    right.axhline(target, color=MARK, linestyle='--', label=f'target, {100 * target:.0f} %')
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=' %'))
    right.set_title(f'Accuracy (test after the last epoch: {100 * rows[-1]["test_accuracy"]:.2f} %)')
    left.legend()
    right.legend(loc='best')
    return fig


@with_names
def draw_misclassified(images: Tensor, wrong: pd.DataFrame) -> Figure:
    """The first rows of `wrong`, as in misclassified.csv; `images` (n, 3, H, W) uint8 are theirs."""
    cols = 5
    lines = max(-(-len(images) // cols), 1)
    fig, axs = plt.subplots(lines, cols, figsize=(11, 0.5 + 2.45 * lines), layout='constrained')
    for ax in axs.flat: ax.axis('off')
    for ax, image, row in zip(axs.flat, images, wrong.itertuples(), strict=False):
        ax.imshow(image.permute(1, 2, 0), interpolation='nearest')
        actual, predicted = short(row.actual), short(row.predicted)
        arrow = ' → ' if len(actual + predicted) <= 22 else ' →\n'
        ax.set_title(f'{actual}{arrow}{predicted} ({100 * row.probability:.0f} %)', fontsize=10)
    fig.suptitle(f'Misclassified test images, the worst of {len(wrong):,}: actual → predicted (probability)')
    return fig


@with_names
@alone()
def draw_top_losses(learn: Learner, losses: Tensor, n: int = 9) -> Figure:
    """fastai's view of the test images with the largest `losses`, (N,) float on the CPU."""
    interp = ClassificationInterpretation(learn, learn.dls.valid, losses)  # from_learner would test once more
    with learn.no_bar():
        interp.plot_top_losses(min(n, len(interp.losses)), figsize=(10, 9.5), interpolation='nearest')
    for ax in plt.gcf().axes:
        parts = [short(part) for part in ax.get_title().split('/')]  # prediction/actual/loss/probability
        ax.set_title(' / '.join(parts), fontsize=10)
    return plt.gcf()


@with_names
def draw_confusions(targets: Tensor, predicted: Tensor, vocab: list[str]) -> Figure:
    """How often each class (row) was taken for each other (column); both (N,) int64."""
    few = len(vocab) <= 30  # more numbers would not be legible
    fig, ax = plt.subplots(figsize=(8, 7.5) if few else (12, 11.5), layout='constrained')
    display = ConfusionMatrixDisplay.from_predictions(
        targets, predicted, labels=range_of(vocab), display_labels=[short(c, 20) for c in vocab], include_values=few,
        xticks_rotation='vertical', cmap='Blues', colorbar=False, ax=ax)
    errors = display.confusion_matrix - np.diag(display.confusion_matrix.diagonal())
    display.im_.set_clim(0, 2 * errors.max() or 1)  # beside the diagonal errors would be hard to see
    ax.tick_params(labelsize=min(10, 500 / len(vocab)))
    ax.set(xlabel='predicted', ylabel='actual', title='Confusion matrix of the test set')
    return fig


@with_names
def draw_augmented(dls: DataLoaders, augmentations: list[str], n: int = 24) -> Figure:
    """A training batch as the network sees it; it draws from generators of its own."""
    rng, dls.train.rng = dls.train.rng, random.Random(0)
    with no_random(0): dls.train.show_batch(max_n=n, nrows=3, figsize=(12, 5.2), interpolation='nearest')
    dls.train.rng = rng
    for ax in plt.gcf().axes: ax.set_title(short(ax.get_title()), fontsize=10)
    plt.gcf().suptitle(f'Training images as the network sees them: {", ".join(augmentations)}')
    return plt.gcf()
