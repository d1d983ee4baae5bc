import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lab.evaluate import get_log_probs
from lab.loader import decode_images, list_images
from lab.speed import fast
from predict import load_run

PUBLISHED, CIFAR10 = ROOT/'docs/cifar10', Path('~/.fastai/data/cifar10').expanduser()


def test_published_weights_score_what_is_published(sample):
    """Weights in float16, computed in float32; on all test images where CIFAR-10 is at hand, else on the sample's."""
    path, n, name = (CIFAR10, 10_000, 'test_accuracy') if CIFAR10.exists() else (sample, 1_000, 'sample_accuracy')
    learn, files = load_run(PUBLISHED), list_images(path/'test')
    assert len(files) == n
    assert {w.dtype for w in learn.model.state_dict().values()} == {torch.float32, torch.int64}
    with fast(learn), learn.no_bar(): log_probs = get_log_probs(learn, decode_images(files))
    right = log_probs.argmax(1) == torch.tensor([learn.dls.vocab.o2i[f.parent.name] for f in files])
    published = json.loads((PUBLISHED/'metrics.json').read_text())['published'][name]
    assert right.float().mean().item() == pytest.approx(published, abs=2.1 / n)
