"""Every misclassified image of a run on one self-contained page, for a browser without a server or network."""
import base64
import io
from pathlib import Path

import jinja2
import pandas as pd
from PIL import Image
from torch import Tensor

from lab.loader import SIZE
from lab.report import percent

COLUMNS = 16  # of a sheet, a square of thumbnails; a browser is slow to show part of a large image
MATRIX = 50  # classes, beyond which the page lists the cells of the confusion matrix that have errors


def data_uri(content: bytes, kind: str) -> str: return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def draw_sheet(images: Tensor) -> bytes:
    """The `images`, at most COLUMNS² × (3, SIZE, SIZE) uint8, side by side in rows, as a lossless WebP."""
    sheet = Image.new('RGB', (SIZE * COLUMNS, SIZE * COLUMNS))
    for i, image in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
        sheet.paste(Image.fromarray(image), (SIZE * (i % COLUMNS), SIZE * (i // COLUMNS)))
    sheet.save(content := io.BytesIO(), 'WEBP', lossless=True, method=2)
    return content.getvalue()


def write_page(m: dict, wrong: pd.DataFrame, classes: pd.DataFrame, images: Tensor, charts: dict[str, bytes]) -> str:
    """The page as HTML, from the template page.html.

    `m` is the run's metrics.json, `wrong` misclassified.csv, `classes` classes.csv; `images` (N, 3, SIZE, SIZE) uint8
    are those of `wrong`; `charts` are PNG files by title.
    """
    names = list(classes['class'])
    place = {name: i for i, name in enumerate(names)}
    cells = wrong.groupby(['actual', 'predicted']).size().sort_values(ascending=False, kind='stable')
    right = classes['images'] - wrong.actual.value_counts().reindex(names, fill_value=0).to_numpy()
    rows = [[file, place[actual], place[predicted], round(probability, 4), round(min(loss, 1e4), 4)]  # no infinity
            for file, actual, predicted, probability, loss in wrong.itertuples(index=False)]
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                             undefined=jinja2.StrictUndefined)
    return env.get_template('page.html').render(
        m=m, accuracy=percent(m['test_accuracy'], 2), columns=COLUMNS, few=len(names) <= 12,
        headline=f'{len(wrong):,} of {m["test_images"]:,} test images {"is" if len(wrong) == 1 else "are"} '
                 'misclassified',
        data=dict(classes=names, right=right.tolist(), wrong=rows, matrix=len(names) <= MATRIX,
                  cells=[[place[actual], place[predicted], n] for (actual, predicted), n in cells.items()]),
        sheets=[data_uri(draw_sheet(part), 'webp') for part in images.split(COLUMNS ** 2)],
        charts={title: data_uri(png, 'png') for title, png in charts.items()})
