import json
import sys
from functools import partial

import pytest
from conftest import ROOT

from arch import ResNet

sys.path.insert(0, str(ROOT/'benchmarks'))
import batch
import speed

ROWS = dict(loader={'fastai, item by item, 0 workers', 'fastai, item by item, 2 workers', 'ours'},
            step={'plain float32', '+ fused AdamW'},
            batch={'plain float32 step', 'through the Learner', 'through the Learner, before'},
            epoch={'bare steps', 'through the Learner'})


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on a single core
def test_the_benchmark_measures_all_four_tables(folder, tmp_path, monkeypatch, capsys):
    """That it runs; how fast anything is, no test should say."""
    monkeypatch.setattr(speed, 'ResNet', partial(ResNet, width=8))
    printed = []
    def run_batch(*args):  # in this process: to start another takes seconds
        batch.main([*map(str, args), '--batches', '6'])
        printed.append(capsys.readouterr().out)
        return json.loads(printed[-1].splitlines()[-1])
    monkeypatch.setattr(speed, 'run_batch', run_batch)
    speed.main(data=folder, images=24, bs=6, rounds=1, out=tmp_path/'speed.json', before=str(ROOT))
    tables, printed = json.loads((tmp_path/'speed.json').read_text()), ''.join([*printed, capsys.readouterr().out])
    for name, rows in ROWS.items():
        assert rows <= set(tables[name])
        for row, o in tables[name].items():
            assert o['images_per_second'] > 0
            assert f'| {row} | {o["ratio"]:.3g} |' in printed
