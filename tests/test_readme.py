import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from experiments.page import format_percent
from fastai.learner import Learner
from fastcore.script import anno_parser
from PIL import Image

import predict
import train_fastai
from arch import ResNet
from experiments.repeat import load_results
from lab.loader import list_augmentations
from train_fastai import Options

README = (ROOT/'README.md').read_text()
UNWRAPPED = ' '.join(README.split())


@pytest.fixture(scope='module')
def results() -> pd.DataFrame: return load_results(ROOT/'experiments')


def test_it_opens_with_the_two_commands():
    assert README.split('```')[1].split('\n')[1:3] == [
        'pip install -r requirements.txt && python train_fastai.py',
        'pip install -r requirements-dev.txt && python -m pytest']


def test_it_is_short(): assert len(README.splitlines()) <= 200


def test_its_numbers_are_those_of_the_published_runs(results):
    runs = results[(results.table == 'seeds') & (results.arm == 'experiment') & results.device.str.contains('H100')]
    assert len(runs) == 5
    mean = format_percent(runs.accuracy)
    assert README.startswith(f'# CIFAR-10 with fastai: {100 * runs.accuracy.mean():.2f} % in 24 epochs')
    assert f'\n| this program | {mean} |' in README
    assert f'gives {100 * runs.accuracy_flip.mean():.2f} %' in UNWRAPPED
    assert f'{mean} test accuracy (mean ± sd, n = 5)' in train_fastai.__doc__
    per_epoch = f'{(runs.seconds_training / 24).mean():.1f} s'
    for row, value in (('test accuracy, epoch 24', f'{mean} (mean ± sd, n = 5)'),
                       ('training accuracy, epoch 24', format_percent(runs.train_accuracy)),
                       ('first epoch over 90 % test accuracy', f'{runs.first_epoch_over_90.unique().item():.0f}'),
                       ('time per epoch', f'{per_epoch} (five runs sharing an H100)')):
        assert f'\n| {row} | {value} |' in README
    alone, = results[(results.table == 'seeds') & (results.arm == 'lr-max-quarter') & (results.seed == 42)].itertuples()
    assert f'took {alone.seconds_training:.0f} s, and the whole run {alone.seconds_total:.0f} s' in UNWRAPPED
    plain = results[(results.table == 'test') & (results.arm == 'lr-max-quarter-plain') & (results.ema == 0)]
    assert f'({100 * plain.accuracy.mean():.2f} % over {len(plain)} seeds' in UNWRAPPED


def test_the_published_run_is_a_row_of_the_results_and_of_todays_defaults(results):
    m = json.loads((ROOT/'docs/cifar10/metrics.json').read_text())
    run, = results[(results.table == 'seeds') & (results.arm == 'experiment') & (results.seed == 42)
                   & (results.device == m['device']) & (results.torch == m['versions']['torch'])].itertuples()
    assert (m['test_accuracy'], m['train_accuracy'], m['lr_min'], m['lr_max'], m['seconds_total']) == pytest.approx(
        (run.accuracy, run.train_accuracy, run.lr_min, run.lr_max, run.seconds_total))
    pins = dict(line.split('==') for line in (ROOT/'requirements.txt').read_text().split())
    for package in ('torch', 'torchvision', 'fastai'): assert m['versions'][package].split('+')[0] == pins[package]
    assert (f"a full run, of seed {m['seed']} on two cores of an AMD EPYC with torch {pins['torch']}: "
            f"{100 * m['test_accuracy']:.2f} %") in UNWRAPPED
    alike = results[(results.table == 'seeds') & (results.arm == 'experiment') & results.device.str.contains('EPYC')]
    assert len(alike) == 3
    assert f'(three seeds there: {format_percent(alike.accuracy)})' in UNWRAPPED
    assert m['device'] == 'cpu, AMD EPYC, 2 threads'
    assert f"that they reach {100 * m['published']['test_accuracy']:.2f} %" in UNWRAPPED
    changed = {k: v for k, v in m['options'].items() if k in vars(Options()) and v != getattr(Options(), k)}
    assert changed == {}
    history = pd.read_csv(ROOT/'docs/cifar10/history.csv')
    schedule = pd.read_csv(ROOT/'docs/cifar10/schedule.csv')
    assert (m['parameters'], m['epochs'], m['batch_size']) == (6_573_130, 24, 512)
    assert m['test_accuracy'] == pytest.approx(history.test_accuracy.iloc[-1])
    assert len(schedule) == 24 * 97
    assert schedule.lr.iloc[[0, -1]].tolist() == pytest.approx([m['lr_min']] * 2, rel=1e-3)
    superscript = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
    for rate in ('lr_min', 'lr_max'):
        digits, exponent = f'{m[rate]:.2e}'.split('e')
        assert f'{digits}·10{str(int(exponent)).translate(superscript)}' in README


