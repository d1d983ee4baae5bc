#!/usr/bin/env python
"""What a finished run is good for: predictions, and an evaluation of images whose classes are known.

    python predict.py runs/X cat.png dog.jpg     # class and probability of each, and the next two candidates
    python predict.py runs/X pictures            # the same of every image in a folder
    python predict.py runs/X data/test           # a sub-folder a class: accuracy, and what is confused with what

From Python, `learn = load_run('runs/X')` is a fastai `Learner` with the run's weights.
"""
import errors

if __name__ == '__main__': errors.end_quietly_while_importing('predict.py')

import json
import unicodedata
from pathlib import Path

from fastai.vision.all import *

from callbacks import load_state
from data import FitSize, RGBImage, check_access, check_names, fingerprint, get_empty_dls
from errors import InputError, one_line, one_line_errors
from report import class_accuracies, confusion_matrix, most_confused, percent
from train_fastai import get_learner, load_data


def load_run(run: str | Path, with_data: bool = True) -> Learner:
    """A fastai `Learner` with the weights of the finished run in the folder `run`; nothing is unpickled.

    Its `dls` are those that the run was trained on, if they are where they were and `with_data`; else they are empty,
    which is enough to predict. Raises `InputError`.
    """
    run = Path(run)
    if not os.path.exists(run/'model.pth'):
        raise InputError(f'{run} holds no finished run, as it has no model.pth; train_fastai.py --resume finishes one')
    try:
        m = json.loads((run/'metrics.json').read_text())
        classes, digest, precision = list(m['classes']), m['fingerprint'], m['precision']
        options = {k: m['options'][k] for k in ('data', 'bs', 'taste')}
        if not classes or any(Path(c).name != c for c in classes): raise ValueError('classes without names')
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{run/"metrics.json"} is not that of a finished run ({type(e).__name__}: {e})') from e
    weights = load_state(run/'model.pth')
    data = options['data'] or fastai_path('data')/'cifar10'
    if with_data and os.path.isdir(data):
        dls = load_data(options)
        if fingerprint(dls) != digest:
            raise InputError(f'{data} holds other images than {run} was trained on; load_run(…, with_data=False) does '
                             'without them')
    else: dls = get_empty_dls(classes)
    learn = get_learner(dls, 'fp32' if precision == 'fp32' else 'auto', path=run)
    try: learn.model.load_state_dict(weights)
    except RuntimeError as e: raise InputError(f'{run/"model.pth"} does not hold the weights of this network') from e
    return learn


def read_image(file: Path) -> Tensor:
    """An image file of any size and mode as the network wants it: (3, 32, 32) uint8. Raises `InputError`."""
    try: return image2tensor(FitSize()(RGBImage.create(file)))
    except Exception as e:  # Pillow's many kinds
        raise InputError(f'{file} cannot be read as an image ({one_line(e)})') from e


def get_log_probs(learn: Learner, images: Tensor) -> Tensor:
    """What the network says of uint8 images (N, 3, 32, 32): log-probabilities (N, classes), float32 on the CPU."""
    dl = learn.dls.test_dl(list(images))  # just their number: the loader finds the pixels on the data set
    dl.dataset.images = images.to(learn.dls.device)
    dl.dataset.labels = torch.zeros(len(images), dtype=torch.long, device=learn.dls.device)
    with learn.no_bar(): return learn.get_preds(dl=dl, act=noop)[0].as_subclass(Tensor)


