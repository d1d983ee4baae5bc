#!/usr/bin/env python
"""Use a finished run: classify images, evaluate a labelled folder, export the network.

It always names one of the classes that the run was trained on. Of images of any size it takes the centre square.

    python predict.py runs/X cat.png dog.jpg     # class and probability of each, and the next two candidates
    python predict.py runs/X pictures            # the same for every image in a folder
    python predict.py runs/X data/test           # a sub-folder per class: accuracy, precision, recall, confusions
    python predict.py runs/X --export net.onnx   # the network for other programs; also .pt2 and .safetensors

From Python, `learn = load_run('runs/X')` is a fastai `Learner` with the run's weights.
"""
import lab  # isort: skip  # noqa: F401, silences a warning of fastai's import

import argparse
from importlib.util import find_spec

from fastai.vision.all import *
from torchvision.transforms import v2

from arch import ResNet
from lab.errors import InputError, one_line, one_line_errors
from lab.loader import SIZE, BatchDL, CenterResize, RGBImage, list_images, show_progress
from lab.report import list_confusions, per_class_scores, percent
from lab.results import get_log_probs
from lab.runs import CHECKPOINT, atomic_write, load_state
from lab.sources import get_data
from train_fastai import get_dls, get_learner

EXPORTS = {'.onnx': 'onnxscript', '.pt2': 'torch', '.safetensors': 'safetensors'}  # the packages that write them
format_table = partial(pd.DataFrame.to_string, index=False, float_format=percent, na_rep='–')  # shares in percent


def load_run(run: str | Path, data: str | Path | None = None, model: nn.Module | None = None) -> Learner:
    """A fastai `Learner` with the weights and the recipe of the finished run in the folder `run`; nothing is unpickled.

    Without `data` it has no images, which is enough to predict. With `data`, a folder of images of the same classes,
    everything works. A run of another network than `ResNet` needs that as `model`. Weights that are stored in float16,
    as the published ones, predict in float32. What the learner saves goes to `run/learner`. Raises `InputError`.
    """
    run = Path(run)
    if not (run/'model.pth').exists():
        raise InputError(f'{run} is not ' + (f'finished; finish it with: python train_fastai.py --resume {run}' if
                         (run/CHECKPOINT).exists() else 'the folder of a finished run, as docs/cifar10 is'))
    weights = load_state(run/'model.pth')
    try:
        m = json.loads((run/'metrics.json').read_bytes())
        classes, precision, o = m['classes'], m['precision'], m['options']
        recipe, bs = {k: o[k] for k in ('wd', 'label_smoothing', 'ema', 'seed')}, o['bs']
        every = 10 if o['quick'] and o['data'] else 1  # the sample is a tenth already
        if model is None: model = ResNet(3, len(classes), width=len(weights['prep.0.weight']))
        model.load_state_dict(weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as e:
        raise InputError(f'{run} cannot be used ({one_line(e)[:100]}); copy all of the run; load_run(…, model=…) takes '
                         'another network than ResNet') from e
    dls = get_empty_dls(classes) if data is None else get_dls(get_data(data), bs=bs, every=every, resize=True)
    if list(dls.vocab) != classes: raise InputError(f'{data} has other classes than {run}: {", ".join(dls.vocab)}')
    exact = precision == 'fp32' or any(w.dtype == torch.float16 for w in weights.values())  # published: rounded once
    return get_learner(dls, model, precision='fp32' if exact else 'auto', path=run/'learner', **recipe)


def get_empty_dls(vocab: list[str]) -> DataLoaders:
    """`DataLoaders` of the classes `vocab` without an image, for a learner that only predicts."""
    blank = RGBImage.create(np.zeros((SIZE, SIZE, 3), np.uint8))
    def label(o: Path | RGBImage): return vocab[0] if o is blank else parent_label(o)  # what fastai may give it
    block = DataBlock(blocks=(ImageBlock(RGBImage), CategoryBlock(vocab=vocab)), get_y=label, dl_type=BatchDL,
                      splitter=IndexSplitter([1]), item_tfms=CenterResize(),
                      batch_tfms=Normalize.from_stats(*cifar_stats))
    return block.dataloaders([blank, blank], bs=1, num_workers=0).new_empty()


def find_images(paths: list[str], vocab: list[str]) -> tuple[list[Path], list[int] | None]:
    """The image files in `paths`, and their classes if that is one folder with sub-folders. Raises `InputError`."""
    files = L(paths).map(lambda path: list_images(path) if os.path.isdir(path) else [Path(path)]).concat()
    if not files: raise InputError(f'there are no images in {" ".join(paths)}' if paths else 'no image was given')
    root = Path(paths[0])
    if len(paths) > 1 or all(f.parent in (root, root.parent) for f in files): return files, None
    if wrong := first(files, lambda f: f.parent.parent != root or f.parent.name not in vocab):
        test = f'; the test images are in {root/"test"}' if (root/'test').is_dir() else ''
        raise InputError(f'{wrong} is not in a sub-folder with the name of a class: {root}/{"|".join(vocab)}{test}')
    return files, [vocab.index(f.parent.name) for f in files]


def list_predictions(files: list[Path], log_probs: Tensor, vocab: list[str]) -> pd.DataFrame:
    """A row per file: the three likeliest classes with their probabilities; `log_probs` (N, classes) float32."""
    top = log_probs.exp().topk(min(3, len(vocab)))
    columns = dict(file=[str(f) for f in files])
    for suffix, indices, probabilities in zip(('', '_2', '_3'), top.indices.T, top.values.T, strict=False):
        columns |= {f'class{suffix}': np.array(vocab)[indices], f'probability{suffix}': probabilities.tolist()}
    return pd.DataFrame(columns)


def export_network(learn: Learner, file: Path):
    """Write the network of `learn` to `file`, whose suffix, one of `EXPORTS`, says in which format.

    ONNX and PyTorch's .pt2 hold the whole network, images (N, 3, 32, 32) float32 in 0 … 1 → probabilities (N, classes),
    safetensors the plain weights; class names and statistics: docs/elsewhere.md. Raises `InputError` and `RunError`.
    """
    if file.suffix not in EXPORTS: raise InputError(f'--export {file} does not end in {", ".join(EXPORTS)}')
    if not find_spec(package := EXPORTS[file.suffix]):
        raise InputError(f'--export {file} needs the package {package}: pip install {package}')
    model, classes = deepcopy(learn.model).cpu().eval(), json.dumps(list(learn.dls.vocab))
    if file.suffix == '.safetensors':
        from safetensors.torch import save
        metadata = dict(classes=classes, mean=json.dumps(cifar_stats[0]), std=json.dumps(cifar_stats[1]))
        atomic_write(file, save(model.state_dict(), metadata))
        return
    network = nn.Sequential(v2.Normalize(*cifar_stats), model, nn.Softmax(1)).eval()
    images = torch.zeros(2, 3, SIZE, SIZE)  # with one image the exporter would fix N to 1
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim('N', min=1)},))
    if file.suffix == '.pt2': torch.export.save(program, content := io.BytesIO(), extra_files={'classes.json': classes})
    else:
        onnx = torch.onnx.export(program, dynamo=True, opset_version=20, input_names=['images'],
                                 output_names=['probabilities'], dynamic_shapes=({0: 'N'},), verbose=False)
        onnx.model.metadata_props['classes'] = classes
        content = io.BytesIO(onnx.model_proto.SerializeToString())  # one file, weights included
    atomic_write(file, content.getvalue())


