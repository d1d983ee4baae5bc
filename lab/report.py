"""A run as one page of Markdown, and its errors as a page for a browser, from the templates report.md and page.html."""
import base64

import jinja2
import pandas as pd
from fastai.vision.all import *
from sklearn.metrics import precision_recall_fscore_support
from torchvision.io import encode_png


def per_class_scores(log_probs: Tensor, targets: Tensor, vocab: list[str]) -> pd.DataFrame:
    """`class, images, recall, precision` from `log_probs` (N, classes) and `targets` (N,); a share of none is NaN."""
    precision, recall, _, images = precision_recall_fscore_support(
        targets, log_probs.argmax(1), labels=range(len(vocab)), zero_division=np.nan)
    return pd.DataFrame({'class': list(vocab), 'images': images.astype(int), 'recall': recall, 'precision': precision})


def list_confusions(answers: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The at most `n` most frequent errors in `answers` (`actual, predicted`), each with its number of `images`."""
    wrong = answers[answers.actual != answers.predicted]
    return wrong.groupby(['actual', 'predicted']).size().reset_index(name='images').nlargest(n, 'images')


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


def encode(content: bytes) -> str: return base64.b64encode(content).decode()


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                               undefined=jinja2.StrictUndefined, autoescape=jinja2.select_autoescape())  # in HTML
TEMPLATES.filters |= dict(percent=percent, md=escape, rate=format_rate, encode=encode)


def write_report(m: dict, command: str, history: list[dict], schedule: list[dict], wrong: pd.DataFrame,
                 classes: pd.DataFrame) -> str:
    """A run that `command` started as Markdown; `m` is its metrics.json, and the others are what its tables hold."""
    return TEMPLATES.get_template('report.md').render(
        m=m, o=m['options'], recipe=m['recipe'], command=command, history=history, schedule=schedule, wrong=len(wrong),
        classes=classes.to_dict('records'), confused=list_confusions(wrong, 3).to_dict('records'))


def write_page(m: dict, wrong: pd.DataFrame, classes: pd.DataFrame, images: Tensor, folder: Path,
               maps: Tensor | None = None) -> str:
    """Every misclassified image on one self-contained page of HTML, for a browser without a server or network.

    `m`, `wrong` and `classes` are the run's metrics.json, misclassified.csv and classes.csv, and its `folder` has the
    charts; `images` (N, 3, H, W) uint8 are those of `wrong`; `maps` (N, 2, h, w) float in 0 … 1 show where the network
    looked for the predicted and for the actual class.
    """
    names, pngs = [*classes['class']], [encode(encode_png(image).numpy()) for image in images]
    rows = wrong.assign(actual=wrong.actual.map(names.index), predicted=wrong.predicted.map(names.index), png=pngs,
                        probability=wrong.probability.astype(float).round(4),
                        loss=wrong.loss.astype(float).clip(upper=1e4).round(4))
    right = classes['images'] - rows.actual.value_counts().reindex(classes.index, fill_value=0)
    data = dict(classes=names, right=right.tolist(), matrix=len(names) <= 50, wrong=rows.values.tolist(),
                cells=list_confusions(rows, len(rows)).values.tolist(),
                maps=maps is not None and [*maps.shape[2:], encode((255 * maps).round().byte().numpy())])
    return TEMPLATES.get_template('page.html').render(m=m, data=data, folder=folder)
