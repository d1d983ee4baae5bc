"""A run as one page of Markdown."""
import math
import re

import pandas as pd

from lab.finder import FINDERS, PEAK_SHARE, SMALL_BATCH

REFERENCE = dict(parameters=6_573_130, train_accuracy=.9860, test_accuracy=.9307, first_epoch_over_90=19)

FINDER = f"""
![Smoothed training loss against the learning rate](lr_find.png)

*The finder raises the rate from batch to batch and records the loss. LRMIN is its `valley` suggestion, a rate in the
middle of the longest descent, but at most a tenth of LRMAX. LRMAX is {PEAK_SHARE} times the middle of the rates whose
loss is close to the least.*
"""
SEVERAL = f"""
*With batches smaller than {SMALL_BATCH} finders disagree: this is the one of {FINDERS} with the median LRMAX (or a
single one, if an epoch is short).*
"""
QUICK = """
> **A quick look**: one image in ten, a few epochs, small batches. It shows what a run writes; its numbers say nothing
> about the recipe.
"""


def percent(share: float, decimals: int = 1) -> str:
    """`share` as 92.7 %, and a dash for NaN."""
    return '–' if math.isnan(share) else f'{100 * share:.{decimals}f} %'


def escape(text: str) -> str:
    """`text` with the characters escaped that mean something in Markdown."""
    return re.sub(r'([\\|*_`<>\[\]$])', r'\\\1', text)


def format_rate(lr: float) -> str:
    """A learning rate in Markdown, as 2.29·10⁻³."""
    digits, exponent = f'{lr:.2e}'.split('e')
    return f'{digits}·10{str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))}'


def table(head: str, rows: list[tuple]) -> str:
    """A Markdown table of `rows`; `head` is its first two lines: names and alignment."""
    return '\n'.join([head, *(f'| {" | ".join(map(str, row))} |' for row in rows)])


