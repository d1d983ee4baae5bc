"""That pyproject.toml, both locks, environment.yml and the imports of the program agree."""
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_rooms import MODULES, imported

PYPROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())
DIRECT, DEV = PYPROJECT['project']['dependencies'], PYPROJECT['project']['optional-dependencies']['dev']
LOCKS = [(ROOT/file).read_text() for file in ('requirements.txt', 'requirements-dev.txt')]

# An option, as --index-url, would be no requirement.
LINES = [[Requirement(o) for o in text.splitlines() if o and not o.startswith(('#', '-r '))] for text in LOCKS]
BASE, BOTH = ({r.name: next(iter(r.specifier)).version for r in lines if not r.marker or r.marker.evaluate()}
              for lines in (LINES[0], sum(LINES, [])))  # what they install here


def test_the_locks_pin_what_the_ranges_allow_and_name_no_place():
    for text, lines in zip(LOCKS, LINES, strict=True):
        for r in lines: assert (r.url, [o.operator for o in r.specifier]) == (None, ['==']), r
        assert not re.search(r'://|(^|[\s=])[/~]', text)
    for direct, pins in ((DIRECT, BASE), (DEV, BOTH)):
        for r in map(Requirement, direct): assert r.specifier.contains(pins[canonicalize_name(r.name)]), r
    assert LOCKS[1].splitlines().count('-r requirements.txt') == 1
    assert not {r.name for r in LINES[0]} & {r.name for r in LINES[1]}


def test_environment_yml_installs_the_lock():
    lines = re.findall(r'^ +- (.+)$', (ROOT/'environment.yml').read_text(), re.MULTILINE)
    pins = dict(line.split('==') for line in lines if '==' in line)
    assert {*pins} == {'fastai', 'torch', 'torchvision', 'matplotlib', 'pytest'}, "the assignment's"
    assert pins.items() <= BOTH.items()
    assert lines[-1] == '-r requirements.txt'


def test_the_package_holds_the_program_and_declares_its_imports():
    tools = PYPROJECT['tool']['setuptools']
    assert {*tools['py-modules']} == {f.stem for f in ROOT.glob('*.py')}
    assert tools['packages'] == ['lab']
    rest = {f for f in (ROOT/'lab').iterdir() if f.suffix not in ('.py', '') and f.name[0] != '.'}
    assert rest == {f for pattern in tools['package-data']['lab'] for f in (ROOT/'lab').glob(pattern)}
    names = {name.partition('.')[0] for module in MODULES for name in imported(module)}
    names -= {'lab', *MODULES, *sys.stdlib_module_names, 'safetensors'}  # predict.py asks for it
    packages = packages_distributions()
    assert {canonicalize_name(packages[name][0]) for name in names} == {
        canonicalize_name(Requirement(r).name) for r in DIRECT}
