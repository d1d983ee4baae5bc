import json
import math
import runpy
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_folder, one_cycle
from fastai.callback.core import Callback
from filelock import FileLock
from PIL import Image

import train_fastai
from experiments import gpu, page, repeat
from lab import finder
from lab.runs import Run, load_state
from train_fastai import MEAN_COLOUR, Cutout, FlipLR, PadCrop, find_lrs, get_dls, get_learner

AVERAGES = 0.99, 0.995, 0.998


@pytest.fixture
def options(tmp_path) -> dict: return dict(data=make_folder(tmp_path/'d', train=20), out=tmp_path/'out', epochs=1, bs=6)


@pytest.fixture
def no_figures(monkeypatch): monkeypatch.setattr(Run, 'save_figure', lambda *_: None)


@pytest.mark.parametrize(('table', 'images'), [('ingredients', (54, 6)), ('schedule', (60, 12))])
def test_every_arm_adds_its_rows_and_is_not_repeated(options, table, images):
    repeat.main(table, **options)
    runs = repeat.load_results(options['out'])
    assert [*zip(runs.arm, runs.ema, strict=True)] == [*product(repeat.ARMS[table], (0, *AVERAGES))]
    assert {*zip(runs.train_images, runs.test_images, strict=True)} == {images}
    last = runs[runs.ema == 0]
    assert last.test_loss.nunique() == len(last), 'arms that do not differ'
    assert sorted(f.name for f in options['out'].iterdir()) == ['results.csv', 'results.csv.lock']
    before = (options['out']/'results.csv').stat().st_mtime_ns
    repeat.main(table, **options)
    assert (options['out']/'results.csv').stat().st_mtime_ns == before


def test_the_arms_that_are_named_and_no_others(options):
    repeat.main('ingredients', arms='wd-0.4', seeds='1,2', no_checkpoint=True, **options)
    runs = repeat.load_results(options['out'])
    assert {*zip(runs.arm, runs.seed, strict=True)} == {('wd-0.4', 1), ('wd-0.4', 2)}
    assert {*runs.wd} == {0.4}
    with pytest.raises(SystemExit, match='--arms: no wd-7 in ingredients'):
        repeat.main('ingredients', arms='plain,wd-7', **options)


def test_a_share_of_the_images_has_rows_of_its_own(options):
    options |= dict(arms='ends-at-lrmin', bs=8)
    repeat.main('schedule', **options)
    repeat.main('schedule', every=2, **options)
    runs = repeat.load_results(options['out'])
    assert [*zip(runs.every, runs.train_images, runs.test_images, strict=True)] == [(1, 60, 12)] * 4 + [(2, 30, 6)] * 4
    with pytest.raises(SystemExit, match='--every'): repeat.main('seeds', every=2, **options | dict(arms='experiment'))


def test_the_finder_gives_what_the_experiment_takes(options, tmp_path, monkeypatch):
    repeat.main('finder', seeds='3', **options)
    assert not (options['out']/'finder.csv').exists()
    monkeypatch.setattr(repeat, 'DRAWN', 6)
    repeat.main('finder', seeds='3', **options)
    assert not (options['out']/'finder.csv').exists(), 'repeated'
    repeat.main('finder', seeds='4', **options)
    _, r = repeat.load_results(options['out']).itertuples()
    learn = get_learner(get_dls(options['data'], bs=6), seed=4, path=tmp_path)
    assert (r.lr_min, r.lr_max) == find_lrs(learn)
    assert (r.seed, r.epochs, r.train_images) == (4, 0, 60)
    lrs, losses = learn.recorder.lrs, [float(loss) for loss in learn.recorder.losses]
    assert r.minimum == lrs[10 + losses[10:-5].index(min(losses[10:-5]))] / 10
    curve = pd.read_csv(options['out']/'finder.csv')
    assert (curve.lr.tolist(), curve.loss.tolist()) == (lrs, losses)
    assert {*curve.seed} == {4}


