import json
import sys

import pytest
import torch
from conftest import ROOT, make_folder
from fastai.callback.core import Callback

from callbacks import load_state
from data import get_dls
from train_fastai import get_learner

sys.path.insert(0, str(ROOT/'benchmarks'))
import recipes

ARMS = dict(ingredients=['plain', 'smoothing-0.1', 'wd-0.1', 'wd-0.1-smoothing-0.1'],
            schedule=['div-final-1-holds-lrmax', 'div-final-1e5-annihilates', 'ends-at-lrmin'])


@pytest.mark.parametrize(('table', 'images'), [('ingredients', (54, 6)), ('schedule', (60, 12))])
def test_every_arm_leaves_its_result_and_is_not_done_again(tmp_path, table, images):
    path = make_folder(tmp_path/'d', train=20)
    options = dict(data=path, out=tmp_path/'out', epochs=1, bs=16)
    recipes.main(table, **options)
    files = sorted((tmp_path/'out'/table/'1').iterdir())
    assert [f.name for f in files] == [f'{arm}-42.json' for arm in ARMS[table]]
    results = [json.loads(f.read_text()) for f in files]
    for r in results:
        assert (r['train_images'], r['test_images']) == images
        assert r['accuracy'] == pytest.approx(r['history'][-1]['test_accuracy'])
        assert set(r['averages']) == {'0.99', '0.995', '0.998'}
    losses = {(r['history'][-1]['train_loss'], r['history'][-1]['test_loss']) for r in results}
    assert len(losses) == len(results), 'arms that do not differ'
    before = [f.stat().st_mtime_ns for f in files]
    recipes.main(table, **options)
    assert [f.stat().st_mtime_ns for f in files] == before


def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_left_alone(tmp_path, monkeypatch):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2: raise KeyboardInterrupt
    dls = get_dls(make_folder(tmp_path/'d'), bs=8)
    folders = [tmp_path/'one', tmp_path/'other']
    for folder in folders: folder.mkdir()
    whole = recipes.run(dls, dict(wd=0.1), 1, 4, folders[0])
    with monkeypatch.context() as m:
        m.setattr(recipes, 'get_learner', lambda *a, **k: get_learner(*a, **k).add_cb(Stop()))
        with pytest.raises(KeyboardInterrupt): recipes.run(dls, dict(wd=0.1), 1, 4, folders[1])
    resumed = recipes.run(dls, dict(wd=0.1), 1, 4, folders[1])
    weights = [load_state(folder/'checkpoint.pth') for folder in folders]
    for part in ('model', *recipes.AVERAGES):
        one, other = (w['model'] if part == 'model' else w['averages'][part] for w in weights)
        assert all(torch.equal(one[k], other[k]) for k in one), part
    assert not torch.equal(weights[0]['model']['fc.bias'], weights[0]['averages'][0.99]['module.fc.bias'])
    for r in (whole, resumed):
        for row in r['history']: del row['seconds']
    assert whole == resumed
