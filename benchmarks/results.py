#!/usr/bin/env python
"""Makes the tables and figures of `docs/recipes/README.md` from the results of `recipes.py`, which lie beside it.

    python benchmarks/results.py
"""
import json
import re
import statistics
import sys
from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import errors  # isort: skip  # noqa: F401, before fastai, whose import it silences

import matplotlib.pyplot as plt
import numpy as np
from fastai.callback.schedule import combined_cos
from fastcore.basics import groupby
from fastcore.script import call_parse
from matplotlib.figure import Figure
from recipes import ARMS, PCT_START

from report import rate, table
from run import save_figure, write_whole

HEAD = """# Repeated runs

`python benchmarks/results.py` made this page and its figures from the results in the folders beside it, which
`benchmarks/recipes.py` and `benchmarks/gpu.py` wrote, on the genuine CIFAR-10. ± is the standard deviation over the
seeds; one run has none. Flip averaging: the accuracy by the mean log-probability of an image and its mirror image."""
AVERAGED = """Each run also keeps exponential moving averages of its weights. "More than the first" is more
than the first row, over the seeds that both have, in points."""
HELD_OUT = """Accuracy on a tenth of the training images, which was held out; the test set was not looked at and
chooses nothing."""
OPTION = r'(epochs|every|bs)-(\d+)'  # in the names of folders
WORDS = dict(
    seeds="""`python train_fastai.py` as it is, under several seeds, and with a quarter of LRMAX (and `--ema 0.995`),
which was the default when the first results came. Each run finds its own learning rates.""",
    test=f"""Recipes on all training images, with the test set, which reports and chooses nothing. {AVERAGED}""",
    finder="""The rates that the program finds, from least to largest, for several sizes of batches and data sets.
Each is one finder of 100 batches; with batches of 8 it is the one of seven with the median LRMAX. `minimum` is
fastai's suggestion for the peak. The curves are those of batches of 512 from all images.""",
    schedule=f"""Test accuracy with three ends of the cycle: LRMIN, as this program reads the assignment; fastai's
literal `div_final=1`, which holds LRMAX; fastai's default `div_final=1e5`, annihilation. Made by an earlier version of
`recipes.py`: the plain recipe (weight decay 0.01, no smoothing, padding with the mean colour), with averages of a
constant decay, which in so short a run still hold the beginnings. All else is equal. {AVERAGED}""",
    peak=f"""{HELD_OUT} LRMAX as found, a third of it, or three times of it. {AVERAGED}""",
    ingredients=f"""{HELD_OUT} A recipe's name says how it differs from the default; each run finds its rates.
{AVERAGED}""")


def load(folder: Path, arms: Iterable[str]) -> dict[str, list[dict]]:
    """The results in `folder` of those of the `arms` that have any, each in the order of its seeds."""
    found = {a: [json.loads(f.read_text()) for f in folder.glob('*.json') if f.stem.rpartition('-')[0] == a]
             for a in arms}
    return {a: sorted(runs, key=itemgetter('seed')) for a, runs in found.items() if runs}


def spread(values: list[float], form: str = '.2f') -> str:
    """Mean ± standard deviation, as 92.73 ± 0.15; one value alone has no deviation."""
    sd = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{sd}'


def mean_accuracy(shares: list[float]) -> str:
    """`spread` of accuracies between 0 and 1, as 92.73 ± 0.15 %."""
    return f'{spread([100 * share for share in shares])} %'


def seeds_table(arms: dict[str, list[dict]]) -> str:
    """A row per run of train_fastai.py, and their mean, for each arm."""
    shares = 'train_accuracy', 'test_accuracy', 'test_accuracy_flip'
    rows = []
    for name, runs in arms.items():
        rows += [(name, r['seed'], rate(r['lr_min']), rate(r['lr_max']), *(mean_accuracy([r[k]]) for k in shares),
                  r['first_epoch_over_90'] or 'none') for r in runs]
        means = [f'**{mean_accuracy([r[k] for r in runs])}**' for k in shares]
        rows.append((f'**{name}**', f'mean ± sd, N = {len(runs)}', '', '', *means, ''))
    head = ('recipe', 'seed', 'LRMIN', 'LRMAX', 'training accuracy', 'test accuracy', 'flip averaging',
            'first epoch over 90 %')
    return table(f'| {" | ".join(head)} |\n|---|---|--:|--:|--:|--:|--:|--:|', rows)


