import json
import subprocess
import sys

from conftest import ROOT

ROWS = dict(loader={'fastai, item by item, 0 workers', 'fastai, item by item, 2 workers', 'ours'},
            step={'plain float32', '+ fused AdamW'}, epoch={'bare steps', 'through the Learner'})


def test_the_benchmark_measures_all_three_tables(folder, tmp_path):
    """That it runs; how fast anything is, no test should say."""
    out = tmp_path/'speed.json'
    done = subprocess.run([sys.executable, str(ROOT/'benchmarks/speed.py'), *map(str, (
        '--data', folder, '--images', 24, '--bs', 6, '--rounds', 1, '--out', out))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = json.loads(out.read_text())
    for name, rows in ROWS.items():
        assert rows <= set(tables[name])
        for row, o in tables[name].items():
            assert o['images_per_second'] > 0
            assert f'| {row} | {o["ratio"]:.3g} |' in done.stdout
