"""The figures of a run, one function each: recorded numbers, or one of fastai's views, to a matplotlib figure."""
from fastai.vision.all import *
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.loader import list_augmentations
from lab.report import format_rate
from lab.speed import keep_random_state

TRAIN, TEST, MARK = 'tab:blue', 'tab:orange', 'tab:red'  # one colour for one thing in all figures
# Class names are shown letter by letter (one may be called $x$), in the first of these fonts that has the letters.
FONTS = ('DejaVu Sans', 'Noto Sans', 'Noto Sans CJK JP', 'Microsoft YaHei', 'PingFang SC', 'Segoe UI',
         'Arial Unicode MS', 'WenQuanYi Zen Hei', 'IPAGothic', 'FreeSans', 'Unifont')


def with_names(draw: Callable) -> Callable:
    """Decorator for functions that draw class names: letter by letter, in fonts that have them."""
    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        fonts = [o for o in FONTS if o in font_manager.get_font_names()]
        with plt.rc_context({'text.parse_math': False, 'font.family': fonts}): return draw(*args, **kwargs)
    return drawn


def short(name: str, width: int = 16) -> str:
    """`name`, cut to `width` letters."""
    return name if len(name) <= width else f'{name[:width - 1]}…'


def draw_lr_finder(lrs: list[float], losses: list[float], lr_min: float, lr_max: float) -> Figure:
    """The LR finder's curve, with the two rates that the run uses."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.plot(lrs, losses, color=TRAIN)
    start = losses[0]
    low = np.nanmin(losses)
    ax.set_ylim(low - 0.1 * (start - low), start + 0.5 * (start - low))  # the finder stops only far beyond the minimum
    for lr, name, align in ((lr_min, 'LRMIN', 'right'), (lr_max, 'LRMAX', 'left')):
        ax.axvline(lr, color=MARK, linestyle='--')
        text, place = f' {name} = {format_rate(lr)} ', (lr, 0.02)
        ax.annotate(text, place, xycoords=('data', 'axes fraction'), color=MARK, ha=align)
    ax.set(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
           title='Learning-rate finder')
    ax.grid(alpha=0.3)
    return fig


def draw_schedule(rows: list[dict], batches_per_epoch: int) -> Figure:
    """Learning rate and momentum of every training batch; `rows` as in schedule.csv."""
    batch, lr, momentum = ([row[k] for row in rows] for k in ('batch', 'lr', 'momentum'))
    fig, (top, bottom) = plt.subplots(2, figsize=(8, 6), sharex=True, layout='constrained', height_ratios=(2, 1))
    top.plot(batch, lr, color='black')
    peak = int(np.argmax(lr))
    for at, name, marker in ((0, 'start', '>'), (peak, 'peak', '^'), (len(lr) - 1, 'end', 's')):
        label = f'{name}: {format_rate(lr[at])}, epoch {at / batches_per_epoch:.3g}'
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
        ax.set(xlabel='epoch', ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    for ax, image, row in zip(axs.flat, images.cpu(), wrong.itertuples(), strict=False):
        ax.imshow(image.permute(1, 2, 0), interpolation='nearest')
        actual, predicted = short(row.actual), short(row.predicted)
        arrow = ' → ' if len(actual + predicted) <= 22 else ' →\n'
        ax.set_title(f'{actual}{arrow}{predicted} ({100 * row.probability:.0f} %)', fontsize=10)
    fig.suptitle(f'Misclassified test images, the worst of {len(wrong):,}: actual → predicted (probability)')
    return fig


@with_names
def draw_top_losses(learn: Learner, losses: Tensor, n: int = 9) -> Figure:
    """fastai's view of the test images with the largest `losses`, (N,) float on the CPU."""
    interp = ClassificationInterpretation(learn, learn.dls.valid, losses)  # from_learner would test once more
    interp.plot_top_losses(min(n, len(interp.losses)), figsize=(10, 9.5), interpolation='nearest')
    for ax in plt.gcf().axes:
        parts = [short(part) for part in ax.get_title().split('/')]  # prediction/actual/loss/probability
        ax.set_title(' / '.join(parts), fontsize=10)
    return plt.gcf()


@with_names
def draw_confusions(counts: ndarray, vocab: list[str]) -> Figure:
    """How often each class (row) was taken for each other (column); `counts` (classes, classes) int64."""
    n = len(vocab)
    every = -(-n // 50)  # more names than 50 would cover each other
    fig, ax = plt.subplots(figsize=(8, 7.5) if n <= 30 else (12, 11.5), layout='constrained')
    off_diagonal = counts - np.diag(counts.diagonal())
    ax.imshow(off_diagonal, cmap='Reds')  # the diagonal would drown the errors
    for i, j in itertools.product(range(n), repeat=2) if n <= 30 else ():  # more would not be legible
        dark = off_diagonal[i, j] > off_diagonal.max() / 2
        ax.text(j, i, f'{counts[i, j]}', ha='center', va='center', weight='bold' if i == j else 'normal',
                color='white' if dark else 'black')
    ticks, names = range(0, n, every), [short(c, 20) for c in vocab[::every]]
    size = 10 if n <= 30 else 8
    ax.set_xticks(ticks, names, rotation=45 if n <= 30 else 90, ha='right' if n <= 30 else 'center', fontsize=size)
    ax.set_yticks(ticks, names, fontsize=size)
    ax.set(xlabel='predicted', ylabel='actual', title='Confusion matrix of the test set (images; errors in red)')
    return fig


@with_names
def draw_augmented(dls: DataLoaders, n: int = 24) -> Figure:
    """A training batch as the network sees it; it draws from generators of its own."""
    rng = dls.train.rng
    with keep_random_state(dls.device):
        set_seed(0)
        dls.train.rng = random.Random(0)
        dls.train.show_batch(max_n=n, nrows=3, figsize=(12, 5.2), interpolation='nearest')
    dls.train.rng = rng
    fig = plt.gcf()
    for ax in fig.axes: ax.set_title(short(ax.get_title()), fontsize=10)
    fig.suptitle(f'Training images as the network sees them: {", ".join(list_augmentations(dls))}')
    return fig