def find_images(paths: list[str], vocab: list[str]) -> tuple[list[Path], list[int] | None]:
    """The image files that `paths` stand for, and their classes if it is one folder with a sub-folder a class.

    Raises `InputError`.
    """
    files = []
    for path in paths:
        if not os.path.exists(path): raise InputError(f'"{path}" does not exist')
        path = Path(path)
        if not path.is_dir():
            files.append(path)
            continue
        for folder in (path, *(o for o in path.iterdir() if o.is_dir())): check_access(folder)
        here, below = get_image_files(path, recurse=False).sorted(), get_image_files(path).sorted()
        if not below: raise InputError(f'{path} holds no images')
        if len(here) == len(below):
            files += here
            continue
        if len(paths) > 1: raise InputError(f'{path} has sub-folders: to evaluate it, give it alone')
        check_names(below)
        for file in below:
            if file.parent.parent != path or file.parent.name not in vocab:
                raise InputError(f'{file} is not in a sub-folder with the name of a class: {path}/{"|".join(vocab)}')
        return list(below), [vocab.index(f.parent.name) for f in below]
    if not files: raise InputError('no image was given')
    check_names(files)
    return files, None


def predictions(files: list[Path], log_probs: Tensor, vocab: list[str]) -> pd.DataFrame:
    """A row a file: the class with the largest probability and the next two, each with its probability.

    `log_probs` (N, classes) float32.
    """
    top = log_probs.exp().topk(min(3, len(vocab)))
    table = pd.DataFrame(dict(file=[str(f) for f in files]))
    for i, suffix in enumerate(('', '_2', '_3')[:top.indices.shape[1]]):
        table['class' + suffix] = [vocab[j] for j in top.indices[:, i]]
        table['probability' + suffix] = top.values[:, i].tolist()
    return table


def aligned(table: pd.DataFrame) -> str:
    """The rows of `table`, a line each, in columns."""
    def shown(o): return f'{o:.1%}' if isinstance(o, float) else o
    def width(text): return sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in text)
    columns = [[name, *map(shown, table[name])] for name in table]
    widths = [max(map(width, column)) for column in columns]
    return '\n'.join('  '.join(o + ' ' * (w - width(o)) for o, w in zip(row, widths, strict=True)).rstrip()
                     for row in zip(*columns, strict=True))


def evaluation(log_probs: Tensor, flipped: Tensor, targets: Tensor, vocab: list[str]) -> str:
    """Accuracy of all and of each class, and what is confused.

    `log_probs` and the mirror images' `flipped` (N, classes) float32, `targets` (N,) int64.
    """
    def accuracy(p): return (p.argmax(1) == targets).float().mean()
    counts = confusion_matrix(log_probs, targets)
    classes = [(c, f'{n:,}', percent(found), percent(right))
               for c, (n, found, right) in class_accuracies(counts, vocab).items()]
    confused = [(f'{actual} → {predicted}', f'{n:,}') for actual, predicted, n in most_confused(counts, vocab)]
    return f'''{len(targets):,} images of {len(targets.unique())} classes
accuracy                     {accuracy(log_probs):.2%}
accuracy, flip averaging     {accuracy((log_probs + flipped) / 2):.2%}   (mean log-probability of image and mirror)

{aligned(pd.DataFrame(classes, columns=['class', 'images', 'found (accuracy)', 'right when named']))}

{aligned(pd.DataFrame(confused, columns=['most confused: actual → predicted', 'images']))}'''


@call_parse
@one_line_errors('predict.py')
def main(
    run: str,  # folder of a finished run
    *images: str,  # image files or folders; a folder with a sub-folder a class is evaluated
    csv: bool = False,  # print comma-separated values, a row an image
):
    "Name what images show. Any size and mode will do: the centre square is resized to 32×32 and made RGB."
    learn = load_run(run, with_data=False)
    vocab = list(learn.dls.vocab)
    files, targets = find_images(images, vocab)
    pixels = torch.stack([read_image(f) for f in files])
    log_probs = get_log_probs(learn, pixels)
    table = predictions(files, log_probs, vocab)
    if csv:
        if targets: table.insert(1, 'actual', [vocab[i] for i in targets])
        table.to_csv(sys.stdout, index=False)
    elif targets: print(evaluation(log_probs, get_log_probs(learn, pixels.flip(-1)), tensor(targets), vocab))
    else: print(aligned(table))