def write_report(m: dict, command: str, history: list[dict], schedule: list[dict], wrong: int, classes: pd.DataFrame,
               confused: pd.DataFrame) -> str:
    """A run on one page of Markdown, figures included.

    `m` is its metrics.json, `command` started it; `history` and `schedule` are the rows of history.csv and
    schedule.csv, `classes` is classes.csv, `wrong` the number of misclassified images, `confused` the most frequent
    errors as `actual, predicted, images`.
    """
    o, recipe, one, last = m['options'], m['recipe'], history[0], history[-1]
    peak, per_epoch = max(schedule, key=lambda row: row['lr']), len(schedule) // m['epochs']
    start, top, end = format_rate(schedule[0]['lr']), format_rate(peak['lr']), format_rate(schedule[-1]['lr'])
    finder, over, smoothing = not o['lr_min'], m['first_epoch_over_90'], recipe['label_smoothing']
    augmentation = escape(', '.join(recipe['augmentation'])) or 'none'
    stage = escape(recipe['last_stage']) + (
        ': `exp` of the output gives the probabilities' if recipe['last_stage'] == 'LogSoftmax' else '')
    target = format_rate(o['lr_end'] or m['lr_min']) + ('' if o['lr_end'] else ', where it started: no annihilation')
    gap = 100 * (m['train_accuracy'] - m['test_accuracy'])
    errors = ', '.join(f'{escape(a)} → {escape(p)} ({k})' for a, p, k in confused.itertuples(index=False)) or 'none'
    by_recall = classes.sort_values('recall', kind='stable')
    shown = classes if len(classes) <= 20 else pd.concat([by_recall[:10], by_recall[-5:]])
    some = '' if shown is classes else f'\n\nThe 10 worst and the 5 best of {len(classes)} classes, by recall.'

    numbers = table('| | this run | reference solution, CIFAR-10 |\n|---|--:|--:|', [
        ('parameters', f'{m["parameters"]:,}', f'{REFERENCE["parameters"]:,}'),
        ('training accuracy, last epoch', percent(m['train_accuracy'], 2), percent(REFERENCE['train_accuracy'], 2)),
        ('test accuracy, last epoch', percent(m['test_accuracy'], 2), percent(REFERENCE['test_accuracy'], 2)),
        ('first epoch over 90 % test accuracy', over or 'none', REFERENCE['first_epoch_over_90'])])
    assignment = table('| | required | done |\n|---|---|---|', [
        ('network', "the assignment's ResNet, 6,573,130 parameters",
         f'{escape(recipe["network"])}, {m["parameters"]:,} parameters'),
        ('last stage', 'SoftMax', stage),
        ('loss', 'cross-entropy',
         escape(recipe['loss']) + (f', in training with label smoothing {smoothing:g}' if smoothing else '')),
        ('optimizer', 'Adam',
         f'{escape(recipe["optimizer"])}, ' + (f'weight decay {recipe["wd"]:g} (not on batch norm and biases)'
                                                if recipe['wd'] else 'no weight decay')),
        ('weights tested and kept', 'not stated',
         f'their moving average, decay {recipe["ema"]:g} per step' if recipe['ema'] else 'those of the last step'),
        ('epochs', 24, m['epochs']),
        ('batch size', 512, m['batch_size']),
        ('LRMIN, LRMAX', 'by the LR finder', f'{format_rate(m["lr_min"])}, {format_rate(m["lr_max"])}, '
                                             f'{"by `learn.lr_find`" if finder else "given"}'),
        ('one cycle', 'LRMIN → LRMAX at epoch 5 of 24 → LRMIN',
         f'{start} → {top} at epoch {(peak["batch"] - 1) / per_epoch:.3g} of {m["epochs"]} → {end}'),
        ('augmentation', 'pad 4, random crop 32×32, flip left-right, cutout 8×8', augmentation),
        ('training images', '50,000', f'{m["train_images"]:,}'),
        ('test images', '10,000', f'{m["test_images"]:,}'),
        ('test accuracy', '90 %', percent(m['test_accuracy'], 2))])
    scores = table('| class | images | recall | precision |\n|---|--:|--:|--:|', [
        (escape(c), f'{n:,}', percent(recall), percent(precision))
        for c, n, recall, precision in shown.itertuples(index=False)])

    title = 'Quick look' if o['quick'] else f'{escape(recipe["network"])} with fastai'
    return f'''# {title}: {percent(m['test_accuracy'], 2)} in {m['epochs']} epoch{'s' * (m['epochs'] > 1)}
{QUICK if o['quick'] else ''}
After epoch {m['epochs']} the network classifies {percent(m['test_accuracy'], 2)} of {m['test_images']:,} test images
correctly. The target of 90 % was {f'first passed at epoch {over}' if over else 'not reached'}.

{numbers}

## What was required, what was done

{assignment}

## Learning rates
{FINDER if finder else ''}{SEVERAL if finder and m['batch_size'] < SMALL_BATCH else ''}
![Learning rate and momentum of every training batch](schedule.png)

*One cycle: the rate rises from {start} to {top}, its peak at training batch {peak['batch']:,} of {len(schedule):,},
and falls towards {target}. The last batch has {end}. Momentum moves in the opposite direction.*

## Training

![Loss and accuracy of both sets, epoch by epoch](history.png)

*The training loss{' (labels smoothed)' if smoothing else ''} goes from {one['train_loss']:.3f} to
{last['train_loss']:.3f}, the test loss from {one['test_loss']:.3f} to {last['test_loss']:.3f}. At the end the training
accuracy is {abs(gap):.1f} points {'above' if gap > 0 else 'below'} the test accuracy. Training figures are means
over an epoch's batches as trained on: augmented, with the weights of that moment. Test figures are computed after the
epoch{', with the averaged weights' if recipe['ema'] else ''}. The numbers are in [history.csv](history.csv).*

## By class

{scores}{some}

![Confusion matrix of the test set](confusion_matrix.png)

*Rows are actual classes, columns predictions. The most frequent errors: {errors}. All classes are in
[classes.csv](classes.csv).*

## Errors

{wrong:,} of {m['test_images']:,} test images are misclassified. [errors.html](errors.html) shows all of them, and
[misclassified.csv](misclassified.csv) lists them, those with the largest loss first.

![Ten misclassified test images](misclassified.png)

*The ten whose actual class received the smallest probabilities.*

![The largest losses, as fastai shows them](top_losses.png)

*fastai's view of the largest losses: prediction, actual class, loss, and the probability of the prediction.*

## What the network sees

![Training images after augmentation](augmented.png)

*A training batch after {augmentation}.*

## How to repeat it

    {command}

on {m['device']}, in {m['precision']}, with {', '.join(f'{k} {v}' for k, v in m['versions'].items())}. Training took
{m['seconds_training']:,.0f} s, the whole run {m['seconds_total']:,.0f} s.
'''
