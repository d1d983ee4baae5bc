import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from fastai.learner import Learner
from fastcore.script import anno_parser
from PIL import Image

import train_fastai

sys.path.insert(0, str(ROOT/'benchmarks'))
import results

README = (ROOT/'README.md').read_text()


def test_it_opens_with_the_two_commands():
    assert README.split('```')[1].split('\n')[1:3] == [
        'pip install -r requirements.txt && python train_fastai.py',
        'pip install -r requirements.txt && python -m pytest']


def test_its_numbers_are_those_of_the_published_run():
    m = json.loads((ROOT/'docs/cifar10/metrics.json').read_text())
    history = pd.read_csv(ROOT/'docs/cifar10/history.csv')
    schedule = pd.read_csv(ROOT/'docs/cifar10/schedule.csv')
    assert (m['parameters'], m['epochs'], m['batch_size'], m['options']['lr_min']) == (6_573_130, 24, 512, None)
    assert m['test_accuracy'] == pytest.approx(history.test_accuracy.iloc[-1])
    assert len(schedule) == 24 * 97
    assert schedule.lr.iloc[[0, -1]].tolist() == pytest.approx([m['lr_min']] * 2, rel=1e-3)
    for row, value in (('parameters', f'{m["parameters"]:,}'),
                       ('training accuracy, epoch 24', f'{100 * m["train_accuracy"]:.2f} %'),
                       ('test accuracy, epoch 24', f'{100 * m["test_accuracy"]:.2f} %'),
                       ('first epoch over 90 % test accuracy', m['first_epoch_over_90'])):
        assert f'| {row} | {value} |' in README
    assert f'{100 * m["test_accuracy"]:.2f} % test accuracy' in train_fastai.__doc__
    assert f'training took {m["seconds_training"] / 60:.0f} minutes, everything together one hour' in README
    assert 3300 < m['seconds_total'] < 3900
    for rate in ('lr_min', 'lr_max'): assert f'{m[rate]:.2e}'.replace('e-0', 'e-') in README


def test_its_other_numbers_are_those_of_the_published_results():
    def error(r): return f'error of {100 * (r["accuracy"] * (1 - r["accuracy"]) / r["test_images"])**0.5:.1f} points'
    ingredients = results.load(ROOT/'docs/recipes/ingredients/24', results.ARMS['ingredients'])
    plain, *others = (run for run, in ingredients.values())
    assert {r['seed'] for r in (plain, *others)} == {42}
    text = ' '.join(README.split())
    gains = {d: sorted((100 * (r['averages'][d]['accuracy'] - r['accuracy']) for r in (plain, *others)), key=abs)
             for d in plain['averages']}
    assert "gained {:.2f}, {:.2f} and {:.2f} points over the last step's".format(*gains['0.995']) in text
    assert '0.99 gained {:.2f}, {:.2f} and {:.2f} points'.format(*gains['0.99']) in text
    assert 'and 0.998 lost {:.2f}, {:.2f} and {:.2f}.'.format(*(-gain for gain in gains['0.998'])) in text
    assert f'on {plain["test_images"]:,} training images held out for it, whose' in text
    assert f'a standard {error(plain)}. Of' in text
    assert f'On {plain["train_images"]:,} images (seed 42) the' in text
    averaged, last = (results.mean_accuracy([r['accuracy']]) for r in (plain['averages']['0.995'], plain))
    assert f"{averaged} of {plain['test_images']:,} held-out training images correctly, the last step's {last}." in text
    decay = [100 * (r['accuracy'] - plain['accuracy']) for r in others]
    assert '0.1 and 0.5 instead of 0.01 gained {:.2f} and {:.2f} points'.format(*decay) in text
    arms = results.load(ROOT/'docs/recipes/schedule/8-every-4-bs-128', results.ARMS['schedule'])
    seeds, = {tuple(r['seed'] for r in runs) for runs in arms.values()}
    lr_min, holds, annihilates = (results.mean_accuracy([r['accuracy'] for r in runs]) for runs in arms.values())
    one = arms['ends-at-lrmin'][0]
    assert f'LRMIN named {lr_min} of {one["test_images"]:,} test' in text
    assert f'(see below), {holds}, ' in text
    assert f'annihilating the rate {annihilates} (' in text
    assert f'of N = {len(seeds)} seeds, {" and ".join(map(str, seeds))})' in text
    assert f'standard {error(one)}: holding' in text
    averaged = (results.mean_accuracy([r['averages']['0.99']['accuracy'] for r in runs]) for runs in arms.values())
    assert '{}, {} and {}.'.format(*averaged) in text
    peak = results.load(ROOT/'docs/recipes/peak/8-every-4-bs-128', results.ARMS['peak'])
    as_found, third, threefold = (run for run, in peak.values())
    assert {r['seed'] for r in (as_found, third, threefold)} == {42}
    lr_max = f'{as_found["lr_max"]:.2e}'.replace('e-0', 'e-')
    right, low, high = (results.mean_accuracy([r['accuracy']]) for r in (as_found, third, threefold))
    assert f'gave it, {lr_max} for such short runs, {right} of {as_found["test_images"]:,} held-out' in text
    assert f'with a third of it {low}, with three times of it {high}. One run' in text
    assert f'standard {error(as_found)}: neither' in text
    averaged = (results.mean_accuracy([r['averages']['0.99']['accuracy']]) for r in (as_found, third, threefold))
    assert 'no help here: {}, {} and {}. Whether'.format(*averaged) in text
    assert as_found['accuracy'] > max(third['accuracy'], threefold['accuracy'])
    found = results.load(ROOT/'docs/recipes/finder', results.ARMS['finder'])['lr-find']
    factors = [max(r[k] for r in found) / min(r[k] for r in found) for k in ('valley', 'minimum', 'steep', 'slide')]
    assert 'factors of {:.1f} and {:.1f}'.format(*factors[:2]) in text
    assert 'over factors of {:.0f} and {:,.0f}'.format(*factors[2:]) in text
    assert f'Under {len(found)} seeds' in text


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r'\]\((.*?)\)', README) if not link.startswith('https://')]
    assert len(links) > 5
    for link in links: assert (ROOT/link).exists(), link


