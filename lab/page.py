"""Every misclassified image of a run on one self-contained page, for a browser without a server or network."""
import base64
import io
from pathlib import Path

import pandas as pd
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lab.report import TEMPLATES

COLUMNS = 16  # of a sheet, a square of thumbnails; a browser is slow to show part of a large image


def encode(content: bytes) -> str: return base64.b64encode(content).decode()


def draw_sheet(images: Tensor) -> bytes:
    """The `images`, at most COLUMNS² × (3, H, W) uint8, side by side in rows, as a lossless WebP."""
    images = F.pad(images.cpu(), (0,) * 7 + (COLUMNS ** 2 - len(images),)).unflatten(0, (COLUMNS, COLUMNS))
    sheet = Image.fromarray(images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
    sheet.save(content := io.BytesIO(), 'WEBP', lossless=True, method=2)
    return content.getvalue()


def write_page(m: dict, wrong: pd.DataFrame, classes: pd.DataFrame, images: Tensor, folder: Path,
               maps: Tensor | None = None) -> str:
    """The page as HTML, from the template page.html.

    `m`, `wrong` and `classes` are the run's metrics.json, misclassified.csv and classes.csv, and its `folder` has the
    charts; `images` (N, 3, H, W) uint8 are those of `wrong`; `maps` (N, 2, h, w) float in 0 … 1 show where the network
    looked for the predicted and for the actual class.
    """
    names = [*classes['class']]
    rows = wrong.assign(actual=wrong.actual.map(names.index), predicted=wrong.predicted.map(names.index))
    cells = rows.groupby(['actual', 'predicted']).size().sort_values(ascending=False, kind='stable').reset_index()
    right = classes['images'] - rows.actual.value_counts().reindex(classes.index, fill_value=0)
    data = dict(classes=names, right=right.tolist(), matrix=len(names) <= 50, cells=cells.values.tolist(),
                wrong=[[*row, round(p, 4), round(min(loss, 1e4), 4)] for *row, p, loss in rows.itertuples(index=False)],
                maps=maps is not None and [*maps.shape[2:], encode((255 * maps).round().byte().numpy())])
    return TEMPLATES.get_template('page.html').render(
        m=m, data=data, columns=COLUMNS, few=len(names) <= 12,
        sheets=[encode(draw_sheet(part)) for part in images.split(COLUMNS ** 2)],
        encode=encode, charts={file.stem: file for file in folder.glob('*.png')})
