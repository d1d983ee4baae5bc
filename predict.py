#!/usr/bin/env python
"""What a finished run is good for: predictions, and an evaluation of images whose classes are known.

    python predict.py runs/X cat.png dog.jpg     # class and probability of each, and the next two candidates
    python predict.py runs/X pictures            # the same for every image in a folder
    python predict.py runs/X data/test           # a sub-folder per class: accuracy, precision, recall, confusions
    python predict.py runs/X --export net.onnx   # the network for other programs; also .pt2 and .safetensors

From Python, `learn = load_run('runs/X')` is a fastai `Learner` with the run's weights.
"""
from lab import errors  # first: it silences fastai's import and lets Ctrl-C end it

if __name__ == '__main__': errors.end_quietly_while_importing('predict.py')

import argparse
import importlib
import io
import json
import sys

from fastai.vision.all import *

from arch import ResNet
from lab.errors import InputError, one_line_errors
from lab.evaluate import count_confusions, get_log_probs, list_confusions, score_classes
from lab.learner import replaced
from lab.loader import SIZE, BatchDL, FitSize, RGBImage, check_access, check_names, fingerprint
from lab.report import percent
from lab.runs import is_finished, load_state, write_whole
from lab.sources import get_data
from train_fastai import get_dls, get_learner

EXPORTS = {'.onnx': 'onnxscript', '.pt2': 'torch', '.safetensors': 'safetensors.torch'}  # by what writes them
OPSET = 20  # the version of ONNX's operators


def load_run(run: str | Path, data: str | Path | None = None, model: nn.Module | None = None) -> Learner:
    """A fastai `Learner` with the weights of the finished run in the folder `run`; nothing is unpickled.

    Without `data` it reads no images, which is enough to predict; what needs the run's images, to validate, show
    results or train on, raises `InputError`. With `data`, the folder of those images or of a copy, everything works.
    A run of another network than `ResNet` needs that as `model`. Weights that are stored in float16, as the published
    ones, predict in float32. Raises `InputError`.
    """
    run = Path(run)
    if not is_finished(run):
        raise InputError(f'{run} holds no finished run, as it has no model.pth; train_fastai.py --resume finishes one')
    try:
        m = json.loads((run/'metrics.json').read_bytes())
        classes, images, precision, o = list(m['classes']), m['fingerprint'], m['precision'], m['options']
        bs, quick = o['bs'], o.get('quick', o.get('taste'))  # its name in earlier versions
        if not classes or any(Path(c).name != c for c in classes): raise ValueError('classes without names')
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f'{run/"metrics.json"} is not that of a finished run ({type(e).__name__}: {e})') from e
    weights = load_state(run/'model.pth')
    try:
        if model is None: model = ResNet(3, len(classes), width=len(weights['prep.0.weight']))
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError) as e:
        name = type(model).__name__ if model else 'ResNet'
        raise InputError(f'{run/"model.pth"} does not hold the weights of {name}; load_run(…, model=…) takes another '
                         'network') from e
    if data is None: dls = get_empty_dls(classes)
    else:
        every = 10 if quick and (o.get('data') or 'taste' in o) else 1  # the sample is a tenth already
        dls = get_dls(get_data(data), bs=bs, every=every)
        if 'recipe' in m and fingerprint(dls, names=False) != images:  # earlier versions had another digest
            raise InputError(f'{data} holds other images than {run} was trained on')
    exact = precision == 'fp32' or any(w.dtype == torch.float16 for w in weights.values())  # published: rounded once
    return get_learner(dls, model, precision='fp32' if exact else 'auto', path=run)


class NoImagesDL(BatchDL):
    """The loader of a run without its images: refuses what needs them, by `InputError`; `summary` gets a blank one.

    It is an ordinary loader once it has images, as the one that `test_dl` makes of it.
    """

    def __len__(self): return super().__len__() or 1  # fastai divides by it

    def __iter__(self):
        self.refuse_without_images()
        return super().__iter__()

    def one_batch(self):
        if self.n: return super().one_batch()
        blank = TensorImage(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)), TensorCategory(torch.zeros(1).long())
        return self.after_batch(to_device(blank, self.device))

    def show_batch(self, *args, **kwargs):
        self.refuse_without_images()
        return super().show_batch(*args, **kwargs)

    def show_results(self, *args, **kwargs):
        self.refuse_without_images()
        return super().show_results(*args, **kwargs)

    def refuse_without_images(self):
        if not self.n: raise InputError('this learner has no images; load_run(run, data=FOLDER) reads them')


def get_empty_dls(vocab: list[str]) -> DataLoaders:
    """`DataLoaders` of the classes `vocab` without an image, for a learner that only predicts."""
    blank = RGBImage.create(np.zeros((SIZE, SIZE, 3), np.uint8))
    def label(o: Path | RGBImage): return vocab[0] if o is blank else parent_label(o)  # `test_dl` reads the annotation
    block = DataBlock(blocks=(ImageBlock(RGBImage), CategoryBlock(vocab=vocab)), get_items=lambda _: [blank, blank],
                      get_y=label, splitter=IndexSplitter([1]), item_tfms=FitSize(),
                      batch_tfms=Normalize.from_stats(*cifar_stats), dl_type=NoImagesDL)
    return DataLoaders(*(dl.new(bs=512) for dl in block.dataloaders('.', bs=1, num_workers=0).new_empty().loaders))


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


