import json
import sys

import pytest
import torch
from conftest import ROOT, make_folder
from fastai.callback.core import Callback

import run
import train_fastai
from data import get_dls
from learner import find_lrs, get_learner
from run import load_state

sys.path.insert(0, str(ROOT/'benchmarks'))
import recipes


@pytest.mark.parametrize(('table', 'images'), [('ingredients', (54, 6)), ('schedule', (60, 12))])
def test_every_arm_leaves_its_result_and_is_not_done_again(tmp_path, table, images):
    path = make_folder(tmp_path/'d', train=20)
    options = dict(data=path, out=tmp_path/'out', epochs=1, bs=6)
    recipes.main(table, **options)
    files = sorted((tmp_path/'out'/table/'1-bs-6').iterdir())
    assert {f.name for f in files} == {f'{arm}-42.json' for arm in recipes.ARMS[table]}
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


def test_the_arms_that_are_named_and_no_others(tmp_path):
    options = dict(data=make_folder(tmp_path/'d', train=20), out=tmp_path/'out', epochs=1, bs=6, no_checkpoint=True)
    recipes.main('ingredients', arms='wd-0.4', seeds='1,2', **options)
    assert sorted(f.name for f in (tmp_path/'out/ingredients/1-bs-6').iterdir()) == ['wd-0.4-1.json', 'wd-0.4-2.json']
    with pytest.raises(SystemExit, match='--arms: no wd-7 in ingredients'):
        recipes.main('ingredients', arms='plain,wd-7', **options)


def test_a_share_of_the_images_has_results_of_its_own(tmp_path):
    options = dict(data=make_folder(tmp_path/'d', train=20), out=tmp_path/'out', epochs=1, bs=8)
    recipes.main('schedule', arms='ends-at-lrmin', every=2, **options)
    file = tmp_path/'out/schedule/1-every-2-bs-8/ends-at-lrmin-42.json'
    r = json.loads(file.read_text())
    assert (r['train_images'], r['test_images'], r['batch_size']) == (30, 6, 8)
    with pytest.raises(SystemExit, match='--every'): recipes.main('seeds', every=2, **options)


def test_the_finder_gives_what_the_experiment_takes(tmp_path):
    path = make_folder(tmp_path/'d', train=20)
    recipes.main('finder', seeds='3', data=path, out=tmp_path, bs=6)
    file, = (tmp_path/'finder').glob('**/*.json')
    assert file == tmp_path/'finder/bs-6/lr-find-3.json'
    r = json.loads(file.read_text())
    lr_min, lr_max = find_lrs(get_learner(get_dls(path, bs=6), seed=3, path=tmp_path))
    assert (r['lr_min'], r['lr_max']) == (lr_min, lr_max)
    assert len(r['lrs']) == len(r['losses']) > 50
    assert {'minimum', 'seed', 'device'} < r.keys()


def test_the_peak_is_as_found_a_third_and_three_times_of_it(tmp_path):
    path = make_folder(tmp_path/'d', train=20)
    recipes.main('peak', seeds='3', data=path, out=tmp_path/'out', epochs=1, bs=6)
    runs = [json.loads((tmp_path/f'out/peak/1-bs-6/{arm}-3.json').read_text()) for arm in recipes.ARMS['peak']]
    held_out = recipes.hold_out(path, tmp_path/'held-out')
    lr_min, lr_max = find_lrs(get_learner(get_dls(held_out, bs=6), seed=3, path=tmp_path))
    for r, times in zip(runs, (1, 1/3, 3), strict=True):
        assert (r['lr_min'], r['lr_max']) == pytest.approx((lr_min, times * lr_max))
        assert r['div_final'] == pytest.approx(r['lr_max'] / r['lr_min'])
        assert (r['train_images'], r['test_images']) == (54, 6)
    assert len({r['history'][-1]['train_loss'] for r in runs}) == 3


