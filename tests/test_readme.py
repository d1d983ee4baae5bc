import json
import re

import pandas as pd
import pytest
from conftest import ROOT
from fastcore.script import anno_parser

import train_fastai

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
    for rate in ('lr_min', 'lr_max'): assert f'{m[rate]:.2e}'.replace('e-0', 'e-') in README


def test_every_link_leads_somewhere():
    links = [link for link in re.findall(r'\]\((.*?)\)', README) if not link.startswith('https://')]
    assert len(links) > 5
    for link in links: assert (ROOT/link).exists(), link


def test_it_lists_every_option():
    options = {o for a in anno_parser(train_fastai.main)._actions for o in a.option_strings if o.startswith('--')}
    listed = re.findall(r'--[a-z][a-z-]+', README.split('## Options')[1].split('## ')[0])
    assert set(listed) == options - {'--help', '--pdb', '--xtra'}  # which every `call_parse` has


def test_its_speed_table_is_that_of_the_published_measurement():
    tables = json.loads((ROOT/'benchmarks/speed.json').read_text())
    for name in ('loader', 'step', 'epoch'):
        for row, o in tables[name].items(): assert f'| {row} | {o["ratio"]:.3g} |' in README