def test_the_finders_of_other_lengths_see_what_they_say(options, tmp_path, monkeypatch):
    monkeypatch.setitem(repeat.ARMS, 'finder-length', {
        f'{n}-of-{size}': dict(num_it=n, size=size) for n, size in ((100, 6), (50, 6), (100, 3))})
    repeat.main('finder-length', seeds='3', **options)
    runs = repeat.load_results(options['out']).set_index('arm')
    learn = get_learner(get_dls(options['data'], bs=6), seed=3, path=tmp_path)
    assert tuple(runs.loc['100-of-6', ['lr_min', 'lr_max']]) == find_lrs(learn)
    halves = find_lrs(get_learner(get_dls(options['data'], bs=3), seed=3, path=tmp_path))
    assert tuple(runs.loc['100-of-3', ['lr_min', 'lr_max']]) == pytest.approx([2**0.5 * lr for lr in halves])
    assert runs.lr_max.nunique() == 3
    assert {*runs.batch_size} == {6}
    assert not (options['out']/'finder.csv').exists()


def test_the_peak_is_a_share_of_what_was_found_on_the_images_that_are_not_held_out(options, tmp_path):
    arms = {'default': 1, 'lr-max-half': 1/2, 'lr-max-double': 2}
    repeat.main('ingredients', seeds='3', arms=','.join(arms), **options)
    runs = repeat.load_results(options['out'])
    held_out = repeat.hold_out(options['data'], tmp_path/'held-out')
    lr_min, lr_max = find_lrs(get_learner(get_dls(held_out, bs=6), seed=3, path=tmp_path))
    for r, factor in zip(runs[runs.ema == 0].itertuples(), arms.values(), strict=True):
        assert (r.lr_min, r.lr_max) == pytest.approx((lr_min, factor * lr_max))
        assert r.div_final == pytest.approx(r.lr_max / r.lr_min)
        assert (r.train_images, r.test_images) == (54, 6)
    assert runs[runs.ema == 0].test_loss.nunique() == 3


def test_the_experiment_is_that_of_train_fastai_and_goes_on_where_it_was(options, tmp_path, monkeypatch, no_figures):
    options |= dict(epochs=2)
    train_fastai.main(**options | dict(out=tmp_path/'alone'), seed=5)
    alone = json.loads((tmp_path/'alone/metrics.json').read_text())
    folder = options['out']/'seeds-experiment-5-2-6-1'
    run = dict(arms='experiment', seeds='5', **options)
    with monkeypatch.context() as m:
        m.setattr(train_fastai, 'save_results', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit): repeat.main('seeds', **run)
    assert (folder/'checkpoint.pth').exists()
    assert not (folder/'model.pth').exists()
    assert repeat.load_results(options['out']).empty
    command = ['repeat.py', 'seeds', *(str(o) for k, v in run.items() for o in (f'--{k}', v))]
    monkeypatch.setattr(sys, 'argv', command)
    runpy.run_path(str(ROOT/'experiments/repeat.py'), run_name='__main__')
    r, = repeat.load_results(options['out']).itertuples()
    for k in ('lr_min', 'lr_max', 'train_accuracy', 'test_loss'): assert getattr(r, k) == alone[k], k
    assert (r.accuracy, r.ema, r.wd, r.padding, r.torch) == (
        alone['test_accuracy'], 0.99, 0.1, 'reflect', alone['versions']['torch'])
    assert r.div_final == pytest.approx(r.lr_max / r.lr_min)
    assert 0 <= r.accuracy_flip <= 1
    assert (folder/'report.md').exists()


def test_an_arm_of_the_experiment_has_its_options(options, tmp_path, monkeypatch, no_figures):
    monkeypatch.setitem(repeat.ARMS, 'seeds', {'other': dict(lr_max_factor=1/4, ema=0.5, wd=0.3)})
    repeat.main('seeds', seeds='5', **options)
    r, = repeat.load_results(options['out']).itertuples()
    lr_min, lr_max = find_lrs(get_learner(get_dls(options['data'], bs=6), seed=5, path=tmp_path))
    assert (r.lr_min, r.lr_max) == pytest.approx((lr_min, lr_max / 4))
    assert (r.ema, r.wd) == (0.5, 0.3)


def test_several_processes_share_the_work(options):
    taken = options['out']/'ingredients-wd-0.2-42-1-6-1'
    taken.mkdir(parents=True)
    with FileLock(taken/'repeat.lock'): repeat.main('ingredients', arms='wd-0.2,wd-0.4', **options)
    assert {*repeat.load_results(options['out']).arm} == {'wd-0.4'}


def test_no_row_is_lost_when_several_write_at_once(tmp_path):
    file = tmp_path/'rows.csv'
    with ThreadPoolExecutor(8) as pool:  # each opens the lock for itself, as a process would
        tasks = [pool.submit(repeat.add_rows, file, [dict(n=n, x=n / 7)], ['n', 'x']) for n in range(40)]
        for task in tasks: task.result()
    rows = pd.read_csv(file).sort_values('n')
    assert rows.n.tolist() == [*range(40)]
    assert rows.x.tolist() == [n / 7 for n in range(40)]