def test_every_link_leads_somewhere():
    for page in (ROOT/'README.md', *(ROOT/'docs').rglob('*.md'), *(ROOT/'experiments').glob('*.md')):
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
        'python train_fastai.py --quick': f'--data {folder} --bs 2 --lr-min 1e-4 --lr-max 1e-3',
        'python predict.py docs/cifar10 photo.jpg': '',
        'python predict.py docs/cifar10 ~/.fastai/data/cifar10/test': '',
        'python train_fastai.py --resume runs/X': '',
        'python predict.py runs/X pictures --csv': '', 'python predict.py runs/X --export net.onnx': ''}
    elsewhere = {
        'python train_fastai.py', 'python -m pytest', 'pip install -r requirements.txt',  # .ci/run
        'pip install -r requirements-dev.txt', 'pip install fastai==2.8.12',
        'accelerate launch --multi_gpu --num_processes 2 train_fastai.py',  # test_processes.py
        'conda env create -f environment.yml', 'conda activate fastai-cifar10'}  # what it installs is compared
    assert set(commands) == set(added) | elsewhere
    for file in (*ROOT.glob('*.py'), ROOT/'lab', ROOT/'docs'): (tmp_path/file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for name in ('photo.jpg', 'pictures/a.png', 'cifar10/test/cat/0.png'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (50, 40)).save(name)
    train_fastai.main(data=folder, out='runs/X', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    weights = Path('runs/X/model.pth')
    programs = dict(train_fastai=train_fastai.main, predict=predict.main)
    for command, options in added.items():
        resumed = '--resume' in command
        if resumed: weights.rename('weights.pth')  # as if it had been stopped before its end
        args = f'{command} {options}'.replace('~/.fastai/data/', '').split()[1:]
        program = programs[args[0].removesuffix('.py')]
        parser = anno_parser(program)  # in this process: to start another takes seconds
        given = {k: v for k, v in vars(parser.parse_intermixed_args(args[1:])).items() if v != parser.get_default(k)}
        positional = [given.pop('run'), *given.pop('images')] if 'run' in given else []
        capsys.readouterr()
        program(*positional, **given)
        printed = capsys.readouterr()
        assert printed.out
        assert printed.err == '', command
        if resumed: assert weights.read_bytes() == Path('weights.pth').read_bytes()
        if 'quick' in command: assert 'A quick look' in printed.out


@pytest.fixture
def blocks(folder, tmp_path, monkeypatch) -> list[str]:
    """The recipe, its changes, and a prediction, made for small data, in a folder with a run and an image."""
    recipe, changes, prediction = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    blocks = [recipe, *changes.split('\n\n'), prediction]
    for old, new in (('untar_data(URLs.CIFAR)', repr(str(folder))), ('get_dls(path)', 'get_dls(path, bs=8)'),
                     ('(24,', '(1,'), ("get_dls('my_images')", f'get_dls({str(folder)!r}, bs=8)')):
        assert sum(block.count(old) for block in blocks) == 1
        blocks = [block.replace(old, new) for block in blocks]
    blocks = [block.replace('get_dls(path, item_tfms', 'get_dls(path, bs=8, item_tfms') for block in blocks]
    train_fastai.main(data=folder, out=tmp_path/'runs/X', bs=8, epochs=1, lr_min=1e-4, lr_max=1e-3)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (50, 40)).save('cat.png')
    return blocks


def test_every_line_of_python_runs_and_what_is_changed_trains(blocks):
    recipe, *changes, prediction = blocks
    exec(recipe, names := {})
    assert isinstance(names['learn'], Learner)
    assert isinstance(names['learn'].model, ResNet)
    changed = dict(Invert='dls', ranger='learn', resnet18='learn', get_dls='dls')
    assert len(changes) == len(changed)
    for block, (word, name) in zip(changes, changed.items(), strict=True):
        assert word in block
        before = names[name]
        exec(block, names)
        assert names[name] is not before
        learn = names['learn'] if name == 'learn' else train_fastai.get_learner(names['dls'], precision='fp32')
        learn.fit_one_cycle(1, 1e-3)
        assert learn.history.rows[-1]['test_loss'] > 0
    exec(prediction, names := {})
    assert isinstance(names['learn'], Learner)


def test_the_changes_are_what_they_say(blocks, folder):
    exec(blocks[0].replace('learn.fit_one_cycle', 'noop'), names := {})
    invert, optimizer, network = blocks[1:4]
    exec(invert, names)
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.uint8).view(2, 3, 32, 32)
    inverted = [names['Invert']()(names['TensorImage'](x), split_idx=0) for _ in range(20)]
    assert {(o == x).flatten(1).all(1)[0].item() for o in inverted} == {True, False}
    assert all(((o == x) | (o == 255 - x)).all() for o in inverted)
    assert 'Invert()' in list_augmentations(names['dls'])
    exec(optimizer.replace('learn = get_learner(dls, opt_func=partial', 'other = get_learner(dls, opt_func=partial'),
         names)
    for learn in ('learn', 'other'): names[learn].create_opt()
    assert type(names['learn'].opt).__name__ == 'Lookahead'
    assert type(names['other'].opt.opt) is torch.optim.SGD
    exec(network, names)
    assert type(names['learn'].model).__name__ == 'ResNet'
    assert not isinstance(names['learn'].model, ResNet)


