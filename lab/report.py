"""A run as one page of Markdown, from the template report.md."""
import math
import re
from pathlib import Path

import jinja2
import pandas as pd

from lab.evaluate import list_confusions


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


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                               undefined=jinja2.StrictUndefined, autoescape=jinja2.select_autoescape())  # in HTML
TEMPLATES.filters |= dict(percent=percent, md=escape, rate=format_rate)


def write_report(m: dict, command: str, history: list[dict], schedule: list[dict], wrong: pd.DataFrame,
                 classes: pd.DataFrame) -> str:
    """A run that `command` started on one page of Markdown, figures included.

    The others are the contents of its metrics.json, history.csv, schedule.csv, misclassified.csv and classes.csv.
    """
    return TEMPLATES.get_template('report.md').render(
        m=m, o=m['options'], recipe=m['recipe'], command=command, history=history, schedule=schedule, wrong=len(wrong),
        classes=classes.to_dict('records'), confused=list_confusions(wrong, 3).to_dict('records'))