def test_a_table_of_an_earlier_version_gets_the_new_columns(tmp_path):
    file = tmp_path/'rows.csv'
    repeat.add_rows(file, [dict(a=1 / 3, b='x')], ['a', 'b'])
    repeat.add_rows(file, [dict(a=0.5, b=None, new=2)], ['a', 'new', 'b'])
    assert file.read_text() == f'a,new,b\n{1 / 3},,x\n0.5,2,\n'


def test_padding_with_the_mean_colour(monkeypatch):
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.uint8).view(2, 3, 32, 32)
    pad, *others = repeat.make_tfms('mean-colour')
    monkeypatch.setattr(PadCrop, 'draw', lambda self, high, x: torch.zeros(len(x), dtype=torch.int64))
    padded = pad.augment(x)
    assert (padded[:, :, 4:, 4:] == x[:, :, :28, :28]).all()
    assert (padded[:, :, :4] == torch.tensor(MEAN_COLOUR)[:, None, None]).all()
    assert [type(tfm) for tfm in others] == [FlipLR, Cutout]


@pytest.mark.parametrize('flips', ['independent', 'alternating'])
def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_left_alone(tmp_path, monkeypatch, flips):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.epoch == 2: raise KeyboardInterrupt
    dls = get_dls(make_folder(tmp_path/'d'), bs=8, item_tfms=repeat.make_tfms('reflect', flips))
    folders, images = [tmp_path/'one', tmp_path/'other'], dls.train_ds.images.clone()
    for folder in folders: folder.mkdir()
    recipe, lrs = (dict(wd=0.1, flips=flips), 1, 4), (1e-4, 1e-3)
    whole = repeat.train(dls, *recipe, folders[0], lrs)
    with monkeypatch.context() as m:
        m.setattr(repeat, 'get_learner', lambda *a, **k: get_learner(*a, **k).add_cb(Stop()))
        with pytest.raises(KeyboardInterrupt): repeat.train(dls, *recipe, folders[1], lrs)
    assert dls.train_ds.images.equal(images)
    resumed = repeat.train(dls, *recipe, folders[1], (2e-4, 2e-3))  # a GPU's finder may find others the second time
    for row in whole + resumed: del row['seconds_training']
    assert whole == resumed
    one, other = (load_state(folder/'checkpoint.pth') for folder in folders)
    averages = [o['callbacks']['keep_averages'] for o in (one, other)]
    pairs = [(one['model'], other['model']), *((averages[0][d]['module'], averages[1][d]['module']) for d in AVERAGES)]
    for a, b in pairs: assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(one['model']['fc.bias'], averages[0][0.99]['module']['fc.bias'])
    rows = pd.DataFrame(one['callbacks']['history']['rows'])
    assert whole[0]['accuracy'] == pytest.approx(rows.test_accuracy.iloc[-1])
    assert whole[0]['test_loss'] == pytest.approx(rows.test_loss.iloc[-1])
    assert whole[0]['train_accuracy'] == rows.train_accuracy.iloc[-1]


def put(folder, **run):
    """Adds a run of an abacus to the results in `folder`."""
    run = dict(epochs=24, batch_size=512, every=1, train_images=50_000, test_images=10_000, lr_min=1e-4, lr_max=1e-3,
               train_accuracy=0.98, device='an abacus', torch='2.0', fastai='2.8') | run
    repeat.add_rows(folder/'results.csv', [dict(accuracy_flip=run.get('accuracy', 0) + 0.01) | run], repeat.COLUMNS)


def put_trained(folder, accuracy, **run):
    for ema, more in ((0, 0), (0.99, 0.002)): put(folder, accuracy=accuracy + more, ema=ema, **run)


def make_page(folder) -> str:
    page.main(folder)
    return (folder/'README.md').read_text()


def row(text, *first):
    line, = (line for line in text.splitlines() if line.startswith(f'| {" | ".join(first)} |'))
    return [cell.strip() for cell in line.split('|')[1 + len(first):-1]]


