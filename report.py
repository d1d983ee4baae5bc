"""Numbers into words: the tables of an evaluation and the report of a run."""
import math
import re

from torch import Tensor

REFERENCE = dict(parameters=6_573_130, train_accuracy=.9860, test_accuracy=.9307, first_epoch_over_90=19)

FINDER = """
![Smoothed training loss against the learning rate](lr_find.png)

*The finder raises the rate from batch to batch and watches the loss. LRMIN is its `valley`, a rate in the middle of the
longest descent. LRMAX is its `minimum`, a tenth of the rate with the least loss, well before the loss explodes.*
"""
TASTE = """
> **A taste**: one image in ten, few epochs, small batches. It shows what a run leaves; its numbers say nothing of the
> recipe.
"""


def class_accuracies(counts: Tensor, vocab: list[str]) -> dict[str, tuple[int, float, float]]:
    """For each class its images, the share of them found (accuracy, or recall) and of its predictions that are right.

    `counts` is a confusion matrix, (classes, classes) int64. A share of nothing is NaN.
    """
    return {c: (n.item(), (right / n).item(), (right / named).item())
            for c, right, n, named in zip(vocab, counts.diag(), counts.sum(1), counts.sum(0), strict=True)}


def confusion_matrix(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Counts of images, (classes, classes) int64: rows are actual classes, columns predictions.

    `log_probs` (N, classes) float, `targets` (N,) int64.
    """
    n = log_probs.shape[1]
    return (targets * n + log_probs.argmax(1)).bincount(minlength=n * n).view(n, n)


def percent(share: float) -> str:
    """`share` as 92.7%, and a dash for NaN."""
    return '–' if math.isnan(share) else f'{share:.1%}'


def most_confused(counts: Tensor, vocab: list[str], n: int = 10) -> list[tuple[str, str, int]]:
    """The at most `n` commonest errors as (actual, predicted, images), from a confusion matrix."""
    errors = counts - counts.diag().diag()
    order = errors.flatten().argsort(descending=True, stable=True)[:n].tolist()
    pairs = [(divmod(i, len(vocab)), errors.flatten()[i].item()) for i in order]
    return [(vocab[a], vocab[p], k) for (a, p), k in pairs if k]


def escaped(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return re.sub(r'([\\|*_`<>\[\]$])', r'\\\1', text)


def rate(lr: float) -> str:
    """A learning rate in Markdown, as 2.29·10⁻³."""
    digits, exponent = f'{lr:.2e}'.split('e')
    return f'{digits}·10{str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))}'


def table(head: str, rows: list[tuple]) -> str:
    """A Markdown table of `rows`; `head` is its head and the line below, which aligns the columns."""
    return '\n'.join([head, *(f'| {" | ".join(map(str, row))} |' for row in rows)])


def run_report(m: dict, command: str, history: list[dict], schedule: list[dict], wrong: list[dict],
               counts: Tensor) -> str:
    """A run on one page of Markdown, its figures included.

    `m` are its metrics and `command` started it; `history`, `schedule` and `wrong` are the rows of history.csv,
    schedule.csv and misclassified.csv, `counts` is the confusion matrix.
    """
    o, vocab, one, last = m['options'], m['classes'], history[0], history[-1]
    peak, per_epoch = max(schedule, key=lambda row: row['lr']), len(schedule) // m['epochs']
    start, top, end = rate(schedule[0]['lr']), rate(peak['lr']), rate(schedule[-1]['lr'])
    finder, over = not o['lr_min'], m['first_epoch_over_90']
    average = ', from the average of the weights' if o['ema'] else ''
    gap = 100 * (m['train_accuracy'] - m['test_accuracy'])
    confused = ', '.join(f'{escaped(a)} → {escaped(p)} ({k})' for a, p, k in most_confused(counts, vocab, 3))

    numbers = table('| | this run | reference solution, CIFAR-10 |\n|---|--:|--:|', [
        ('parameters', f'{m["parameters"]:,}', f'{REFERENCE["parameters"]:,}'),
        ('training accuracy, last epoch', f'{m["train_accuracy"]:.2%}', f'{REFERENCE["train_accuracy"]:.2%}'),
        ('test accuracy, last epoch', f'{m["test_accuracy"]:.2%}', f'{REFERENCE["test_accuracy"]:.2%}'),
        ('first epoch over 90% test accuracy', over or 'none', REFERENCE['first_epoch_over_90'])])
    assignment = table('| | asked | done |\n|---|---|---|', [
        ('network', "the assignment's ResNet, 6,573,130 parameters", f'{m["parameters"]:,} parameters'),
        ('last stage', 'SoftMax', 'its logarithm: `exp` of the output are the probabilities'),
        ('loss', 'cross-entropy', 'cross-entropy'),
        ('optimizer', 'Adam', 'Adam, decoupled weight decay 0.01 (none on batch norm and biases)'),
        ('weights tested and kept', 'not said',
         f'their exponential moving average, decay {o["ema"]:g} a step' if o['ema'] else 'those of the last step'),
        ('epochs', 24, m['epochs']),
        ('batch size', 512, m['batch_size']),
        ('LRMIN, LRMAX', 'by the LR finder',
         f'{rate(m["lr_min"])}, {rate(m["lr_max"])}, {"by `learn.lr_find`" if finder else "by hand"}'),
        ('one cycle', 'LRMIN → LRMAX at epoch 5 of 24 → LRMIN',
         f'{start} → {top} at epoch {(peak["batch"] - 1) / per_epoch:.3g} of {m["epochs"]} → {end}'),
        ('augmentation', 'pad 4, random crop 32×32, flip left-right, cutout 8×8', 'the same, training images only'),
        ('training images', '50,000', f'{m["train_images"]:,}'),
        ('test images', '10,000', f'{m["test_images"]:,}'),
        ('test accuracy', '90%', f'{m["test_accuracy"]:.2%}')])
    classes = table('| class | images | found (accuracy) | right when named |\n|---|--:|--:|--:|', [
        (escaped(c), f'{n:,}', percent(found), percent(right))
        for c, (n, found, right) in class_accuracies(counts, vocab).items()])

    return f'''# A ResNet that finds its own learning rates
{TASTE if o['taste'] else ''}
After epoch {m['epochs']} the network names {m['test_accuracy']:.2%} of {m['test_images']:,} test images correctly.
90% were asked, {f'and passed for the first time after epoch {over}' if over else 'and not reached'}.

{numbers}

## What was asked, what was done

{assignment}

## Learning rates
{FINDER if finder else ''}
![Learning rate and momentum of every training batch](schedule.png)

*One cycle: the rate rises from {start} to {top}, its peak at training batch {peak['batch']:,} of {len(schedule):,},
and falls to {end}{', where it started: no annihilation' if o['final_div'] == 1 else ''}.
Momentum goes the other way.*

## Training

![Loss and accuracy of both sets, epoch by epoch](history.png)

*From the first to the last epoch the training loss goes from {one['train_loss']:.3f} to {last['train_loss']:.3f},
the test loss from {one['test_loss']:.3f} to {last['test_loss']:.3f}. At the end the training accuracy lies
{abs(gap):.1f} points {'above' if gap > 0 else 'below'} the test accuracy. Training figures are means over an epoch's
batches as trained on, augmented and with the weights of that moment; test figures come after the epoch{average}.
The numbers are in [history.csv](history.csv).*

## What it knows

{classes}

![Confusion matrix of the test set](confusion_matrix.png)

*Rows are actual classes, columns what the network said. Its commonest errors: {confused or 'none'}.*

## What it gets wrong

{len(wrong):,} of {m['test_images']:,} test images. All are in [misclassified.csv](misclassified.csv), worst first.

![Ten misclassified test images](misclassified.png)

*Those with the largest loss: the less probable the network holds the actual class, the larger it is.*

![The largest losses, as fastai shows them](top_losses.png)

*fastai's view of the largest losses: prediction, actual class, loss, and the probability of the prediction.*

## What it saw

![Training images after augmentation](augmented.png)

*A training batch: each image moved by up to four pixels, half of them mirrored, a square of 8×8 pixels covered.*

## To do it again

    {command}

on {m['device']}, in {m['precision']}, with {', '.join(f'{k} {v}' for k, v in m['versions'].items())}. Training took
{m['seconds_training']:,.0f} s, everything together {m['seconds_total']:,.0f} s.
'''
