import json
import sys

import pytest
from conftest import ROOT, make_folder

sys.path.insert(0, str(ROOT/'benchmarks'))
import recipes

ARMS = dict(ingredients=['plain', 'smoothing-0.1', 'wd-0.1', 'wd-0.1-smoothing-0.1'],
            schedule=['div-final-1-holds-lrmax', 'div-final-1e5-annihilates', 'ends-at-lrmin'])


@pytest.mark.parametrize(('table', 'images'), [('ingredients', (54, 6)), ('schedule', (60, 12))])
def test_every_arm_leaves_its_result_and_is_not_done_again(tmp_path, table, images):
    path = make_folder(tmp_path/'d', train=20)
    options = dict(data=path, out=tmp_path/'out', epochs=1, bs=16)
    recipes.main(table, **options)
    files = sorted((tmp_path/'out'/table).iterdir())
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