def test_the_published_page_is_that_of_the_published_results(tmp_path):
    published = ROOT/'experiments'
    for name in ('results.csv', 'finder.csv', 'page.md'): shutil.copy(published/name, tmp_path)
    assert make_page(tmp_path) == (published/'README.md').read_text()
    assert {f.name for f in tmp_path.glob('*.png')} == {f.name for f in published.glob('*.png')}
    results = repeat.load_results(published)
    assert [*results] == repeat.COLUMNS
    assert not results.duplicated([*repeat.KEY, 'ema', 'device', 'torch']).any()


def test_the_findings_are_those_of_the_published_results():
    found = ' '.join((ROOT/'experiments/page.md').read_text().split())
    results = repeat.load_results(ROOT/'experiments')
    seeds = results[(results.table == 'seeds') & results.device.str.contains('H100')].set_index(['arm', 'seed'])
    default, quarter = (seeds.loc[arm] for arm in ('experiment', 'lr-max-quarter'))
    means = [page.format_percent(default[k]) for k in ('accuracy', 'accuracy_flip')]
    assert f'**{means[0]}** after 24 epochs ({means[1]} with flip averaging)' in found
    assert f'standard deviation of {100 * default.accuracy.std():.2f} points' in found
    cpu = results[(results.table == 'seeds') & results.device.str.contains('EPYC')].set_index('seed')
    means = [page.format_percent(cpu[k]) for k in ('accuracy', 'accuracy_flip')]
    assert f'seeds 42 to 44 reach {means[0]} ({means[1]} with flip averaging)' in found
    assert ({*cpu.torch}, {*cpu.arm}, [*cpu.index]) == ({'2.14.1'}, {'experiment'}, [42, 43, 44])
    for k, words in (('accuracy', 'torch 2.11 is'), ('accuracy_flip', 'with flip averaging')):
        difference, error = 100 * (cpu[k].mean() - default[k].mean()), 100 * math.hypot(cpu[k].sem(), default[k].sem())
        assert f'{words} {difference:.2f} points (standard error {error:.2f})' in found
        assert abs(difference) < 2 * error, 'then it is not none'
    plain, flips = (100 * (default[k] - quarter[k]) for k in ('accuracy', 'accuracy_flip'))
    assert f'better by {page.format_mean(plain)} points, which is none' in found
    assert f'by {page.format_mean(flips)} points, {flips.mean() / flips.sem():.1f} standard errors' in found
    runs = 100 * results[results.table == 'ingredients'].set_index(['arm', 'seed', 'ema']).accuracy.unstack('ema')
    at_quarter = runs.index.get_level_values('arm').str.contains('quarter')
    low, high = runs[at_quarter], runs[~at_quarter]
    assert (len(low), len(high)) == (7, 7)
    error = [math.hypot(low[ema].sem(), high[ema].sem()) for ema in (0, 0.99)]
    more = high.mean() - low.mean()
    for words in (f'reach {page.format_mean(low[0])} %', f'reach {page.format_mean(high[0])} %',
                  f'{more[0]:.2f} points more (standard error {error[0]:.2f})',
                  f'{more[0.99]:.2f} points (standard error {error[1]:.2f})'): assert words in found
    low, high = (o[0.99] - o[0] for o in (low, high))
    errors = f'{low.sem():.2f} and {high.sem():.2f}'
    assert f'gains {low.mean():.2f} points over the last step\'s weights at a quarter' in found
    assert f'{high.mean():.2f} at half or all of it, with standard errors of {errors}' in found
    assert runs[[*AVERAGES]].mean().agg(np.ptp) == pytest.approx(0.03, abs=0.005)
    schedule = results[results.table == 'schedule'].groupby('arm').accuracy.mean()
    costs = 100 * (schedule['ends-at-lrmin'] - schedule['div-final-1-holds-lrmax'])
    assert f'costs {costs:.1f} points in these short runs' in found
    rates = results[results.table == 'finder-length'].pivot(index='seed', columns='arm', values='lr_max')
    ratios = rates.div(rates['100-of-512'], axis=0)
    def between(o): return f'{o.min():.2f} to {o.max():.2f} times'
    assert f'√2, finds {between(ratios["100-of-256"])} the LRMAX that it finds with batches of 512' in found
    spread, = {f'{o.max() / o.min():.2f}' for _, o in rates[['100-of-256', '100-of-512']].items()}
    assert f'the same spread (a factor of {spread})' in found
    assert f'it finds {between(ratios[["50-of-256", "50-of-512"]].stack())} the LRMAX of 100 batches of 512' in found
    lowest = results[results.table == 'finder-length'].pivot(index='seed', columns='arm', values='lr_min')
    assert f'and {between(lowest["100-of-256"] / lowest["100-of-512"])} the LRMIN' in found
    assert rates['50-of-512'].idxmin() == rates['50-of-256'].idxmin() == rates['100-of-512'].idxmax()
    assert (len(rates), finder.LARGE_BATCH) == (5, 256)


