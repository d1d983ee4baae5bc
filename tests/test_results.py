import json
import math
import shutil
import sys

import pytest
from conftest import ROOT, one_cycle
from PIL import Image

sys.path.insert(0, str(ROOT/'benchmarks'))
import results


def put(folder, table, name, **result):
    file = folder/table/f'{name}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(device='an abacus') | result))


def trained(accuracy, seed, div_final):
    share = dict(accuracy=accuracy, accuracy_flip=accuracy + 0.01)
    return dict(share, seed=seed, epochs=8, train_images=12500, test_images=2500, lr_min=1e-4, lr_max=1e-3,
                div_final=div_final, history=[dict(train_accuracy=0.5), dict(train_accuracy=0.98)],
                averages={'0.99': {k: v + 0.002 for k, v in share.items()}})


def row(text, first):
    line, = (line for line in text.splitlines() if line.startswith(f'| {first} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def test_the_published_page_is_that_of_the_published_results(tmp_path):
    published = ROOT/'docs/recipes'
    shutil.copy(published/'found.md', tmp_path)
    for file in published.glob('*/**/*.json'):
        to = tmp_path/file.relative_to(published)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(file.read_text())
    results.main(tmp_path)
    assert (tmp_path/'README.md').read_text() == (published/'README.md').read_text()
    drawn = {f.name for f in tmp_path.glob('*.png')}
    assert drawn == {f.name for f in published.glob('*.png')}


def test_seeds_have_a_mean_and_a_deviation(tmp_path):
    for seed, share in ((9, 0.91), (10, 0.93)):
        put(tmp_path, 'seeds/24', f'experiment-{seed}', seed=seed, lr_min=1e-4, lr_max=seed * 1e-4, epochs=24,
            train_images=50000, test_images=10000, train_accuracy=0.98, test_accuracy=share,
            test_accuracy_flip=share + 0.01, first_epoch_over_90=seed + 5)
    (tmp_path/'found.md').write_text('That was found.')
    put(tmp_path, 'seeds/24/experiment-9', 'metrics', seed=9)  # the folder of a run, which is no table
    text = results.page(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith('| experiment |')]
    assert lines[0] == '| experiment | 9 | 1.00·10⁻⁴ | 9.00·10⁻⁴ | 98.00 % | 91.00 % | 92.00 % | 14 |'
    assert lines[1].startswith('| experiment | 10 |')
    mean, flips = f'92.00 ± {math.sqrt(2):.2f} %', f'93.00 ± {math.sqrt(2):.2f} %'
    assert f'| mean ± sd, N = 2 |  |  | **98.00 ± 0.00 %** | **{mean}** | **{flips}** |' in text
    assert 'an abacus' in text
    assert 'That was found.' in text
    assert 'recipes.py seeds --seeds 9,10 --arms experiment --epochs 24\n' in text


def test_recipes_are_compared_on_the_seeds_that_both_have(tmp_path):
    for name, seed, share in (('default', 1, 0.90), ('default', 2, 0.92), ('wd-0.4', 2, 0.93), ('wd-0.4', 3, 0.97)):
        put(tmp_path, 'ingredients/24', f'{name}-{seed}', **trained(share, seed, 10))
    text = results.page(tmp_path)
    plain, other = (row(text, f'{name} (training accuracy 98.00 ± 0.00 %)') for name in ('default', 'wd-0.4'))
    assert plain == ['1, 2', '91.00 ± 1.41 %', '', '92.00 ± 1.41 %']
    assert other == ['2, 3', '95.00 ± 2.83 %', '+1.00', '96.00 ± 2.83 %']
    assert 'Device: an abacus.' in text
    put(tmp_path, 'ingredients/24', 'default-2', **trained(0.92, 2, 10) | dict(device='a slide rule'))
    assert 'Device: a slide rule (default); an abacus (default, wd-0.4).' in results.page(tmp_path)
    averages = [line.split('|')[4].strip() for line in text.splitlines() if 'weights averaged, decay' in line]
    assert averages == ['+0.20 ± 0.00', '+1.20']


def test_the_schedules_are_drawn_as_trained(tmp_path):
    ends = {'ends-at-lrmin': 10, 'div-final-1-holds-lrmax': 1, 'div-final-1e5-annihilates': 1e5}
    size = '8-every-4-bs-128'
    for name, div_final in ends.items(): put(tmp_path, f'schedule/{size}', f'{name}-1', **trained(0.9, 1, div_final))
    ax, = results.schedule_figure(results.load(tmp_path/'schedule'/size, ends)).axes
    for line, div_final in zip(ax.lines, ends.values(), strict=True):
        epoch, lr = line.get_data()
        assert (epoch[0], epoch[-1], lr[-1]) == (0, 8, pytest.approx(1e-3 / div_final))
        for i in (0, 100, 300, 900): assert lr[i] == pytest.approx(one_cycle(i, 1000, 1e-4, 1e-3, div_final / 10))
    text = results.page(tmp_path)
    assert f'schedule-{size}.png' in text
    assert '\n## Schedule, 8 epochs of 12,500 images, tested on 2,500\n' in text
    assert '\npython benchmarks/recipes.py schedule --seeds 1 --epochs 8 --every 4 --bs 128\n' in text
    assert Image.open(tmp_path/f'schedule-{size}.png').size[0] > 500


def test_the_finders_rates_lie_on_its_curves(tmp_path):
    for seed, at in ((1, 1e-3), (2, 4e-3)):
        for table, times in (('finder', 1), ('finder/every-50-bs-8', 0.5)):
            put(tmp_path, table, f'lr-find-{seed}', seed=seed, lrs=[1e-4, 1e-3, 4e-3, 1e-1], losses=[2., 1., 0.5, 3.],
                lr_min=times * 1e-4, lr_max=times * at, minimum=at / 8 ** seed)
    text = results.page(tmp_path)
    assert row(text, '512') == ['50,000', '2', '1.00·10⁻⁴ to 1.00·10⁻⁴', '1.00·10⁻³ to 4.00·10⁻³', '4', '2']
    assert row(text, '8') == ['1,000', '2', '5.00·10⁻⁵ to 5.00·10⁻⁵', '5.00·10⁻⁴ to 2.00·10⁻³', '4', '2']
    ax, = results.finder_figure({'': results.load(tmp_path/'finder', ['lr-find'])['lr-find']}).axes
    marks = [tuple(float(o[0]) for o in line.get_data()) for line in ax.lines if line.get_marker() == 's']
    assert marks == [(1e-3, 1.), (4e-3, 0.5)]
    assert '![Finder](finder.png)' in text
    assert (tmp_path/'finder.png').exists()
    assert 'recipes.py finder --seeds 1,2\n' in text
    assert 'recipes.py finder --seeds 1,2 --every 50 --bs 8\n' in text


def test_accuracy_is_drawn_against_lr_max(tmp_path):
    for name, times, share in (('lr-max', 1, 0.92), ('lr-max-third', 1/3, 0.90), ('lr-max-threefold', 3, 0.91)):
        for seed in (4, 5):
            run = trained(share, seed, 10) | dict(times=times, lr_max=times * seed * 1e-3)
            put(tmp_path, 'peak/8', f'{name}-{seed}', **run)
    ax, = results.peak_figure(results.load(tmp_path/'peak/8', results.ARMS['peak'])).axes
    for line, seed, more in zip(ax.lines, (4, 4, 5, 5), (0, 0.2, 0, 0.2), strict=True):
        lr_max, percent = line.get_data()
        assert lr_max == pytest.approx([seed / 3e3, seed / 1e3, seed * 3e-3])
        assert percent == pytest.approx([90 + more, 92 + more, 91 + more])
    text = results.page(tmp_path)
    assert row(text, 'lr-max-third (training accuracy 98.00 ± 0.00 %)')[2] == '-2.00 ± 0.00'
    assert 'as found: 1.00·10⁻⁴ and 4.00·10⁻³ (seed 4), 1.00·10⁻⁴ and 5.00·10⁻³ (seed 5).' in text
    assert 'recipes.py peak --seeds 4,5 --epochs 8\n' in text
    assert '](peak-8.png)' in text
    assert (tmp_path/'peak-8.png').exists()
