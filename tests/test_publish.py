import io
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, ends
from fastai.vision.all import get_image_files

import predict
import train_fastai
from lab.errors import RunError
from lab.runs import load_state

sys.path.insert(0, str(ROOT/'docs'))
import publish

CIFAR10 = Path('~/.fastai/data/cifar10').expanduser()


@pytest.fixture
def published(folder, tmp_path, monkeypatch):
    """A small run in `run`, published in `published`; the images of the sample are those of `folder`."""
    train_fastai.main(data=folder, out=tmp_path/'run', bs=8, epochs=2, lr_min=1e-4, lr_max=3e-3)
    monkeypatch.setattr(publish, 'PUBLISHED', tmp_path/'published')
    monkeypatch.setattr(publish, 'get_sample', lambda: folder)
    publish.main(str(tmp_path/'run'), str(folder))
    return tmp_path/'published'


def test_a_published_run_has_the_runs_files_and_weights_of_half_the_size(published, tmp_path):
    run = tmp_path/'run'
    files = {f.name: f.read_bytes() for f in run.iterdir()}
    del files['checkpoint.pth']
    assert {f.name for f in published.iterdir()} == files.keys()
    for name in files.keys() - {'model.pth', 'metrics.json'}: assert (published/name).read_bytes() == files[name]
    weights, halved = (load_state(o/'model.pth') for o in (run, published))
    assert {w.dtype for w in halved.values()} == {torch.float16, torch.int64}
    for k, w in weights.items(): assert halved[k].equal(w.half() if w.dtype == torch.float32 else w)
    assert (published/'model.pth').stat().st_size < 0.6 * (run/'model.pth').stat().st_size
    own, m = (json.loads((o/'metrics.json').read_text()) for o in (run, published))
    noted = m.pop('published')
    assert own.pop('options') | dict(out=None) == m.pop('options')
    assert own == m
    assert (noted['weights'], noted['precision']) == ('float16', 'fp32')
    assert noted['test_accuracy'] == noted['sample_accuracy'] == pytest.approx(own['test_accuracy'], abs=1.1 / 12)


def test_predict_repeats_the_published_accuracy_in_float32(published, folder, capsys):
    learn = predict.load_run(published)
    assert {w.dtype for w in learn.model.state_dict().values()} == {torch.float32, torch.int64}
    assert not hasattr(learn, 'mixed_precision')
    capsys.readouterr()
    predict.main(str(published), str(folder/'test'))
    accuracy = json.loads((published/'metrics.json').read_text())['published']['test_accuracy']
    assert f'accuracy                     {100 * accuracy:.2f} %' in capsys.readouterr().out
    predict.main(str(published), str(folder/'test/red/0.png'), csv=True)
    assert 0.33 < pd.read_csv(io.StringIO(capsys.readouterr().out)).probability[0] <= 1


def test_weights_that_float16_cannot_hold_are_not_published():
    assert publish.halve(dict(a=torch.tensor([1.5]), n=torch.tensor(7))) == dict(a=torch.tensor([1.5]).half(), n=7)
    with pytest.raises(RunError, match='b is too large'): publish.halve(dict(a=torch.ones(1), b=torch.ones(1) * 7e4))


def test_a_run_of_other_images_is_not_published(folder, tmp_path, capsys, monkeypatch):
    train_fastai.main(data=folder, out=tmp_path/'run', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    (tmp_path/'published').mkdir()
    (tmp_path/'published/kept').touch()
    monkeypatch.setattr(publish, 'PUBLISHED', tmp_path/'published')
    assert 'has no folder "train"' in ends(capsys, 2, publish.main, str(tmp_path/'run'), str(tmp_path/'run'))
    assert (tmp_path/'published/kept').exists()


def test_predict_prints_the_published_accuracy_of_the_sample(sample, capsys):
    predict.main(str(ROOT/'docs/cifar10'), str(sample/'test'))
    count, line = capsys.readouterr().out.splitlines()[:2]
    assert count == '1,000 images of 10 classes'
    accuracy = json.loads((ROOT/'docs/cifar10/metrics.json').read_text())['published']['sample_accuracy']
    assert float(line.split()[1]) / 100 == pytest.approx(accuracy, abs=2.1 / 1000)


if CIFAR10.exists():  # elsewhere the sample has to do
    def test_the_published_weights_score_what_is_published():
        files = get_image_files(CIFAR10/'test').sorted()
        accuracy = json.loads((ROOT/'docs/cifar10/metrics.json').read_text())['published']['test_accuracy']
        assert len(files) == 10_000
        learn = predict.load_run(ROOT/'docs/cifar10')
        assert publish.score(learn, files) == pytest.approx(accuracy, abs=2.1 / 10_000)
