"""A run as one page of Markdown, from the template report.md."""
import math
import re
from pathlib import Path

import jinja2
import pandas as pd

REFERENCE = dict(parameters=6_573_130, train_accuracy=.9860, test_accuracy=.9307, first_epoch_over_90=19)
SHOWN = 20  # classes, beyond which the page lists the 10 worst and the 5 best


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


def get_template(name: str, **options) -> jinja2.Template:
    """The template `name` of this folder, with our filters."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                             undefined=jinja2.StrictUndefined, **options)
    env.filters |= dict(percent=percent, md=escape, rate=format_rate)
    return env.get_template(name)


def write_report(m: dict, command: str, history: list[dict], schedule: list[dict], wrong: int, classes: pd.DataFrame,
                 confused: pd.DataFrame) -> str:
    """A run on one page of Markdown, figures included.

    `m` is its metrics.json, `command` started it; `history` and `schedule` are the rows of history.csv and
    schedule.csv, `classes` is classes.csv, `wrong` the number of misclassified images, `confused` the most frequent
    errors as `actual, predicted, images`.
    """
    by_recall = classes.sort_values('recall', kind='stable')
    shown = classes if len(classes) <= SHOWN else pd.concat([by_recall[:10], by_recall[-5:]])
    return get_template('report.md').render(
        m=m, o=m['options'], recipe=m['recipe'], command=command, history=history, wrong=wrong, reference=REFERENCE,
        title='Quick look' if m['options']['quick'] else f'{m["recipe"]["network"]} with fastai',
        start=schedule[0]['lr'], peak=max(schedule, key=lambda row: row['lr']), end=schedule[-1]['lr'],
        batches=len(schedule), per_epoch=len(schedule) / len(history),
        augmentation=', '.join(m['recipe']['augmentation']) or 'none',
        classes=shown.to_dict('records'), confused=confused.to_dict('records'))
