#!/usr/bin/env python
"""Make the page of results: fill `page.md` with tables and figures of `results.csv` and `finder.csv`.

    python -m experiments.page                              # experiments/README.md
    python -m experiments.page --folder runs/experiments    # results of your own, without words
"""
import lab.errors  # isort: skip  # noqa: F401, before fastai, whose import warning it silences

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from fastai.callback.schedule import combined_cos
from fastcore.script import call_parse
from matplotlib.figure import Figure

from experiments.repeat import ARMS, DRAWN, FINDER_TABLES, PCT_START, load_results
from lab.report import format_rate
from lab.report import table as make_table
from lab.runs import save_figure, write_whole


def format_mean(values: pd.Series, form: str = '.2f') -> str:
    """Mean ± standard deviation, as 92.73 ± 0.15; a single value has no deviation."""
    return f'{values.mean():{form}}' + (f' ± {values.std():.2f}' if len(values) > 1 else '')


def format_percent(shares: pd.Series) -> str:
    """`format_mean` of shares between 0 and 1, as 92.73 ± 0.15 %."""
    return f'{format_mean(100 * shares)} %'


def format_range(rates: pd.Series) -> str:
    """The lowest and the highest of some learning rates."""
    return ' to '.join(dict.fromkeys(map(format_rate, (rates.min(), rates.max()))))


def tabulate_seeds(runs: pd.DataFrame) -> str:
    """A row per run of train_fastai.py, and their mean, for each arm."""
    shares, rows = ['train_accuracy', 'accuracy', 'accuracy_flip'], []
    for arm, group in runs.groupby('arm', sort=False):
        rows += [(arm, r.seed, format_rate(r.lr_min), format_rate(r.lr_max), *(f'{100 * o:.2f} %' for o in r[shares]),
                  'none' if pd.isna(r.first_epoch_over_90) else int(r.first_epoch_over_90))
                 for _, r in group.iterrows()]
        if len(group) == 1: continue
        means = [f'**{format_percent(group[share])}**' for share in shares]
        rows.append((f'**{arm}**', f'mean ± sd, N = {len(group)}', '', '', *means, ''))
    return make_table('| recipe | seed | LRMIN | LRMAX | training accuracy | test accuracy | flip averaging '
                      '| first epoch over 90 % |\n|---|---|--:|--:|--:|--:|--:|--:|', rows)


def tabulate_finders(runs: pd.DataFrame) -> str:
    """A row per finder, batch size and size of the data set: how far apart the finder's rates are."""
    rows = []
    for (bs, images, arm), group in runs.groupby(['batch_size', 'train_images', 'arm']):
        ratios = [f'{group[k].max() / group[k].min():.2g}' for k in ('lr_max', 'minimum')]
        rows.append((arm, bs, f'{images:,}', len(group), *map(format_range, (group.lr_min, group.lr_max)), *ratios))
    return make_table('| finder | batch size | images | N | LRMIN | LRMAX | highest / lowest LRMAX '
                      '| the same of `minimum` |\n|---|--:|--:|--:|--:|--:|--:|--:|', rows)


def tabulate_arms(runs: pd.DataFrame) -> str:
    """A row per arm and kind of weights; the gain is over the first row, on the seeds that both have, in points."""
    rows, runs = [], runs.set_index('seed')
    for (arm, ema), group in runs.groupby(['arm', 'ema'], sort=False):
        if not rows: first = group.accuracy
        gains = 100 * (group.accuracy - first).dropna() if rows else []
        rows.append((arm, f'average, decay {ema:g}' if ema else 'last step',
                     f'{len(group)} ({", ".join(map(str, group.index))})', '' if ema else format_range(group.lr_max),
                     '' if ema else format_percent(group.train_accuracy), format_percent(group.accuracy),
                     format_mean(gains, '+.2f') if len(gains) else '', format_percent(group.accuracy_flip)))
    return make_table('| recipe | weights | N (seeds) | LRMAX | training accuracy | accuracy | gain '
                      '| flip averaging |\n|---|---|---|--:|--:|--:|--:|--:|', rows)


def make_axes(**properties) -> plt.Axes:
    """The axes of a new figure."""
    _, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    ax.set(**properties)
    ax.grid(alpha=0.3)
    return ax


def draw_schedules(runs: pd.DataFrame, folder: Path) -> Figure:
    """The learning rate over the epochs in every arm, with its mean test accuracy."""
    runs, shares, r = runs[runs.ema == 0], np.linspace(0, 1, 1001), runs.iloc[0]
    ax = make_axes(xlabel='epoch', ylabel='learning rate', ylim=(0, 1.4 * r.lr_max),
                   title=f'Three ends of the cycle, test accuracy after {r.epochs} epochs of {r.train_images:,} images')
    for (arm, group), style in zip(runs.groupby('arm', sort=False), ('-', '--', ':'), strict=False):
        r = group.iloc[0]
        cycle = combined_cos(PCT_START, r.lr_min, r.lr_max, r.lr_max / r.div_final)
        ax.plot(r.epochs * shares, [float(cycle(o)) for o in shares], style, linewidth=2,
                label=f'{arm}: {format_percent(group.accuracy)}')
    ax.legend(loc='upper right')
    return ax.figure


