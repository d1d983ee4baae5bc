#!/usr/bin/env python
"""What a finished run is good for: predictions, and an evaluation of images whose classes are known.

    python predict.py runs/X cat.png dog.jpg     # class and probability of each, and the next two candidates
    python predict.py runs/X pictures            # the same for every image in a folder
    python predict.py runs/X data/test           # a sub-folder per class: accuracy, precision, recall, confusions

From Python, `learn = load_run('runs/X')` is a fastai `Learner` with the run's weights.
"""
import errors

if __name__ == '__main__': errors.end_quietly_while_importing('predict.py')

import sys
from pathlib import Path

from fastai.vision.all import *

from data import FitSize, RGBImage, check_access, check_names
from errors import InputError, one_line_errors
from run import load_run


def get_log_probs(learn: Learner, images: Tensor) -> Tensor:
    """What the network says of uint8 images (N, 3, 32, 32): log-probabilities (N, classes), float32 on the CPU."""
    dl = learn.dls.test_dl(list(images))  # just their number: the loader finds the pixels on the data set
    dl.dataset.images = images.to(learn.dls.device)
    dl.dataset.labels = torch.zeros(len(images), dtype=torch.long, device=learn.dls.device)
    with learn.no_bar(), learn.no_logging(): return learn.get_preds(dl=dl, act=noop)[0].as_subclass(Tensor)


def confusion_matrix(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Counts of images, (classes, classes) int64: rows are actual classes, columns predictions.

    `log_probs` (N, classes) float, `targets` (N,) int64.
    """
    n = log_probs.shape[1]
    return (targets * n + log_probs.argmax(1)).bincount(minlength=n * n).view(n, n)


def class_scores(counts: Tensor, vocab: list[str]) -> pd.DataFrame:
    """The columns `class, images, recall, precision`, from a confusion matrix; a share of nothing is NaN."""
    right, images, named = counts.diag().double(), counts.sum(1), counts.sum(0)
    return pd.DataFrame({'class': vocab, 'images': images, 'recall': right / images, 'precision': right / named})


def most_confused(counts: Tensor, vocab: list[str], n: int = 10) -> pd.DataFrame:
    """The at most `n` commonest errors as `actual, predicted, images`, from a confusion matrix."""
    errors = pd.DataFrame((counts - counts.diag().diag()).numpy(), vocab, vocab).rename_axis('actual')
    errors = errors.rename_axis('predicted', axis=1).stack().reset_index(name='images')
    return errors[errors.images > 0].nlargest(n, 'images')


def misclassified(log_probs: Tensor, dls: DataLoaders) -> pd.DataFrame:
    """Every wrong test image as `file, actual, predicted, probability, loss`, the largest loss first.

    `log_probs` (N, classes) float, in the order of `dls.valid_ds`. The index is an image's place there.
    """
    targets, vocab = dls.valid_ds.labels.cpu(), np.array(dls.vocab)
    log_prob, predicted = log_probs.max(dim=1)
    table = pd.DataFrame(dict(
        file=[f.relative_to(dls.path).as_posix() for f in dls.valid_ds.items], actual=vocab[targets],
        predicted=vocab[predicted], probability=log_prob.exp(), loss=F.nll_loss(log_probs, targets, reduction='none')))
    return table[(predicted != targets).numpy()].sort_values('loss', ascending=False, kind='stable')


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
    """A row per file: the class with the largest probability and the next two, each with its probability.

    `log_probs` (N, classes) float32.
    """
    top = log_probs.exp().topk(min(3, len(vocab)))
    table = pd.DataFrame(dict(file=[str(f) for f in files]))
    for i, suffix in enumerate(('', '_2', '_3')[:top.indices.shape[1]]):
        table['class' + suffix] = [vocab[j] for j in top.indices[:, i]]
        table['probability' + suffix] = top.values[:, i].tolist()
    return table


def aligned(table: pd.DataFrame) -> str:
    """The rows of `table`, a line each, in aligned columns; shares as percentages."""
    with pd.option_context('display.unicode.east_asian_width', True):  # some letters are two columns wide
        return table.to_string(index=False, float_format='{:.1%}'.format, na_rep='–')


def evaluation(log_probs: Tensor, flipped: Tensor, targets: Tensor, vocab: list[str]) -> str:
    """Accuracy of all, recall and precision of each class, and what is confused.

    `log_probs` and the mirror images' `flipped` (N, classes) float32, `targets` (N,) int64.
    """
    def accuracy(p): return (p.argmax(1) == targets).float().mean()
    counts = confusion_matrix(log_probs, targets)
    confused = most_confused(counts, vocab)
    mistakes = f'Most confused:\n{aligned(confused)}' if len(confused) else 'Every image is classified correctly.'
    return f'''{len(targets):,} images of {len(targets.unique())} classes
accuracy                     {accuracy(log_probs):.2%}
accuracy, flip averaging     {accuracy((log_probs + flipped) / 2):.2%}   (mean log-probability of image and mirror)

{aligned(class_scores(counts, vocab))}

{mistakes}'''


# argparse wants options first or last.
if __name__ == '__main__': sys.argv[1:] = sorted(sys.argv[1:], key=lambda o: not o.startswith('--'))


@call_parse
@one_line_errors('predict.py')
def main(
    run: str,  # folder of a finished run
    *images: str,  # image files or folders; a folder with a sub-folder per class is evaluated
    csv: bool = False,  # print comma-separated values, a row per image
):
    "Name what images show. Any size and mode will do: the centre square is resized to 32×32 and made RGB."
    learn = load_run(run, with_data=False)
    vocab = list(learn.dls.vocab)
    files, targets = find_images(images, vocab)
    pixels = torch.stack([image2tensor(FitSize()(RGBImage.create(f))) for f in files])
    log_probs = get_log_probs(learn, pixels)
    table = predictions(files, log_probs, vocab)
    if csv:
        if targets: table.insert(1, 'actual', [vocab[i] for i in targets])
        table.to_csv(sys.stdout, index=False)
    elif targets: print(evaluation(log_probs, get_log_probs(learn, pixels.flip(-1)), tensor(targets), vocab))
    else: print(aligned(table))