def test_the_experiment_is_that_of_train_fastai_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train_fastai, 'save_figure', lambda *_: None)
    options = dict(data=make_folder(tmp_path/'d', train=20), bs=6, epochs=2, seed=5)
    train_fastai.main(**options, out=tmp_path/'alone')
    alone = json.loads((tmp_path/'alone/metrics.json').read_text())
    folder = tmp_path/'seeds/2-bs-6/experiment-5'
    with monkeypatch.context() as m:
        m.setattr(train_fastai, 'save_results', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit): recipes.experiment(**options, folder=folder, arm={})
    assert not (folder/'model.pth').exists()
    recipes.main('seeds', arms='experiment', out=tmp_path, seeds='5', data=options['data'], bs=6, epochs=2)
    r = json.loads(folder.with_suffix('.json').read_text())
    for k in ('lr_min', 'lr_max', 'train_accuracy', 'test_accuracy', 'test_loss'): assert r[k] == alone[k], k
    assert 0 <= r['test_accuracy_flip'] <= 1
    assert (folder/'report.md').exists()


def test_an_arm_of_the_experiment_has_its_options(tmp_path, monkeypatch):
    monkeypatch.setattr(train_fastai, 'save_figure', lambda *_: None)
    options = dict(data=make_folder(tmp_path/'d', train=20), bs=6, epochs=1, seed=5)
    r = recipes.experiment(**options, folder=tmp_path/'run', arm=dict(times=1/4, ema=0.5, wd=0.3))
    lr_min, lr_max = find_lrs(get_learner(get_dls(options['data'], bs=6), seed=5, path=tmp_path))
    assert (r['lr_min'], r['lr_max']) == pytest.approx((lr_min, lr_max / 4))
    assert (r['options']['ema'], r['options']['wd']) == (0.5, 0.3)


def test_several_processes_share_the_work(tmp_path):
    options = dict(data=make_folder(tmp_path/'d', train=20), out=tmp_path, epochs=1, bs=6)
    taken = tmp_path/'ingredients/1-bs-6/wd-0.2-42'
    taken.mkdir(parents=True)
    with run.locked(taken): recipes.main('ingredients', arms='wd-0.2,wd-0.4', **options)
    assert [f.name for f in taken.parent.glob('*.json')] == ['wd-0.4-42.json']


def test_padding_with_the_mean_colour():
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.uint8).view(2, 3, 32, 32)
    padded = recipes.MeanColourPadCrop(4).padded(x)
    assert (padded[:, :, 4:36, 4:36] == x).all()
    assert (padded[:, :, :4] == torch.tensor(recipes.MEAN_COLOUR)[:, None, None]).all()


def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_left_alone(tmp_path, monkeypatch):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2: raise KeyboardInterrupt
    dls = get_dls(make_folder(tmp_path/'d'), bs=8)
    folders = [tmp_path/'one', tmp_path/'other']
    for folder in folders: folder.mkdir()
    recipe = dict(wd=0.1), 1, 4
    lrs = 1e-4, 1e-3
    whole = recipes.train(dls, *recipe, folders[0], lrs)
    with monkeypatch.context() as m:
        m.setattr(recipes, 'get_learner', lambda *a, **k: get_learner(*a, **k).add_cb(Stop()))
        with pytest.raises(KeyboardInterrupt): recipes.train(dls, *recipe, folders[1], lrs)
    resumed = recipes.train(dls, *recipe, folders[1], lrs)
    weights = [load_state(folder/'checkpoint.pth') for folder in folders]
    for part in ('model', *recipes.AVERAGES):
        one, other = (w['model'] if part == 'model' else w['averages'][part]['module'] for w in weights)
        assert all(torch.equal(one[k], other[k]) for k in one), part
    assert not torch.equal(weights[0]['model']['fc.bias'], weights[0]['averages'][0.99]['module']['fc.bias'])
    for r in (whole, resumed):
        for row in r['history']: del row['seconds']
    assert whole == resumed
