import json
import re

import pandas as pd
import pytest
from conftest import ROOT, ends, make_folder
from fastai.vision.all import Callback, F, Tensor, TensorImage, nn, torch

import train_fastai
from experiments import repeat, speed
from experiments.repeat import ARMS, format_percent, load_results, tabulate
from train_fastai import get_dls, get_learner

README = (ROOT/'README.md').read_text()
PAGE = (ROOT/'experiments/README.md').read_text()


@pytest.fixture(scope='module')
def results() -> pd.DataFrame: return load_results(ROOT/'experiments')


@pytest.fixture
def options(tmp_path) -> dict:
    return dict(data=str(make_folder(tmp_path/'d', train=20)), out=tmp_path/'out', epochs=1, bs=6)


def test_every_recipe_is_another_and_adds_its_row_once(options, monkeypatch):
    """All with the rates of one finder, that of the default recipe."""
    found, arms = [], ('default', 'lr-max-half-wd-0.4', 'lr-max-quarter-eps-1e-8', 'lr-max-quarter-pad-mean-colour',
                       'ends-at-lrmin', 'div-final-1-holds-lrmax', 'all-levers')
    monkeypatch.setattr(repeat, 'find_lrs', lambda learn: found.append(learn) or (1e-4, 8e-3))
    repeat.main('ingredients', arms=','.join(arms), seeds='2', **options)
    runs = load_results(options['out'])
    assert (*runs.arm,) == arms
    assert [(o.wd, len(o.dls.train_ds)) for o in found] == [(0.1, 54)]
    assert {*zip(runs.train_images, runs.test_images, runs.seed, runs.lr_min, strict=True)} == {(54, 6, 2, 1e-4)}
    assert [*zip(runs.lr_max, runs.wd, runs.ema, strict=True)][:3] == [(8e-3, 0.1, 0.99), (4e-3, 0.4, 0.99),
                                                                       (2e-3, 0.1, 0.99)]
    assert [*runs.div_final[2:]] == pytest.approx([20, 20, 80, 1, 35])
    assert runs.test_loss.nunique() == len(arms)
    assert runs.commit.notna().all()
    assert [f.name for f in options['out'].iterdir()] == ['results.csv']
    for table in ('ingredients', 'test'): repeat.main(table, arms='default', seeds='2', **options)
    assert [*load_results(options['out']).train_images[len(arms):]] == [60], 'repeated, or without all images'


def test_filters_whiten_or_start_as_the_identity_and_flips_alternate(dls):
    prep, *others = (m.weight for m in repeat.make_network(dls, True, True).modules() if isinstance(m, nn.Conv2d))
    x, = dls.train.after_batch((TensorImage(dls.train_ds.images),))
    white = torch.cov(F.conv2d(x.as_subclass(Tensor), prep[:27]).transpose(0, 1).flatten(1)).detach()
    assert (white - white.diag().diag()).abs().max() < 1e-2 < white.max() < 1.01
    x = torch.rand(1, len(others[1]), 4, 4)
    assert torch.equal(F.conv2d(x, others[1], padding=1), x)
    class See(Callback):
        def after_train(self): seen.append(self.dls.train_ds.images)
    seen, images = [], dls.train_ds.images
    get_learner(dls).fit(3, 1e-4, cbs=[repeat.AlternateFlips(), See()])
    assert any(torch.equal(a, b) for a in seen[0] for b in images.flip(-1))
    assert torch.equal(torch.stack(seen[1:]), torch.stack([seen[0].flip(-1), seen[0]]))
    assert dls.train_ds.images is images


