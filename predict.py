#!/usr/bin/env python
"""What a finished run is good for: predictions, and an evaluation of images whose classes are known.

    python predict.py runs/X cat.png dog.jpg     # class and probability of each, and the next two candidates
    python predict.py runs/X pictures            # the same of every image in a folder
    python predict.py runs/X data/test           # a sub-folder a class: accuracy, and what is confused with what

From Python, `learn = load_run('runs/X')` is a fastai `Learner` with the run's weights.
"""
import warnings

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)  # fastai's own import

import json
import sys
from pathlib import Path

from fastai.vision.all import *
from PIL import ImageOps

from callbacks import confusion_matrix, load_state
from data import FitSize, InputError, get_empty_dls
from report import class_accuracies, most_confused
from train_fastai import get_learner, load_data, one_line_errors


def load_run(run: str | Path, with_data: bool = True) -> Learner:
    """A fastai `Learner` with the weights of the finished run in the folder `run`; nothing is unpickled.

    Its `dls` are those that the run was trained on, if they are where they were and `with_data`; else they are empty,
    which is enough to predict. Raises `InputError`.
    """
    run = Path(run)
    if not (run/'model.pth').exists(): raise InputError(f'{run} is no folder of a finished run: it has no model.pth')
    try:
        metrics = json.loads((run/'metrics.json').read_text())
        classes, options = list(metrics['classes']), dict(metrics['options'])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{run/"metrics.json"} is not that of a finished run ({type(e).__name__}: {e})') from e
    weights = load_state(run/'model.pth')
    data = Path(options['data'] or fastai_path('data')/'cifar10')
    dls = load_data(options) if with_data and data.is_dir() else get_empty_dls(classes)
    if list(dls.vocab) != classes: raise InputError(f'{data} has other classes than the run in {run}')
    learn = get_learner(dls, path=run)
    try: learn.model.load_state_dict(weights)
    except RuntimeError as e: raise InputError(f'{run/"model.pth"} does not hold the weights of this network') from e
    return learn


def read_image(file: Path) -> Tensor:
    """An image file of any size and mode, upright, as the network wants it: (3, 32, 32) uint8. Raises `InputError`."""
    try:
        image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith('I'): image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype('uint8'))
        return image2tensor(FitSize()(PILImage(image.convert('RGB'))))
    except Exception as e:  # Pillow's many kinds
        raise InputError(f'{file} cannot be read as an image ({" ".join(str(e).split()) or type(e).__name__})') from e


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
    for path in map(Path, paths):
        if not path.exists(): raise InputError(f'{path} does not exist')
        if path.is_file():
            files.append(path)
            continue
        here = get_image_files(path, recurse=False).sorted()
        files += here
        if here: continue
        labelled = get_image_files(path).sorted()
        if not labelled: raise InputError(f'{path} holds no images')
        if len(paths) > 1: raise InputError(f'{path} has sub-folders: to evaluate it, give it alone')
        for file in labelled:
            if file.parent.parent != path or file.parent.name not in vocab:
                raise InputError(f'{file} is not in a sub-folder with the name of a class: {path}/{"|".join(vocab)}')
        return list(labelled), [vocab.index(f.parent.name) for f in labelled]
    if not files: raise InputError('no image was given')
    return files, None


def predictions(files: list[Path], log_probs: Tensor, vocab: list[str]) -> pd.DataFrame:
    """A row a file: the class with the largest probability and the next two, each with its probability."""
    top = log_probs.exp().topk(min(3, len(vocab)))
    table = pd.DataFrame(dict(file=[str(f) for f in files]))
    for i, suffix in enumerate(('', '_2', '_3')[:top.indices.shape[1]]):
        table['class' + suffix] = [vocab[j] for j in top.indices[:, i]]
        table['probability' + suffix] = top.values[:, i].numpy()
    return table


def evaluation(log_probs: Tensor, flipped: Tensor, targets: Tensor, vocab: list[str]) -> str:
    """Accuracy of all and of each class, and what is confused; `flipped` are the mirror images' log-probabilities."""
    def accuracy(p): return (p.argmax(1) == targets).float().mean()
    counts = confusion_matrix(log_probs, targets)
    width = max(map(len, (*vocab, 'class')))
    lines = [f'{len(targets):,} images of {len(targets.unique())} classes',
             f'accuracy                     {accuracy(log_probs):.2%}',
             f'accuracy, flip averaging     {accuracy((log_probs + flipped) / 2):.2%}   '
             '(mean of the log-probabilities of image and mirror image)', '',
             f'{"class":{width}}  images   found  right when named']
    lines += [f'{c:{width}}  {n:6,}  {found:6.1%}  {right:16.1%}'
              for c, (n, found, right) in class_accuracies(counts, vocab).items()]
    lines += ['', 'most confused (actual → predicted, images)']
    lines += [f'{actual} → {predicted}  {n}' for actual, predicted, n in most_confused(counts, vocab)] or ['nothing']
    return '\n'.join(lines)


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
    else:
        left = {k: f'{{:{max(map(len, (k, *v)))}}}'.format for k, v in table.select_dtypes(object).items()}
        print(table.to_string(index=False, justify='left', formatters=left, float_format='{:.1%}'.format))
