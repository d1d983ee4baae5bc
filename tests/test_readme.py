"""Every line of code and every command that README.md and the model card show is run, on small data."""
import ast
import re
import zipfile

import pytest
from conftest import ROOT, args, make_folder
from fastai.vision.all import Learner
from PIL import Image

import predict
import train_fastai
from lab.results import describe_recipe

TEXT = '\n'.join((ROOT/page).read_text() for page in ('README.md', 'docs/cifar10/README.md'))
SMALL = dict(bs=2, epochs=1, lr_min=1e-4, lr_max=1e-3)


@pytest.fixture
def place(run, folder, tmp_path, monkeypatch, no_pictures):
    """A folder with everything that the pages name, in which networks train for an epoch on batches of 8."""
    for name, target in (('docs', ROOT/'docs'), ('runs/X', run), ('pictures', folder/'test')):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).symlink_to(target)
    for file in make_folder(tmp_path/'my_images').rglob('*.png'): Image.new('RGB', (50, 40)).save(file)
    Image.new('RGB', (50, 40)).save(tmp_path/'photo.jpg')
    (tmp_path/'my_classes').symlink_to(tmp_path/'my_images/train')
    for o in (*ROOT.glob('*.py'), *(ROOT/name for name in ('lab', 'sample', 'requirements.txt', 'README.md'))):
        (tmp_path/o.name).symlink_to(o)
    defaults, fit = train_fastai.get_dls.__defaults__, Learner.fit_one_cycle
    monkeypatch.setattr(train_fastai.get_dls, '__defaults__', (8, *defaults[1:]))
    monkeypatch.setattr(Learner, 'fit_one_cycle', lambda learn, _, *more, **options: fit(learn, 1, *more, **options))
    monkeypatch.setattr('fastai.vision.all.untar_data', lambda _: folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_of_python_runs_and_every_change_trains(place):
    """A new `dls` or `learn` is trained for an epoch, and the report tells a changed recipe from the first."""
    names, told = {}, []
    for i, block in enumerate(re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)):
        for line in ast.parse(block).body:
            before = dict(names)
            exec(compile(ast.Module([line], []), 'README.md', 'exec'), names)
            changed = [name for name in ('learn', 'dls') if names.get(name) is not before.get(name)]
            if not changed: continue
            learn = names['learn'] if 'learn' in changed else train_fastai.get_learner(names['dls'])
            if not len(learn.dls.train_ds): continue  # that of `load_run`
            learn.fit_one_cycle(1, 1e-3)
            assert learn.history.rows[-1]['test_loss'] > 0
            told.append((describe_recipe(learn), learn.dls.path, len(learn.dls.train_ds)))
            assert (told[-1] == told[0]) == (i == 0), ast.unparse(line)
    assert len(told) > 4


def test_every_command_runs(folder, place, capsys):
    prose = re.sub(r'```.*?```', '', TEXT, flags=re.DOTALL)
    lines = [line for block in re.findall(r'```\n(.*?)```', TEXT, re.DOTALL) for line in block.splitlines()]
    lines += [' '.join(code.split()).lstrip('!') for code in re.findall(r'`([^`]+)`', prose)]
    commands = dict.fromkeys(o.strip() for line in lines for o in line.split('&&') if o.strip().startswith('python '))
    assert len(commands) > 4
    for i, command in enumerate(commands):
        _, program, *given = command.replace('~/.fastai/data/cifar10/test', 'photo.jpg').split()
        capsys.readouterr()
        if given[0:1] == ['zipfile']: zipfile.main(given[1:])
        if '--help' in given: pytest.raises(SystemExit, train_fastai.main, given)
        elif program == 'train_fastai.py': train_fastai.main(args(*given, data=folder, out=f'new/{i}', **SMALL))
        elif program == 'predict.py': predict.main(given)
        else: assert program == '-m', command
        assert capsys.readouterr().err == '', command


def test_every_link_and_every_test_that_is_named_exists():
    tests = '\n'.join(f.read_text() for f in (ROOT/'tests').glob('test_*.py'))
    for page in (*ROOT.glob('*.md'), *(ROOT/'docs').rglob('*.md'), *ROOT.glob('*/README.md')):
        for link in re.findall(r'\]\((?!https://)(.*?)\)', page.read_text()): assert (page.parent/link).exists(), link
        for name in re.findall(r'`(test_\w+)`', page.read_text()): assert f'def {name}(' in tests, name