def test_seeds_are_runs_of_train_fastai_and_go_on(options, no_pictures, monkeypatch, capsys):
    options |= dict(epochs=2, seeds='5')
    folder, end = options['out']/'seeds-experiment-5-2-6-1', train_fastai.save_results
    monkeypatch.setattr(train_fastai, 'save_results', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert f'--resume {folder}' in ends(capsys, 130, lambda _: repeat.main('seeds', **options))
    monkeypatch.setattr(train_fastai, 'save_results', end)
    repeat.main('seeds', **options)
    m, r = json.loads((folder/'metrics.json').read_text()), load_results(options['out']).iloc[0]
    assert (r.accuracy, r.ema, r.wd, r.padding) == (m['test_accuracy'], 0.99, 0.1, 'reflect')
    for k in ('lr_min', 'lr_max', 'train_accuracy', 'test_loss', 'commit'): assert r[k] == m[k], k
    assert r.torch == m['versions']['torch']
    assert 0 <= r.accuracy_flip <= 1
    m['options']['wd'] = 0.3
    (folder/'metrics.json').write_text(json.dumps(m))
    repeat.main('seeds', **options | dict(add=str(folder)))
    assert load_results(options['out']).arm.tolist() == ['experiment', 'experiment wd=0.3']


def test_what_cannot_be_repeated_is_one_line(options, capsys):
    options['out'].mkdir()
    (options['out']/'results.csv').write_text('table,arm\n')
    for message, what, others in (('--arms: no wd-7', 'test', dict(arms='default,wd-7')),
                                  ('--every', 'seeds', dict(every=2)), ('other columns', 'test', {})):
        assert message in ends(capsys, 2, lambda _, what=what, o=others: repeat.main(what, **options | o))


def test_the_tables_of_results(tmp_path):
    for table, arm, seed, a in (('seeds', 'experiment', 1, 0.94), ('seeds', 'experiment', 2, 0.93),
                                ('test', 'default', 1, 0.94), ('test', 'wd-0.2', 1, 0.95), ('test', 'wd-0.2', 2, 0.97)):
        repeat.add_row(tmp_path, dict(
            table=table, arm=arm, seed=seed, epochs=24, batch_size=512, every=1, train_images=50_000, lr_min=1e-4,
            lr_max=2e-3, ema=0.99, accuracy=a, accuracy_flip=a, train_accuracy=0.98, first_epoch_over_90=9,
            device=f'cpu, X, {seed} threads', torch='2.14.1+cpu', commit='2e50512'))
    seeds, test = (tabulate(load_results(tmp_path), name).splitlines() for name in ('seeds', 'test'))
    assert seeds[4] == '| 1 | 1.00e-04 | 2.00e-03 | 98.00 % | 94.00 % | 94.00 % | 9 | 2e50512 |'
    assert seeds[6] == '| mean ± sd, n = 2 |  |  | 98.00 ± 0.00 % | 93.50 ± 0.71 % | 93.50 ± 0.71 % |  |  |'
    assert seeds[8] == 'At least 94 %: 1 of 2.'
    assert test[5] == ('| wd-0.2 | average, decay 0.99 | 1, 2 | 2.00e-03 | 98.00 ± 0.00 % | 96.00 ± 1.41 % | 1.00 '
                       '| 96.00 ± 1.41 % |')


def test_the_tables_on_the_page_are_those_of_the_results(results):
    printed = {line for name in ('seeds', 'ingredients', 'test') for line in tabulate(results, name).splitlines()}
    shown = [line for line in PAGE.splitlines() if line.startswith(('| ', 'At least'))]
    assert len(shown) > 40
    for line in shown: assert line in printed, line
    assert {*ARMS} <= {*results.arm}
    assert results.commit.notna().all()


def test_the_numbers_in_prose_are_those_of_the_results(results):
    held_out, seeds = (results[results.table == o] for o in ('ingredients', 'seeds'))
    quarter, arms = held_out.arm.str.startswith('lr-max-quarter'), dict([*seeds.set_index('seed').groupby('arm')])
    few, many = ([o[o.ema == ema].accuracy for ema in (0, 0.99)] for o in (held_out[quarter], held_out[~quarter]))
    cpu, gpu = (seeds[(seeds.arm == arm) & seeds.device.str.contains(device)]
                for arm, device in (('finder-of-256', 'EPYC'), ('experiment', 'H100')))
    both = 'accuracy', 'accuracy_flip'
    by = ['table', 'arm', 'ema', 'epochs', results.device.str[:3].fillna('')]
    true = {format_percent(group[k], '') for _, group in results.groupby(by) for k in (*both, 'train_accuracy')}
    true |= {format_percent(o, '') for o in (few[0], many[0], *(gpu.set_index('seed')[k] - arms['lr-max-quarter'][k]
                                                                for k in both))}
    prose = '\n'.join(line for line in PAGE.splitlines() if not line.startswith('| '))
    for text in (README, prose, train_fastai.__doc__):
        assert set() < {*re.findall(r'[\d.]+ ± [\d.]+', text)} <= true
    for text in (README, train_fastai.__doc__): assert format_percent(gpu.accuracy) in text


def test_every_row_of_the_speed_table_is_measured(folder, tmp_path, monkeypatch, capsys):
    """That it runs; how fast anything is, no test should say."""
    started = {}
    def measure(command, env, text):  # in this process: to start another takes seconds
        row = command[2].removeprefix('--row=')
        started[row] = env['PYTHONPATH']
        capsys.readouterr()
        speed.main(row=row, data=str(folder), batches=1, bs=6)
        return capsys.readouterr().out
    monkeypatch.setattr(speed.subprocess, 'check_output', measure)
    monkeypatch.setattr(speed, 'get_dls', lambda data, bs, every: get_dls(data, bs))
    monkeypatch.setattr(speed, 'WARM_UP', 0)
    speed.main(rounds=1, before=str(tmp_path), out=tmp_path/'runs/speed.csv')
    table, printed = pd.read_csv(tmp_path/'runs/speed.csv', index_col='row'), capsys.readouterr().out
    assert {'plain float32', '+ channels-last', speed.FIT, speed.FIT_BEFORE} < {*table.index}
    assert started == dict.fromkeys(table.index[:-1], str(ROOT)) | {speed.FIT_BEFORE: str(tmp_path)}
    assert (table.ratio > 0).all()
    shown = dict(re.findall(r'^\| (.+?) \| ([\d.]+) \| \2 to \2 \|$', printed, re.MULTILINE))  # of a single round
    assert {name: float(r) for name, r in shown.items()} == pytest.approx(dict(table.ratio), rel=1e-3, abs=0.006)


def test_the_speed_tables_are_those_that_were_measured():
    page, files = (ROOT/'docs/speed.md').read_text(), [*(ROOT/'experiments').glob('speed-*.csv')]
    assert len(files) > 1
    for file in files:
        assert f'../experiments/{file.name}' in page
        for row, ratio in pd.read_csv(file, index_col='row').ratio.items(): assert f'| {row} | {ratio:.2f} |' in page