@one_line_errors('predict.py')
def main(args: list[str] | None = None):
    """Predict, evaluate or export with the arguments of the command line, or of `args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='folder of a finished run')
    parser.add_argument('images', nargs='*', help='images or folders; one with a sub-folder per class is evaluated')
    parser.add_argument('--csv', action='store_true', help='print comma-separated values, a row per image')
    parser.add_argument('--export', type=Path, help=f'write the network to this file: {", ".join(EXPORTS)}')
    o = parser.parse_intermixed_args(args)
    learn = load_run(o.run)
    vocab = list(learn.dls.vocab)
    if o.export:
        export_network(learn, o.export)
        print(f'The network is in {o.export}', file=sys.stderr if o.images else sys.stdout)
        if not o.images: return
    files, targets = find_images(o.images, vocab)
    if not show_progress() or o.csv: learn.remove_cb(ProgressCallback)
    log_probs, *_ = get_log_probs(learn, learn.dls.test_dl(files, bs=512))
    table = list_predictions(files, log_probs, vocab)
    if targets: table.insert(1, 'actual', [vocab[i] for i in targets])
    if o.csv: table.to_csv(sys.stdout, index=False, lineterminator='\n')
    elif targets:
        confused = list_confusions(table.rename(columns={'class': 'predicted'}))
        print(f'''{len(files):,} images, accuracy {percent(accuracy(log_probs, tensor(targets)).item(), 2)}

{format_table(per_class_scores(log_probs, tensor(targets), vocab))}

Most confused:
{format_table(confused) if len(confused) else 'none'}''')
    else: print(f'{format_table(table)}\n\nThe network always names one of its {len(vocab)} classes; of anything else, '
                'a high probability says nothing.')


if __name__ == '__main__': main()