def test_every_command_runs(folder, tmp_path, monkeypatch):
    """Every one that it shows, in its order, on small data, but for those in `elsewhere`."""
    parts = README.split('```')
    lines = [line for block in parts[1::2] for line in block.splitlines()]
    lines += re.findall(r'`([^`]+)`', ''.join(parts[::2]))
    shown = [command.strip() for line in lines for command in line.split('&&')]
    commands = [c for c in shown if c.startswith(('python ', 'pip ', 'conda '))]
    added = {
        'python train_fastai.py --taste': f'--data {folder} --bs 2 --lr-min 1e-4 --lr-max 1e-3',
        'python train_fastai.py --resume runs/X': '', 'python predict.py runs/X cat.png dog.jpg': '',
        'python predict.py runs/X pictures --csv': '', 'python predict.py runs/X ~/.fastai/data/cifar10/test': ''}
    elsewhere = {
        'python train_fastai.py', 'python train_fastai.py --ema 0',
        'python tests/kill.py --kills 20',  # test_train_fastai.py, with fewer kills
        'python benchmarks/recipes.py seeds --seeds 42,43,44,45,46',
        'python benchmarks/recipes.py ingredients --seeds 42',
        'python benchmarks/recipes.py schedule --seeds 42,43 --epochs 8 --every 4 --bs 128',
        'python benchmarks/recipes.py peak --seeds 42 --epochs 8 --every 4 --bs 128',
        'python benchmarks/results.py',  # test_recipes.py …
        'python benchmarks/speed.py', 'python -m pytest', 'pip install -r requirements.txt',  # test_speed.py, .ci/run
        'conda env create -f environment.yml', 'conda activate fastai-cifar10'}  # what it installs is compared
    assert set(commands) == set(added) | elsewhere
    for file in ROOT.glob('*.py'): (tmp_path/file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pictures').mkdir()
    for name in ('cat.png', 'dog.jpg', 'pictures/a.png'): Image.new('RGB', (50, 40)).save(name)
    train_fastai.main(data=folder, out='runs/X', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    weights = Path('runs/X/model.pth')
    for command, options in added.items():
        resumed = '--resume' in command
        if resumed: weights.rename('weights.pth')  # as if it had been stopped before its end
        args = f'{command} {options}'.replace('~/.fastai/data/cifar10', str(folder)).split()[1:]
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ''), command
        assert done.stdout
        if resumed: assert weights.read_bytes() == Path('weights.pth').read_bytes()
        if 'taste' in command: assert 'A taste' in done.stdout


def test_every_line_of_python_runs(folder, tmp_path, monkeypatch):
    train_fastai.main(data=folder, out=tmp_path/'runs/X', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (50, 40)).save('cat.png')
    one, other = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    for old, new in (('untar_data(URLs.CIFAR)', f'{str(folder)!r}, bs=8'), ('(24,', '(1,')):
        assert other.count(old) + one.count(old) == 1
        one, other = one.replace(old, new), other.replace(old, new)
    for block in (one, other): exec(block, names := {})
    assert isinstance(names['learn'], Learner)


def test_every_test_that_it_names_exists():
    tests = '\n'.join(f.read_text() for f in (ROOT/'tests').glob('test_*.py'))
    named = re.findall(r'`(test_\w+)`', README)
    assert len(named) > 10
    for name in named: assert f'def {name}(' in tests, name


def test_it_lists_every_option():
    options = {o for a in anno_parser(train_fastai.main)._actions for o in a.option_strings if o.startswith('--')}
    listed = re.findall(r'--[a-z][a-z-]+', README.split('## Options')[1].split('## ')[0])
    assert set(listed) == options - {'--help', '--pdb', '--xtra'}  # which every `call_parse` has


def test_its_speed_table_is_that_of_the_published_measurement():
    tables = json.loads((ROOT/'benchmarks/speed.json').read_text())
    for name in ('loader', 'step', 'epoch'):
        for row, o in tables[name].items(): assert f'| {row} | {o["ratio"]:.3g} |' in README
