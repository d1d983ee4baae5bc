"""Which room imports which, how large all of them are, and that importing any runs nothing."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = {f.stem: f for f in ROOT.glob('*.py')} | {f'lab.{f.stem}': f for f in (ROOT/'lab').glob('*.py')}
# A room may import those below it; `lab` stands for any room of the package.
BELOW = dict(arch=set(), lab={'lab'}, callbacks={'lab'}, train_fastai={'arch', 'callbacks', 'lab'},
             predict={'train_fastai', 'arch', 'callbacks', 'lab'})


def imported(module: str) -> set[str]:
    """The modules, ours and others, that `module` imports anywhere in its code."""
    tree, found = ast.parse(MODULES[module].read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {o.name for o in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'a relative import'
            found |= {f'lab.{o.name}' for o in node.names} if node.module == 'lab' else {node.module}
    return found


def test_the_rooms_are_those_of_the_design():
    assert {m for m in MODULES if not m.startswith('lab.')} == {'train_fastai', 'predict', 'callbacks', 'arch'}
    lines = (ROOT/'lab/__init__.py').read_text().splitlines()
    named = {name for line in lines if line.startswith('    ') for name in line.split('  ')[2].split(', ')}
    assert {f'lab.{name}' for name in named} == {m for m in MODULES if m.startswith('lab.')} - {'lab.__init__'}


def test_the_program_grows_no_further():
    """1,750 lines are what it should have; until then, no more than today."""
    lines = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert sum(lines.values()) < 1886, lines
    assert lines['train_fastai'] <= 200


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_one_way(module):
    rooms = {'lab' if name.startswith('lab.') else name for name in imported(module) if name in MODULES}
    assert rooms <= BELOW['lab' if module.startswith('lab.') else module]
    if module == 'arch': assert {name.split('.')[0] for name in imported(module)} == {'torch'}


def test_lab_has_at_most_five_floors():
    """A floor imports only floors below it."""
    needs, floors = {m: imported(m) & MODULES.keys() for m in MODULES if m.startswith('lab.')}, []
    while needs:
        floors.append({m for m, names in needs.items() if not names & needs.keys()})
        assert floors[-1], f'imports in a circle: {needs}'
        needs = {m: names for m, names in needs.items() if m not in floors[-1]}
    assert len(floors) <= 5, floors


def test_importing_any_room_runs_nothing(tmp_path):
    """Nothing is printed, written, caught or drawn, and the state of generators and libraries is as it was."""
    code = f'''
import os, random, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import matplotlib, torch
from fastai.vision.all import defaults, np
def state():
    return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), signal.getsignal(2),
            signal.getsignal(15), dict(matplotlib.rcParams), torch.backends.cudnn.benchmark, torch.get_num_threads(),
            dict(os.environ), sys.stdout, sys.stderr, threading.active_count(), defaults.use_cuda)
before = state()
for module in {sorted(MODULES)!r}:
    __import__(module)
    for i, (one, other) in enumerate(zip(before, state(), strict=True)): assert one == other, (module, i)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ('', 0), done.stderr
    assert list(tmp_path.iterdir()) == []
