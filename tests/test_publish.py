import json

import pytest
import torch
from conftest import ROOT

from lab.evaluate import get_log_probs
from lab.loader import decode_images, list_images
from lab.speed import fast
from predict import load_run

PUBLISHED = ROOT/'docs/cifar10'


def test_published_weights_score_what_is_published(sample):
    """Weights in float16, computed in float32; on the sample. README has the command for all 10,000 images."""
    learn, files = load_run(PUBLISHED), list_images(sample/'test')
    assert len(files) == 1_000
    assert {w.dtype for w in learn.model.state_dict().values()} == {torch.float32, torch.int64}
    with fast(learn), learn.no_bar(): log_probs = get_log_probs(learn, decode_images(files))
    right = log_probs.argmax(1) == torch.tensor([learn.dls.vocab.o2i[f.parent.name] for f in files])
    published = json.loads((PUBLISHED/'metrics.json').read_text())['published']['sample_accuracy']
    assert right.float().mean().item() == pytest.approx(published, abs=0.0021)