def test_every_test_that_is_named_exists():
    tests = '\n'.join(f.read_text() for f in (ROOT/'tests').glob('test_*.py'))
    named = re.findall(r'`(test_\w+)`', (ROOT/'docs/notes.md').read_text())
    assert len(named) > 10
    for name in named: assert f'def {name}(' in tests, name


def test_it_lists_every_option():
    options = {o for a in anno_parser(train_fastai.main)._actions for o in a.option_strings if o.startswith('--')}
    listed = re.findall(r'--[a-z][a-z-]+', README.split('## Options')[1].split('## ')[0])
    assert set(listed) == options - {'--help', '--pdb', '--xtra'}  # which every `call_parse` has


def test_its_file_tree_is_the_projects():
    tree = re.findall(r'^([\w.]+/?)', README.split('## File tree')[1].split('```')[1], re.MULTILINE)
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = {re.match(r'[^/]+/?', file)[0] for file in tracked}
    rest = {'LICENSE', 'README.md', 'environment.yml', 'pyproject.toml', 'requirements.txt', 'requirements-dev.txt'}
    assert {name for name in there if not name.startswith('.')} - rest == set(tree)


def test_the_speed_tables_are_those_of_the_published_measurements():
    page = (ROOT/'docs/speed.md').read_text()
    for file, names in (('speed', ('loader', 'step', 'batch', 'epoch')), ('speed-amx', ('step',))):
        tables = json.loads((ROOT/f'benchmarks/{file}.json').read_text())
        for name in names:
            rows = '\n'.join(f'| {row} | {o["ratio"]:.3g} |' for row, o in tables[name].items())
            assert f'| {name} | ratio |\n|---|--:|\n{rows}\n' in page
    peaks = [o['peak_mib'] for row, o in json.loads((ROOT/'benchmarks/speed.json').read_text())['batch'].items()
             if 'Learner' in row]
    assert f'holds {peaks[0]:,} MiB at its peak, and {peaks[1]:,} before' in ' '.join(page.split())
