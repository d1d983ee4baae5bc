import json
import sys
import time

from conftest import ROOT

sys.path.insert(0, str(ROOT/'benchmarks'))
import gpu
import recipes


def put(folder, name, share):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{name}.json').write_text(json.dumps(dict(averages={'0.995': dict(accuracy=share, accuracy_flip=share)})))


def test_the_best_arm_is_that_of_the_seeds_that_most_have(tmp_path):
    assert gpu.best_arm(tmp_path) is None
    for name, share in (('default-1', 0.92), ('default-2', 0.92), ('wd-0.2-1', 0.91), ('wd-0.2-2', 0.94),
                        ('lucky-1', 0.99)): put(tmp_path, name, share)
    assert gpu.best_arm(tmp_path) == 'wd-0.2'
    put(tmp_path, 'default-3', 0.99)
    assert gpu.best_arm(tmp_path) == 'wd-0.2', 'chosen anew'


def test_a_command_that_fails_or_takes_too_long_ends_and_leaves_its_output(tmp_path, capsys):
    gpu.alone('a', ['-c', 'print(1); raise SystemExit(3)'], tmp_path, 60)
    gpu.alone('b', ['-c', 'print(2, flush=True); import time; time.sleep(60)'], tmp_path, 1)
    assert [(tmp_path/f'{o}.log').read_text() for o in 'ab'] == ['1\n', '2\n']
    assert [line.split(',')[0] for line in capsys.readouterr().out.splitlines()] == ['a: 3', 'b: time is up']


def test_each_process_does_its_share_of_all_tables_until_time_is_up(tmp_path, monkeypatch):
    done, size = [], dict(data='d', epochs=1, bs=6)
    put(tmp_path/'recipes/ingredients/1-bs-6', 'wd-0.2-42', 0.9)
    def main(table, **options):
        done.append((table, options.get('arms'), options['seeds'], options['bs'], options.get('every')))
        if table == 'schedule': raise RuntimeError('out of memory')
    monkeypatch.setattr(recipes, 'main', main)
    gpu.work(1, 2, tmp_path, 'default,wd-0.2', [42, 43], time.time() + 600, **size)
    assert done[:6] == [('seeds', 'experiment', '43', 6, None), ('ingredients', 'default,wd-0.2', '42,43', 6, None),
                        ('test', 'wd-0.2', '42,43', 6, None), ('test', 'plain', '42,43', 6, None),
                        ('schedule', None, '42,43', 6, None), ('peak', None, '42', 6, None)]
    assert ('finder', None, '0,1,2,3,4,5,6,7,8,9', 8, 50) in done[6:]
    assert 'out of memory' in (tmp_path/'worker-1.log').read_text()
    done.clear()
    gpu.work(2, 2, tmp_path, None, [42, 43], time.time() - 1, **size)
    assert done == []