def test_seeds_have_a_mean_and_a_deviation(tmp_path):
    for seed, share in ((9, 0.91), (10, 0.93)):
        put(tmp_path, table='seeds', arm='experiment', seed=seed, lr_max=seed * 1e-4, accuracy=share,
            first_epoch_over_90=seed + 5, ema=0.99)
    (tmp_path/'page.md').write_text('That was found.\n\n{seeds}\n\n{test}')
    text = make_page(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith('| experiment |')]
    assert lines[0] == '| experiment | 9 | 1.00·10⁻⁴ | 9.00·10⁻⁴ | 98.00 % | 91.00 % | 92.00 % | 14 |'
    assert lines[1].startswith('| experiment | 10 |')
    mean, flips = f'92.00 ± {math.sqrt(2):.2f} %', f'93.00 ± {math.sqrt(2):.2f} %'
    assert f'| mean ± sd, N = 2 |  |  | **98.00 ± 0.00 %** | **{mean}** | **{flips}** |' in text
    assert 'Device: an abacus, torch 2.0, fastai 2.8.' in text
    assert text.startswith('That was found.\n\n24 epochs of 50,000 images, tested on 10,000:\n')
    assert text.endswith('No runs.')
    assert 'experiments.repeat seeds --seeds 9,10 --arms experiment --epochs 24\n' in text
    put(tmp_path, table='seeds', arm='experiment', seed=9, accuracy=0.95, first_epoch_over_90=8, device='beads')
    text = make_page(tmp_path)
    assert [line.split(' | ')[5] for line in text.splitlines() if line.startswith('| experiment | 9 |')] == [
        '91.00 %', '95.00 %'], 'on each device its own table'
    assert text.count('mean ± sd') == 1, 'a single run has none'
    assert 'Device: beads, torch 2.0, fastai 2.8.' in text
    for seed, threads, build in ((1, '1 thread', ''), (2, '2 threads', ''), (3, '2 threads', '+cu130')):
        put(tmp_path, table='seeds', arm='experiment', seed=seed, accuracy=0.9, first_epoch_over_90=8, ema=0.99,
            device=f'cpu, abacus, {threads}', torch=f'2.1{build}')
    text = make_page(tmp_path)
    assert '| mean ± sd, N = 3 |' in text, 'threads and builds of torch do not separate runs'
    assert ('Device: cpu, abacus, 1 thread, torch 2.1, fastai 2.8 (N = 1); cpu, abacus, 2 threads, torch 2.1+cu130, '
            'fastai 2.8 (N = 1); cpu, abacus, 2 threads, torch 2.1, fastai 2.8 (N = 1).') in text


def test_recipes_are_compared_on_the_seeds_that_both_have(tmp_path):
    for arm, seed, share in (('wd-0.4', 2, 0.93), ('default', 2, 0.92), ('default', 1, 0.90), ('wd-0.4', 3, 0.97)):
        put_trained(tmp_path, share, table='ingredients', arm=arm, seed=seed, lr_max=seed * 1e-3)
    text = make_page(tmp_path)
    plain, other = (row(text, arm, 'last step') for arm in ('default', 'wd-0.4'))
    assert (plain[0], other[0]) == ('2 (1, 2)', '2 (2, 3)')
    assert plain[1:] == ['1.00·10⁻³ to 2.00·10⁻³', '98.00 ± 0.00 %', '91.00 ± 1.41 %', '', '92.00 ± 1.41 %']
    assert other[1:] == ['2.00·10⁻³ to 3.00·10⁻³', '98.00 ± 0.00 %', '95.00 ± 2.83 %', '+1.00', '96.00 ± 2.83 %']
    averages = [row(text, arm, 'average, decay 0.99')[4] for arm in ('default', 'wd-0.4')]
    assert averages == ['+0.20 ± 0.00', '+1.20']
    assert 'Device: an abacus, torch 2.0, fastai 2.8.' in text
    put_trained(tmp_path, 0.92, table='ingredients', arm='default', seed=4, device='a slide rule', torch=None)
    assert ('Device: a slide rule, versions not recorded (default); an abacus, torch 2.0, fastai 2.8 (default, wd-0.4).'
            in make_page(tmp_path))