def draw_finders(runs: pd.DataFrame, folder: Path) -> Figure:
    """The curves in finder.csv, one per seed, with the two rates that a run takes from each."""
    runs = runs[(runs.batch_size == DRAWN) & (runs.every == 1)].set_index('seed')
    curves = pd.read_csv(folder/'finder.csv')
    start, low = curves.groupby('seed').loss.first().max(), curves.loss.min()
    ax = make_axes(xscale='log', xlabel='learning rate (log scale)', ylabel='smoothed training loss',
                   ylim=(low - 0.1 * (start - low), start + 0.5 * (start - low)),
                   title='The finder under several seeds: LRMIN (circles) and LRMAX (squares)')
    for seed, curve in curves.groupby('seed'):
        line, = ax.plot(curve.lr, curve.loss, label=f'seed {seed}')
        for column, marker in (('lr_min', 'o'), ('lr_max', 's')):
            lr = runs.loc[seed, column]
            ax.plot(lr, np.interp(lr, curve.lr, curve.loss), marker, color=line.get_color())
    ax.legend()
    return ax.figure


def describe_devices(runs: pd.DataFrame) -> str:
    """What the runs were made with; where that differs, which arms or, of a single arm, how many runs."""
    versions = ('torch ' + runs.torch + ', fastai ' + runs.fastai).fillna('versions not recorded')
    used = runs.arm.groupby(runs.device + ', ' + versions)
    which = used.unique().map(', '.join) if runs.arm.nunique() > 1 else used.size().map('N = {}'.format)
    return '; '.join(f'{made_with} ({o})' if len(which) > 1 else made_with for made_with, o in which.items())


def write_command(runs: pd.DataFrame) -> str:
    """The call of repeat.py that makes `runs`, which are of one table and size."""
    r = runs.iloc[0]
    command = f'python -m experiments.repeat {r.table} --seeds {",".join(map(str, sorted(runs.seed.unique())))}'
    if {*runs.arm} != {*ARMS[r.table]}: command += f' --arms {",".join(runs.arm.unique())}'
    options = ('epochs', r.epochs, 0), ('every', r.every, 1), ('bs', r.batch_size, 512)
    return command + ''.join(f' --{option} {value}' for option, value, default in options if value != default)


TABLES = dict(seeds=tabulate_seeds, test=tabulate_arms, finder=tabulate_finders, schedule=tabulate_arms,
              ingredients=tabulate_arms) | {'finder-length': tabulate_finders}
FIGURES = dict(finder=draw_finders, schedule=draw_schedules)
RUN_SIZE = ['epochs', 'every', 'batch_size']  # a section is about runs of one size
SECTIONS = dict(seeds=[*RUN_SIZE, 'processor', 'release']) | dict.fromkeys(FINDER_TABLES, ['table'])  # except in these


def make_section(runs: pd.DataFrame, folder: Path) -> str:
    """Command, table, figure and device of `runs`, which are of one table; draws the figure into `folder`."""
    table = runs.table.iloc[0]
    runs = runs.sort_values(['arm', 'ema', 'seed'], key=lambda c: c.map([*ARMS[table]].index) if c.name == 'arm' else c)
    r = runs.iloc[0]
    name = table if table in FINDER_TABLES else f'{table}-{r.epochs}-{r.every}-{r.batch_size}'
    parts = [TABLES[table](runs)]
    if r.epochs: parts.insert(0, f'{r.epochs} epochs of {r.train_images:,} images, tested on {r.test_images:,}:')
    if table in FIGURES:
        save_figure(folder/f'{name}.png', FIGURES[table], runs, folder)
        if (folder/f'{name}.png').exists(): parts.append(f'![{table}]({name}.png)')
    commands = [write_command(group) for _, group in runs.groupby(RUN_SIZE)]
    return '\n\n'.join([*parts, f'Device: {describe_devices(runs)}.', '\n'.join(['```', *commands, '```'])])


@call_parse
def main(
    folder: str = str(Path(__file__).parent),  # where the results are, and where the page and its figures go
):
    "Make tables and figures of the results in a folder, and a page of them: README.md."
    folder = Path(folder)
    results, words = load_results(folder), folder/'page.md'
    results['processor'] = results.device.str.replace(r', \d+ threads?$', '', regex=True)
    results['release'] = results.torch.str.split('+').str[0]  # without the build
    headings = '\n'.join(f'## {table}\n\n{{{table}}}\n' for table in TABLES)
    page = words.read_text(encoding='utf-8') if words.exists() else headings
    for table in TABLES:
        runs = results[results.table == table]
        sections = [make_section(group, folder)
                    for _, group in runs.groupby(SECTIONS.get(table, RUN_SIZE), dropna=False)]
        page = page.replace(f'{{{table}}}', '\n\n'.join(sections) or 'No runs.')
    write_whole(folder/'README.md', page.encode())