def finder_table(arms: dict[str, list[dict]]) -> str:
    """A row a size of the batches and the data, `arms` by their options: how far apart the finder's rates are."""
    rows = []
    for options, runs in arms.items():
        size = {option: int(value) for option, value in re.findall(OPTION, options)}
        lr_min, lr_max, minimum = (sorted(r[k] for r in runs) for k in ('lr_min', 'lr_max', 'minimum'))
        rows.append((size.get('bs', 512), f'{50_000 // size.get("every", 1):,}', len(runs),
                     f'{rate(lr_min[0])} to {rate(lr_min[-1])}', f'{rate(lr_max[0])} to {rate(lr_max[-1])}',
                     *(f'{rates[-1] / rates[0]:.2g}' for rates in (lr_max, minimum))))
    head = 'batch size', 'images', 'seeds', 'LRMIN', 'LRMAX', 'largest / smallest LRMAX', 'the same of `minimum`'
    return table(f'| {" | ".join(head)} |\n|--:|--:|--:|--:|--:|--:|--:|', sorted(rows, key=itemgetter(0, 1)))


def recipes_table(arms: dict[str, list[dict]]) -> str:
    """A row per arm and per average of its weights: accuracy, plain and by flip averaging, over the seeds."""
    rows, first = [], {r['seed']: r['accuracy'] for r in next(iter(arms.values()))}
    for name, runs in arms.items():
        last = [r['history'][-1]['train_accuracy'] for r in runs]
        means = {f'{name} (training accuracy {mean_accuracy(last)})': runs}
        means |= {f'… weights averaged, decay {d}': [r['averages'][d] | dict(seed=r['seed']) for r in runs]
                                                    for d in runs[0]['averages']}
        for what, results in means.items():
            gains = [100 * (r['accuracy'] - first[r['seed']]) for r in results if r['seed'] in first]
            seeds = ', '.join(f'{r["seed"]}' for r in results)
            rows.append((what, seeds, mean_accuracy([r['accuracy'] for r in results]),
                         spread(gains, '+.2f') if gains and rows else '',
                         mean_accuracy([r['accuracy_flip'] for r in results])))
    return table('| recipe | seeds | accuracy | more than the first | flip averaging |\n|---|---|--:|--:|--:|', rows)


def peak_table(arms: dict[str, list[dict]]) -> str:
    """`recipes_table`, and the rates that the finder gave under each seed."""
    found = [f'{rate(r["lr_min"])} and {rate(r["lr_max"] / r.get("times", 1))} (seed {r["seed"]})'
             for r in next(iter(arms.values()))]
    return f'{recipes_table(arms)}\n\nLRMIN and LRMAX as found: {", ".join(found)}.'