def test_the_schedules_are_drawn_as_trained(tmp_path):
    ends = {'ends-at-lrmin': 10, 'div-final-1-holds-lrmax': 1, 'div-final-1e5-annihilates': 1e5}
    for arm, div_final in ends.items():
        put_trained(tmp_path, 0.9, table='schedule', arm=arm, seed=1, div_final=div_final, epochs=8, every=4,
                    batch_size=128, train_images=12_500, test_images=2500)
    ax, = page.draw_schedules(repeat.load_results(tmp_path), tmp_path).axes
    for line, div_final in zip(ax.lines, ends.values(), strict=True):
        epoch, lr = line.get_data()
        assert (epoch[0], epoch[-1], lr[-1]) == (0, 8, pytest.approx(1e-3 / div_final))
        for i in (0, 100, 300, 900): assert lr[i] == pytest.approx(one_cycle(i, 1000, 1e-4, 1e-3, 1e-3 / div_final))
    text = make_page(tmp_path)
    assert '](schedule-8-4-128.png)' in text
    assert '\n8 epochs of 12,500 images, tested on 2,500:\n' in text
    assert '\npython -m experiments.repeat schedule --seeds 1 --epochs 8 --every 4 --bs 128\n' in text
    assert Image.open(tmp_path/'schedule-8-4-128.png').size[0] > 500


def test_the_finders_rates_lie_on_its_curves(tmp_path):
    for seed, at in ((1, 1e-3), (2, 4e-3)):
        for factor, size in ((1, {}), (0.5, dict(every=50, batch_size=8, train_images=1000))):
            put(tmp_path, table='finder', arm='lr-find', seed=seed, epochs=0, lr_min=factor * 1e-4, lr_max=factor * at,
                minimum=at / 8 ** seed, **size)
        curve = zip([1e-4, 1e-3, 4e-3, 1e-1], [2., 1., 0.5, 3.], strict=True)
        repeat.add_rows(tmp_path/'finder.csv', [dict(seed=seed, lr=lr, loss=loss) for lr, loss in curve],
                        ['seed', 'lr', 'loss'])
    text = make_page(tmp_path)
    assert row(text, 'lr-find', '512') == ['50,000', '2', '1.00·10⁻⁴', '1.00·10⁻³ to 4.00·10⁻³', '4', '2']
    assert row(text, 'lr-find', '8') == ['1,000', '2', '5.00·10⁻⁵', '5.00·10⁻⁴ to 2.00·10⁻³', '4', '2']
    ax, = page.draw_finders(repeat.load_results(tmp_path), tmp_path).axes
    marks = [tuple(float(o[0]) for o in line.get_data()) for line in ax.lines if line.get_marker() == 's']
    assert marks == [(1e-3, 1.), (4e-3, 0.5)]
    assert '![finder](finder.png)' in text
    assert (tmp_path/'finder.png').exists()
    assert 'experiments.repeat finder --seeds 1,2\n' in text
    assert 'experiments.repeat finder --seeds 1,2 --every 50 --bs 8\n' in text


def put_averaged(folder, arm, seed, share):
    put(folder, table='ingredients', arm=arm, seed=seed, ema=0.99, accuracy=share)


def test_the_best_arm_is_that_of_the_seeds_that_most_have(tmp_path):
    arms, seeds = ('default', 'wd-0.2', 'wd-0.4'), (1, 2)
    with pytest.raises(ValueError, match='empty'): gpu.choose_best(tmp_path, 'best', arms, seeds, time.time() - 1)
    for arm, seed, share in (('default', 1, 0.92), ('default', 2, 0.92), ('wd-0.2', 1, 0.91), ('wd-0.2', 2, 0.94),
                             ('wd-0.4', 1, 0.99), ('wd-0.05', 1, 0.99), ('wd-0.05', 2, 0.99), ('default', 3, 0.99)):
        put_averaged(tmp_path, arm, seed, share)
    past = time.time() - 1
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gpu.choose_best, tmp_path, 'best', arms, seeds, time.time() + 60)
        assert gpu.choose_best(tmp_path, 'best', arms, seeds, past) == 'wd-0.2'
        assert not waiting.done(), 'one is missing'
        put_averaged(tmp_path, 'wd-0.4', 2, 0.98)
        assert waiting.result() == 'wd-0.4'
    assert gpu.choose_best(tmp_path, 'best', arms, seeds, past) == 'wd-0.2', 'chosen again'


