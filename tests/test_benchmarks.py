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


def test_a_batch_of_another_version_is_measured_in_a_process_of_its_own(tmp_path):
    (tmp_path/'train_fastai.py').write_text("""
import torch
print('another version')
class Loaders:
    def __init__(self, data, bs): self.batch = torch.rand(bs, 3, 32, 32), torch.zeros(bs, dtype=torch.int64)
    def one_batch(self): return self.batch
get_dls, get_learner = Loaders, None
""")
    found = speed.run_batch('plain', 'DATA', '--bs', 2, '--batches', 2, '--root', tmp_path)
    assert found['seconds'] > 0
    assert found['peak_mib'] is None or 100 < found['peak_mib'] < 1500


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on a single core
def test_the_benchmark_measures_all_four_tables(folder, tmp_path, monkeypatch, capsys):
    """That it runs; how fast anything is, no test should say."""
    monkeypatch.setattr(speed, 'ResNet', partial(ResNet, width=8))
    printed = []
    def run_batch(*args):  # in this process: to start another takes seconds
        batch.main([*map(str, args), '--batches', '2'])
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
