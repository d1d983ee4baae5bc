"""That pyproject.toml, both locks, environment.yml and the imports of the program agree."""
import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())
PROJECT, DEV = PYPROJECT['project'], PYPROJECT['project']['optional-dependencies']['dev']
LOCKS = 'requirements.txt', 'requirements-dev.txt'


def read_lock(*files: str) -> list[Requirement]:
    lines = [line for file in files for line in (ROOT/file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(('#', '-r '))]


def read_pins(*files: str) -> dict[str, str]:
    """What a lock installs here, with Python 3.11 or later: names and versions."""
    return {r.name: next(iter(r.specifier)).version for r in read_lock(*files) if not r.marker or r.marker.evaluate()}


@pytest.mark.parametrize('file', LOCKS)
def test_a_lock_pins_versions_and_names_no_place(file):
    for line in read_lock(file):  # an option, as --index-url, would be no requirement
        assert line.url is None
        assert [o.operator for o in line.specifier] == ['=='], line
    assert not re.search(r'://|(^|[\s=])[/~]', (ROOT/file).read_text())


def test_the_locks_hold_what_the_ranges_allow():
    base, both = read_pins(LOCKS[0]), read_pins(*LOCKS)
    for direct, pins in ((PROJECT['dependencies'], base), (DEV, both)):
        for r in map(Requirement, direct): assert r.specifier.contains(pins[canonicalize_name(r.name)]), r


def test_the_lock_of_the_tests_adds_to_the_other():
    assert (ROOT/LOCKS[1]).read_text().splitlines().count('-r requirements.txt') == 1
    assert not {r.name for r in read_lock(LOCKS[0])} & {r.name for r in read_lock(LOCKS[1])}


def test_environment_yml_installs_the_lock():
    lines = re.findall(r'^ +- (.+)$', (ROOT/'environment.yml').read_text(), re.MULTILINE)
    pins = dict(line.split('==') for line in lines if '==' in line)
    assert set(pins) == {'fastai', 'torch', 'torchvision', 'matplotlib', 'pytest'}  # the assignment's
    assert pins.items() <= read_pins(*LOCKS).items()
    assert lines[-1] == '-r requirements.txt'


def test_the_package_holds_the_program_and_declares_its_imports():
    tools, modules = PYPROJECT['tool']['setuptools'], [*ROOT.glob('*.py'), *(ROOT/'lab').glob('*.py')]
    assert set(tools['py-modules']) == {f.stem for f in ROOT.glob('*.py')}
    assert tools['packages'] == ['lab']
    rest = {f for f in (ROOT/'lab').iterdir() if f.suffix not in ('.py', '') and f.name[0] != '.'}
    assert rest == {f for pattern in tools['package-data']['lab'] for f in (ROOT/'lab').glob(pattern)}
    nodes = [node for f in modules for node in ast.walk(ast.parse(f.read_text()))]
    names = {o.name for node in nodes if isinstance(node, ast.Import) for o in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.partition('.')[0] for name in names} - {f.stem for f in modules} - {'lab', *sys.stdlib_module_names}
    packages = packages_distributions()
    assert {canonicalize_name(packages[name][0]) for name in names} == {
        canonicalize_name(Requirement(r).name) for r in PROJECT['dependencies']}