def test_a_command_that_fails_or_takes_too_long_ends_and_leaves_its_output(tmp_path, capsys):
    gpu.run_alone('a', ['-c', 'print(1); raise SystemExit(3)'], tmp_path, 60)
    gpu.run_alone('b', ['-c', 'print(2, flush=True); import time; time.sleep(60)'], tmp_path, 1)
    assert [(tmp_path/f'{o}.log').read_text() for o in 'ab'] == ['1\n', '2\n']
    assert [line.split(',')[0] for line in capsys.readouterr().out.splitlines()] == ['a: 3', 'b: time is up']


def test_each_process_compares_recipes_and_tests_the_best(tmp_path, monkeypatch):
    done, minutes, half = [], [], 'lr-max-half-wd-0.2'
    def main(table, arms, seeds, **options):
        done.append((table, arms, seeds))
        assert (options['data'], options['out'], options['no_checkpoint']) == ('d', tmp_path, True)
        minutes.append(options['minutes'])
        for arm, seed in product(arms.split(','), map(int, seeds.split(','))):
            job = dict(zip(repeat.KEY, ('ingredients', arm, seed, 24, 512, 1), strict=True))
            if not repeat.is_done(tmp_path, job): put_averaged(tmp_path, arm, seed, 0.93 + 0.001 * len(arm))
    monkeypatch.setattr(repeat, 'main', main)
    gpu.work(1, tmp_path, 'd', time.time() + 300, time.time() + 600)
    changes = gpu.CHANGES[half]
    best = max(changes, key=len)
    assert done == [('ingredients', f'default,{half}', '42'),
                    ('ingredients', ','.join(('default', half, *changes)), '42,43,44'),
                    ('test', f'default,{best}', '47,48,49,50,51')]
    assert minutes == pytest.approx([5, 5, 10], abs=0.1)
    results = repeat.load_results(ROOT/'experiments')
    assert not {*gpu.TESTED} & {*results[results.table == 'seeds'].seed}, 'not new'
    done.clear()
    empty = tmp_path/'empty'
    empty.mkdir()
    gpu.work(2, empty, 'd', time.time() - 2, time.time() - 1)
    assert done == []
    assert 'ValueError' in (empty/'worker-2.log').read_text(), 'nothing to choose from'
    def fail_first(table, **options):
        done.append(table)
        if len(done) == 1: raise RuntimeError('out of memory')
    monkeypatch.setattr(repeat, 'main', fail_first)
    gpu.work(3, tmp_path, 'd', time.time() + 300, time.time() + 600)
    assert done == ['ingredients', 'ingredients', 'test'], 'the rest is not done'
    assert 'out of memory' in (tmp_path/'worker-3.log').read_text()


@pytest.mark.parametrize('base', gpu.BASES)
def test_the_changes_of_a_base_are_what_they_say(base):
    recipe, arms = repeat.RECIPE | repeat.ARMS['ingredients'][base], repeat.ARMS['test']
    for arm, change in zip(gpu.CHANGES[base], (
            dict(label_smoothing=0.2), dict(flips='alternating'), dict(flips='alternating', label_smoothing=0.2),
            dict(wd=2 * recipe['wd'])), strict=True): assert repeat.RECIPE | arms[arm] == recipe | change


def test_alternating_flips_mirror_each_image_in_every_other_epoch(tmp_path):
    dls = get_dls(make_folder(tmp_path/'d', train=20), bs=6, item_tfms=repeat.make_tfms('reflect', 'alternating'))
    images, seen = dls.train_ds.images.clone(), []
    class Look(Callback):
        def after_train(self): seen.append(dls.train_ds.images.clone())
    for seed in (1, 2):
        dls.train_ds.images = images
        get_learner(dls, seed=seed, path=tmp_path).fit(3, cbs=[repeat.AlternateFlips(seed), Look()])
    for first, second, third in (seen[:3], seen[3:]):
        mirrored = [(a == b.flip(-1)).flatten(1).all(1) for a, b in ((first, second), (first, images))]
        assert mirrored[0].all()
        assert third.equal(first)
        assert 15 < mirrored[1].sum() < 45, 'about half of the 60 begin mirrored'
    assert not seen[0].equal(seen[3]), 'another seed'


