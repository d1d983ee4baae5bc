"""The figures of a run, one function a picture: recorded numbers, or fastai's own views, to a matplotlib figure."""
from fastai.vision.all import *
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data import RGBImage

TRAIN, TEST, MARK = 'tab:blue', 'tab:orange', 'tab:red'  # the same colour for the same thing in all figures
names_as_they_are = plt.rc_context({'text.parse_math': False})  # a class may be called $x$


def lr_finder(lrs: list[float], losses: list[float], lr_min: float, lr_max: float) -> Figure:
    """The LR finder's curve, with the two rates that the run uses."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.plot(lrs, losses, color=TRAIN)
    start = losses[0]
    low = np.nanmin(losses)
    ax.set_ylim(low - 0.1 * (start - low), start + 0.5 * (start - low))  # the finder stops only far beyond the minimum
    for lr, name, align in ((lr_min, 'LRMIN', 'right'), (lr_max, 'LRMAX', 'left')):
        ax.axvline(lr, color=MARK, linestyle='--')
        ax.annotate(f' {name} = {lr:.2e} ', (lr, 0.02), xycoords=('data', 'axes fraction'), color=MARK, ha=align)
    ax.set(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
           title='Learning-rate finder')
    ax.grid(alpha=0.3)
    return fig


def schedule(rows: list[dict], batches_per_epoch: int) -> Figure:
    """Learning rate and momentum of every training batch; `rows` as in schedule.csv."""
    batch, lr, momentum = ([row[k] for row in rows] for k in ('batch', 'lr', 'momentum'))
    fig, (top, bottom) = plt.subplots(2, figsize=(8, 6), sharex=True, layout='constrained', height_ratios=(2, 1))
    top.plot(batch, lr, color='black')
    peak = int(np.argmax(lr))
    for at, name, marker in ((0, 'start', '>'), (peak, 'peak', '^'), (len(lr) - 1, 'end', 's')):
        label = f'{name}: {lr[at]:.2e}, epoch {at / batches_per_epoch:.3g}'
        top.plot(batch[at], lr[at], marker, color=MARK, label=label)
    top.legend(loc='upper right')
    top.set(ylabel='learning rate', title='Learning rate and momentum per iteration', ylim=(0, 1.15 * max(lr)))
    epochs = top.secondary_xaxis('top', functions=(lambda b: b / batches_per_epoch, lambda e: e * batches_per_epoch))
    epochs.set_xlabel('epoch')
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.plot(batch, momentum, color='black')
    bottom.set(xlabel='iteration (training batch)', ylabel='momentum (β₁)')
    for ax in (top, bottom): ax.grid(alpha=0.3)
    return fig


def history(rows: list[dict], target: float = 0.9) -> Figure:
    """Loss and accuracy of both sets, epoch by epoch; `rows` as in history.csv."""
    epoch = [row['epoch'] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for ax, name in ((left, 'loss'), (right, 'accuracy')):
        for split, color, marker in (('train', TRAIN, 's'), ('test', TEST, 'o')):
            ax.plot(epoch, [row[f'{split}_{name}'] for row in rows], color=color, marker=marker, markersize=4,
                    label='training (augmented)' if split == 'train' else 'test')
        ax.set(xlabel='epoch', ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    left.set(title='Cross-entropy loss', ylabel='loss (nats)')
    right.axhline(target, color=MARK, linestyle='--', label=f'target, {target:.0%}')
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_title(f'Accuracy (test after the last epoch: {rows[-1]["test_accuracy"]:.2%})')
    left.legend()
    right.legend(loc='lower right')
    return fig


@names_as_they_are
def misclassified(folder: Path, rows: list[dict], n: int = 10) -> Figure:
    """The first `n` images of `rows`, as in misclassified.csv: those that the network got most wrong."""
    cols = 5
    lines = -(-min(n, max(len(rows), 1)) // cols)
    fig, axs = plt.subplots(lines, cols, figsize=(11, 0.4 + 2.5 * lines), layout='constrained')
    for ax in axs.flat: ax.axis('off')
    for ax, row in zip(axs.flat, rows[:n], strict=False):
        ax.imshow(RGBImage.create(folder/row['file']), interpolation='nearest')
        ax.set_title(f'{row["actual"]} → {row["predicted"]}\n({row["probability"]:.0%})', fontsize=11)
    fig.suptitle(f'Misclassified test images, worst of {len(rows):,}: actual → predicted (probability)')
    return fig


@names_as_they_are
def top_losses(interp: Interpretation, n: int = 9) -> Figure:
    """fastai's view of the test images with the largest losses."""
    interp.plot_top_losses(min(n, len(interp.losses)), figsize=(10, 9.5), interpolation='nearest')
    return plt.gcf()


@names_as_they_are
def confusion_matrix(counts: Tensor, vocab: list[str]) -> Figure:
    """How often each class (row) was taken for each other (column); `counts` (classes, classes) int64."""
    fig, ax = plt.subplots(figsize=(8, 7.5), layout='constrained')
    off_diagonal = counts - torch.diag(counts.diag())
    ax.imshow(off_diagonal, cmap='Reds')  # the diagonal would drown the errors, which one comes to see
    for i, j in itertools.product(range(len(vocab)), repeat=2) if len(vocab) <= 30 else ():  # legible, and soon drawn
        dark = off_diagonal[i, j] > off_diagonal.max() / 2
        ax.text(j, i, f'{counts[i, j]}', ha='center', va='center', weight='bold' if i == j else 'normal',
                color='white' if dark else 'black')
    ax.set_xticks(range(len(vocab)), vocab, rotation=45, ha='right')
    ax.set_yticks(range(len(vocab)), vocab)
    ax.set(xlabel='predicted', ylabel='actual', title='Confusion matrix of the test set (images; errors in red)')
    return fig


@names_as_they_are
def augmented(dls: DataLoaders, n: int = 24) -> Figure:
    """A training batch as the network sees it: cropped, flipped, with its hole."""
    dls.train.show_batch(max_n=n, nrows=3, figsize=(12, 5.2), interpolation='nearest')
    fig = plt.gcf()
    fig.suptitle('Training images as the network sees them: pad 4 + crop, flip, cutout 8×8')
    return fig
