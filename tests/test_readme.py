import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fastai.learner import Learner
from fastcore.script import anno_parser
from PIL import Image

import predict
import train_fastai

sys.path.insert(0, str(ROOT/'benchmarks'))
import results

README = (ROOT/'README.md').read_text()


def test_it_opens_with_the_two_commands():
    assert README.split('```')[1].split('\n')[1:3] == [
        'pip install -r requirements.txt && python train_fastai.py',
        'pip install -r requirements.txt && python -m pytest']


def test_its_numbers_are_those_of_the_published_runs():
    runs = results.load(ROOT/'docs/recipes/seeds/24', results.ARMS['seeds'])
    default = runs['experiment']
    test, train, flips = ([r[k] for r in default] for k in ('test_accuracy', 'train_accuracy', 'test_accuracy_flip'))
    assert len(default) == 5
    mean = results.mean_accuracy(test)
    assert f'**{mean} test accuracy** (mean ± sd of 5 seeds; {100 * np.mean(flips):.2f} % with flip' in README
    assert f'| this program | {mean} |' in README
    found = ' '.join((ROOT/'docs/recipes/found.md').read_text().split())
    assert f'**{mean}** after 24 epochs ({results.mean_accuracy(flips)} with flip averaging)' in found
    assert f'fastai: {mean} test accuracy (mean ± sd, 5 seeds)' in train_fastai.__doc__
    over = {r['first_epoch_over_90'] for r in default}
    for row, value in (('test accuracy, epoch 24', f'{100 * np.mean(test):.2f} %'),
                       ('training accuracy, epoch 24', f'{100 * np.mean(train):.2f} %'),
                       ('first epoch over 90 % test accuracy', *over)):
        assert f'| {row} | {value} |' in README
    alone = runs['lr-max-quarter'][0]
    assert (alone['seed'], alone['device'][:11]) == (42, 'NVIDIA H100')
    for text in (README, train_fastai.__doc__):
        assert f'{alone["seconds_training"]:.0f} s' in text
    assert f'the whole run {alone["seconds_total"]:.0f} s' in README
    plain = results.load(ROOT/'docs/recipes/test/24', ['lr-max-quarter-plain'])['lr-max-quarter-plain']
    assert f'({100 * np.mean([r["accuracy"] for r in plain]):.2f} % over {len(plain)}' in README


def test_the_published_run_is_one_of_them_and_of_todays_defaults():
    m = json.loads((ROOT/'docs/cifar10/metrics.json').read_text())
    run, = (r for r in results.load(ROOT/'docs/recipes/seeds/24', ['experiment'])['experiment'] if r['seed'] == 42)
    assert m == {k: v for k, v in run.items() if k != 'test_accuracy_flip'}
    assert train_fastai.command_line(m['options']) == 'python train_fastai.py'
    history = pd.read_csv(ROOT/'docs/cifar10/history.csv')
    schedule = pd.read_csv(ROOT/'docs/cifar10/schedule.csv')
    assert (m['parameters'], m['epochs'], m['batch_size']) == (6_573_130, 24, 512)
    assert m['test_accuracy'] == pytest.approx(history.test_accuracy.iloc[-1])
    assert len(schedule) == 24 * 97
    assert schedule.lr.iloc[[0, -1]].tolist() == pytest.approx([m['lr_min']] * 2, rel=1e-3)
    for rate in ('lr_min', 'lr_max'): assert f'{m[rate]:.2e}'.replace('e-0', 'e-') in README


def test_every_link_leads_somewhere():
    for page in (ROOT/'README.md', *(ROOT/'docs').rglob('*.md')):
        links = re.findall(r'\]\((?!https://)(.*?)\)', page.read_text())
        for link in links: assert (page.parent/link).exists(), link


def test_every_command_runs(folder, tmp_path, monkeypatch, capsys):
    """Every one that it shows, in its order, on small data, but for those in `elsewhere`."""
    parts = README.split('```')
    lines = [line for block in parts[1::2] for line in block.splitlines()]
    lines += re.findall(r'`([^`]+)`', ''.join(parts[::2]))
    shown = [command.strip() for line in lines for command in line.split('&&')]
    commands = [c for c in shown if c.startswith(('python ', 'pip ', 'conda ', 'accelerate '))]
    added = {
        'python train_fastai.py --taste': f'--data {folder} --bs 2 --lr-min 1e-4 --lr-max 1e-3',
        'python train_fastai.py --resume runs/X': '', 'python predict.py runs/X cat.png dog.jpg': '',
        'python predict.py runs/X pictures --csv': '', 'python predict.py runs/X ~/.fastai/data/cifar10/test': ''}
    elsewhere = {
        'python train_fastai.py', 'python -m pytest', 'pip install -r requirements.txt',  # .ci/run
        'pip install fastai==2.8.12 accelerate',
        'accelerate launch --multi_gpu --num_processes 2 train_fastai.py',  # test_distributed.py
        'conda env create -f environment.yml', 'conda activate fastai-cifar10'}  # what it installs is compared
    assert set(commands) == set(added) | elsewhere
    for file in ROOT.glob('*.py'): (tmp_path/file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'pictures').mkdir()
    for name in ('cat.png', 'dog.jpg', 'pictures/a.png'): Image.new('RGB', (50, 40)).save(name)
    train_fastai.main(data=folder, out='runs/X', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    weights = Path('runs/X/model.pth')
    programs = dict(train_fastai=train_fastai.main, predict=predict.main)
    for command, options in added.items():
        resumed = '--resume' in command
        if resumed: weights.rename('weights.pth')  # as if it had been stopped before its end
        args = f'{command} {options}'.replace('~/.fastai/data/cifar10', str(folder)).split()[1:]
        program = programs[args[0].removesuffix('.py')]
        given = anno_parser(program).parse_args(args[1:])  # in this process: to start another takes seconds
        positional = [given.run, *given.images] if 'run' in given else []
        options = {k: v for k, v in vars(given).items() if k in inspect.signature(program).parameters}
        for k in ('run', 'images'): options.pop(k, None)
        capsys.readouterr()
        program(*positional, **options)
        printed = capsys.readouterr()
        assert printed.out
        assert printed.err == '', command
        if resumed: assert weights.read_bytes() == Path('weights.pth').read_bytes()
        if 'taste' in command: assert 'A taste' in printed.out


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


def test_every_test_that_is_named_exists():
    tests = '\n'.join(f.read_text() for f in (ROOT/'tests').glob('test_*.py'))
    named = re.findall(r'`(test_\w+)`', (ROOT/'docs/notes.md').read_text())
    assert len(named) > 10
    for name in named: assert f'def {name}(' in tests, name


def test_it_lists_every_option():
    options = {o for a in anno_parser(train_fastai.main)._actions for o in a.option_strings if o.startswith('--')}
    listed = re.findall(r'--[a-z][a-z-]+', README.split('## Options')[1].split('## ')[0])
    assert set(listed) == options - {'--help', '--pdb', '--xtra'}  # which every `call_parse` has


def test_the_speed_table_is_that_of_the_published_measurement():
    tables = json.loads((ROOT/'benchmarks/speed.json').read_text())
    page = (ROOT/'docs/speed.md').read_text()
    for name in ('loader', 'step', 'epoch'):
        for row, o in tables[name].items(): assert f'| {row} | {o["ratio"]:.3g} |' in page