def schedule_figure(arms: dict[str, list[dict]]) -> Figure:
    """The learning rate over the epochs in every arm, with its mean test accuracy."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for (name, runs), style in zip(arms.items(), ('-', '--', ':'), strict=False):
        r, shares = runs[0], [i / 1000 for i in range(1001)]
        cycle = combined_cos(PCT_START, r['lr_min'], r['lr_max'], r['lr_max'] / r['div_final'])
        ax.plot([r['epochs'] * o for o in shares], [float(cycle(o)) for o in shares], style, linewidth=2,
                label=f'{name}: {mean_accuracy([o["accuracy"] for o in runs])}')
    ax.set(xlabel='epoch', ylabel='learning rate', ylim=(0, 1.4 * r['lr_max']),
           title=f'Three ends of the cycle, test accuracy after {r["epochs"]} epochs of {r["train_images"]:,} images')
    ax.legend(loc='upper right')
    ax.grid(alpha=0.3)
    return fig


def finder_figure(arms: dict[str, list[dict]]) -> Figure:
    """The finder's curves for the first size of batches and data, with the two rates that a run takes from each."""
    runs = next(iter(arms.values()))
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for r in runs:
        line, = ax.plot(r['lrs'], r['losses'], label=f'seed {r["seed"]}')
        for k, marker in (('lr_min', 'o'), ('lr_max', 's')):
            ax.plot(r[k], np.interp(r[k], r['lrs'], r['losses']), marker, color=line.get_color())
    start, low = max(r['losses'][0] for r in runs), min(min(r['losses']) for r in runs)
    ax.set(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
           ylim=(low - 0.1 * (start - low), start + 0.5 * (start - low)),
           title='The finder under several seeds: LRMIN (circles) and LRMAX (squares)')
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def peak_figure(arms: dict[str, list[dict]]) -> Figure:
    """Accuracy against LRMAX, a line a seed: of the last step's weights, and of their shortest average."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for seed, group in groupby(chain(*arms.values()), itemgetter('seed')).items():
        runs = sorted(group, key=itemgetter('lr_max'))
        decay = next(iter(runs[0]['averages']))
        lr_maxes, averages = [r['lr_max'] for r in runs], [r['averages'][decay] for r in runs]
        line, = ax.plot(lr_maxes, [100 * r['accuracy'] for r in runs], 'o-', label=f'seed {seed}')
        ax.plot(lr_maxes, [100 * r['accuracy'] for r in averages], 's--', color=line.get_color(),
                label=f'seed {seed}, weights averaged, decay {decay}')
    r = runs[0]
    ax.set(xscale='log', xlabel='LRMAX (log scale)', ylabel='accuracy on held-out images, %',
           title=f'LRMAX as found, a third and three times of it, {r["epochs"]} epochs of {r["train_images"]:,} images')
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


TABLES = dict(
    seeds=seeds_table, test=recipes_table, finder=finder_table, schedule=recipes_table, peak=peak_table,
    ingredients=recipes_table)
FIGURES = dict(finder=finder_figure, schedule=schedule_figure, peak=peak_figure)


def devices(arms: dict[str, list[dict]]) -> str:
    """What the runs were made on; where they differ, with the arms."""
    used = groupby([(r['device'], name) for name, runs in arms.items() for r in runs], 0, 1)
    if len(used) == 1: return next(iter(used))
    return '; '.join(f'{device} ({", ".join(dict.fromkeys(names))})' for device, names in sorted(used.items()))


def command(name: str, size: str, arms: dict[str, list[dict]]) -> str:
    """What `recipes.py` was called with for the `arms`; `size` is the name of their folder."""
    seeds = sorted({r['seed'] for runs in arms.values() for r in runs})
    some = f' --arms {",".join(arms)}' if arms.keys() != ARMS[name].keys() else ''
    options = ''.join(f' --{option} {value}' for option, value in re.findall(OPTION, size))
    return f'python benchmarks/recipes.py {name} --seeds {",".join(map(str, seeds))}{some}{options}'


def page(folder: Path) -> str:
    """All tables of the results in `folder`, as Markdown; draws their figures into it."""
    parts = [HEAD, *(f.read_text().strip() for f in folder.glob('found.md'))]  # what somebody made of them
    for name in WORDS:
        sections = {}  # by the folder of their files: the arms and commands
        for files in sorted({f.parent for f in folder.glob(f'{name}/**/*.json')}):
            if not (arms := load(files, ARMS[name])): continue  # the folder of a run
            if name == 'finder':  # all sizes in one table
                size = files.relative_to(folder/name).as_posix().strip('.')
                all_sizes, commands = sections.setdefault(folder/name, ({}, []))
                all_sizes[size or 'bs-512'] = arms['lr-find']
                commands.append(command(name, size, arms))
            else: sections[files] = arms, [command(name, f'epochs-{files.name}', arms)]
        for files, (arms, commands) in sections.items():
            r, title = next(iter(arms.values()))[0], name.capitalize()
            if epochs := r.get('epochs'):
                title += f', {epochs} epochs of {r["train_images"]:,} images, tested on {r["test_images"]:,}'
            parts += [f'## {title}', '\n'.join(['```', *commands, '```']), WORDS[name], TABLES[name](arms)]
            if name in FIGURES:
                png = files.relative_to(folder).with_suffix('.png').as_posix().replace('/', '-')
                save_figure(folder/png, FIGURES[name], arms)
                parts.append(f'![{title}]({png})')
            parts.append(f'Device: {devices(arms)}.')
    return '\n\n'.join(parts) + '\n'


@call_parse
def main(
    folder: str = str(ROOT/'docs/recipes'),  # of the results, as recipes.py left them
):
    "Make the tables and figures of the results in a folder."
    write_whole(Path(folder)/'README.md', page(Path(folder)).encode())
