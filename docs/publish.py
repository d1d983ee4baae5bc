#!/usr/bin/env python
"""Makes a finished run the published one.

    python docs/publish.py runs/X ~/.fastai/data/cifar10   # the run, and the folder of its images

docs/cifar10 gets all files of the run, which was started without --data, except the checkpoint. The weights are stored
in float16, half as large. Their accuracy in float32, on the run's test images and on the sample's, is noted in
metrics.json beside the run's own: it is what `predict.py` repeats.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import errors  # noqa: F401  first: it silences fastai's import

# isort: split
import json

from fastai.vision.all import *

from lab.errors import RunError, one_line_errors
from lab.evaluate import get_log_probs
from lab.loader import decode_images
from lab.runs import load_state, save_state, write_whole
from lab.sources import get_sample
from lab.speed import device_name
from predict import load_run

PUBLISHED = Path(__file__).with_name('cifar10')


def halve(weights: dict) -> dict:
    """The `weights` in float16. Raises `RunError` if one is too large for it."""
    halved = {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}
    if too_large := first(k for k, w in halved.items() if not w.isfinite().all()):
        raise RunError(f'{too_large} is too large for float16')
    return halved


def score(learn: Learner, files: Sequence[Path]) -> float:
    """The accuracy for the images in the `files`, each in the folder of its class."""
    targets = tensor([learn.dls.vocab.o2i[f.parent.name] for f in files])
    return (get_log_probs(learn, decode_images(files)).argmax(1) == targets).float().mean().item()


@call_parse
@one_line_errors('publish.py')
def main(
    run: str,  # folder of the finished run
    data: str,  # folder of its images
):
    "Copy a finished run to docs/cifar10, with weights in float16, and note what those score."
    run = Path(run)
    test_files, weights = load_run(run, data).dls.valid_ds.items, halve(load_state(run/'model.pth'))
    shutil.rmtree(PUBLISHED, ignore_errors=True)
    shutil.copytree(run, PUBLISHED, ignore=shutil.ignore_patterns('checkpoint.pth', '*.lock'))
    save_state(PUBLISHED/'model.pth', weights)
    learn, m = load_run(PUBLISHED), json.loads((PUBLISHED/'metrics.json').read_bytes())
    m['options']['out'] = None  # a folder of this machine
    m['published'] = dict(weights='float16', precision='fp32', device=device_name(learn.device),
                          test_accuracy=score(learn, test_files),
                          sample_accuracy=score(learn, get_image_files(get_sample()/'test').sorted()))
    write_whole(PUBLISHED/'metrics.json', json.dumps(m, indent=2).encode() + b'\n')
    print(json.dumps(m['published'], indent=2))