def list_predictions(files: list[Path], log_probs: Tensor, vocab: list[str]) -> pd.DataFrame:
    """A row per file: the class with the largest probability and the next two, each with its probability.

    `log_probs` (N, classes) float32.
    """
    top = log_probs.exp().topk(min(3, len(vocab)))
    table = pd.DataFrame(dict(file=[str(f) for f in files]))
    for i, suffix in enumerate(('', '_2', '_3')[:top.indices.shape[1]]):
        table['class' + suffix] = [vocab[j] for j in top.indices[:, i]]
        table['probability' + suffix] = top.values[:, i].tolist()
    return table


def align(table: pd.DataFrame) -> str:
    """The rows of `table`, a line each, in aligned columns; shares as percentages."""
    with pd.option_context('display.unicode.east_asian_width', True):  # some letters are two columns wide
        return table.to_string(index=False, float_format=percent, na_rep='–')


def evaluate(log_probs: Tensor, flipped: Tensor, targets: Tensor, vocab: list[str]) -> str:
    """Accuracy of all, recall and precision of each class, and what is confused.

    `log_probs` and the mirror images' `flipped` (N, classes) float32, `targets` (N,) int64.
    """
    def accuracy(p): return percent((p.argmax(1) == targets).float().mean(), 2)
    confused = list_confusions(count_confusions(log_probs, targets), vocab)
    mistakes = f'Most confused:\n{align(confused)}' if len(confused) else 'Every image is classified correctly.'
    return f'''{len(targets):,} images of {len(targets.unique())} classes
accuracy                     {accuracy(log_probs)}
accuracy, flip averaging     {accuracy((log_probs + flipped) / 2)}   (mean log-probability of image and mirror)

{align(score_classes(log_probs, targets, vocab))}

{mistakes}'''


class WholeNetwork(nn.Module):
    """The network for other programs: images (N, 3, 32, 32) float32 in 0 … 1 → probabilities (N, classes)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for name, values in zip(('mean', 'std'), cifar_stats, strict=True):
            self.register_buffer(name, tensor(values)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return F.softmax(self.model((images - self.mean) / self.std), 1)


def export_network(learn: Learner, file: Path):
    """Write the network of `learn` to `file`, whose suffix, one of `EXPORTS`, says in which format.

    ONNX and PyTorch's .pt2 hold a `WholeNetwork`, for any N, and the class names, a JSON list: as the metadata
    `classes`, or as `classes.json` in the archive. Safetensors hold the plain weights, with `classes`, `mean` and `std`
    as metadata, JSON lists. Raises `InputError` and `WriteError`.
    """
    if file.suffix not in EXPORTS: raise InputError(f'--export {file} does not end in {", ".join(EXPORTS)}')
    try: library = importlib.import_module(EXPORTS[file.suffix])
    except ModuleNotFoundError as e:
        package = e.name.partition('.')[0]
        raise InputError(f'--export {file} needs the package {package}: pip install {package}') from e
    model, classes = deepcopy(learn.model).cpu().eval(), json.dumps(list(learn.dls.vocab))
    if file.suffix == '.safetensors':
        metadata = dict(classes=classes, mean=json.dumps(cifar_stats[0]), std=json.dumps(cifar_stats[1]))
        write_whole(file, library.save(model.state_dict(), metadata))
        return
    images = torch.zeros(2, 3, SIZE, SIZE)  # with one image the exporter would fix N to 1
    program = torch.export.export(WholeNetwork(model), (images,), dynamic_shapes=({0: torch.export.Dim('N', min=1)},))
    if file.suffix == '.pt2': torch.export.save(program, content := io.BytesIO(), extra_files={'classes.json': classes})
    else:
        onnx = torch.onnx.export(program, dynamo=True, opset_version=OPSET, input_names=['images'],
                                 output_names=['probabilities'], dynamic_shapes=({0: 'N'},), verbose=False)
        onnx.model.metadata_props['classes'] = classes
        content = io.BytesIO(onnx.model_proto.SerializeToString())  # one file, weights included
    write_whole(file, content.getvalue())


@one_line_errors('predict.py')
def main(
    run: str,  # folder of a finished run
    *images: str,  # image files or folders; a folder with a sub-folder per class is evaluated
    csv: bool = False,  # print comma-separated values, a row per image
    export: str = None,  # write the network to this file, which ends in .onnx, .pt2 or .safetensors
):
    "Name what images show. They may have any size: the centre square is resized to 32×32."
    learn = load_run(run)
    vocab = list(learn.dls.vocab)
    if images or not export:
        files, targets = find_images(images, vocab)
        pixels = torch.stack([image2tensor(FitSize()(RGBImage.create(f))) for f in files])
    if export:
        export_network(learn, Path(export))
        print(f'The network is in {export}', file=sys.stderr if images else sys.stdout)
        if not images: return
    log_probs = get_log_probs(learn, pixels)
    table = list_predictions(files, log_probs, vocab)
    if csv:
        if targets: table.insert(1, 'actual', [vocab[i] for i in targets])
        table.to_csv(sys.stdout, index=False)
    elif targets: print(evaluate(log_probs, get_log_probs(learn, pixels.flip(-1)), tensor(targets), vocab))
    else: print(align(table))


if __name__ == '__main__':  # argparse by itself wants all options before, or behind, everything else
    parser = argparse.ArgumentParser
    with replaced(parser, 'parse_args', parser.parse_intermixed_args): call_parse(main)
