"""A run in two processes on the CPU, as `accelerate launch` starts them, beside the same run in one."""
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, make_folder

from lab import runs
from lab.errors import InputError
from train_fastai import Options

BS, EPOCHS, BATCHES = 16, 2, 3
RATES = '--lr-min', 1e-4, '--lr-max', 1e-3
LAUNCH = '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', 2, '--main_process_port', 0


def train(launch: tuple, out, *args, **env) -> subprocess.CompletedProcess:
    """Runs tests/ranks.py in one process or, launched, in two, which leave what they saw beside the folder `out`."""
    watch = out.with_name(f'{out.name}-watch')
    watch.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *map(str, (*launch, ROOT/'tests/ranks.py', *args))], capture_output=True,
                          text=True, timeout=300, env=os.environ | dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1',
                                                                        WATCH=str(watch), **env))


def options(data, out) -> tuple:
    return '--data', data, '--out', out, '--epochs', EPOCHS, '--bs', BS, '--precision', 'fp32'


def watched(out) -> list[dict]:
    """What each process of the run in `out` saw."""
    return [torch.load(f, weights_only=True) for f in sorted(out.with_name(f'{out.name}-watch').iterdir())]


def ours(done: subprocess.CompletedProcess) -> list[str]:
    """Our own lines on stderr."""
    return [line for line in done.stderr.splitlines() if line.startswith('train_fastai.py')]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of 51 training images: three batches of 16, and three images that an epoch drops."""
    return make_folder(tmp_path_factory.mktemp('data')/'images', train=17)


@pytest.fixture(scope='module')
def two(images, tmp_path_factory):
    """A run in two processes, and what it printed."""
    out = tmp_path_factory.mktemp('runs')/'two'
    done = train(LAUNCH, out, *options(images, out), *RATES)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_first_process_alone_prints(two):
    out, printed = two
    assert printed.splitlines()[-1] == f'Everything is in {out}'
    assert printed.count('Reading the images') == printed.count('finished') == printed.count('epoch  ') == 1
    assert ' 2 × cpu' in printed


def test_both_processes_end_with_the_same_weights(two):
    first, second = (o['weights'] for o in watched(two[0]))
    kept = torch.load(two[0]/'model.pth', weights_only=True)
    assert kept.keys() == first.keys() == second.keys()
    assert all(kept[k].equal(first[k]) and kept[k].equal(second[k]) for k in kept)


def test_an_epoch_has_every_image_once_but_for_the_last_partial_batch(two):
    ranks = watched(two[0])
    assert all(len(o['seen']) == EPOCHS * BATCHES and {len(x) for x in o['seen']} == {BS // 2} for o in ranks)
    epochs = [{x.numpy().tobytes() for o in ranks for x in torch.cat(o['seen'][i:i + BATCHES])}
              for i in range(0, EPOCHS * BATCHES, BATCHES)]
    assert [len(e) for e in epochs] == [BATCHES * BS] * EPOCHS
    assert epochs[0] != epochs[1]


def test_each_process_draws_its_own_augmentations(two):
    assert len({draw for o in watched(two[0]) for draw in o['draws']}) == 2 * EPOCHS * BATCHES


def test_two_processes_learn_as_one_does_from_the_whole_batch(two, images, tmp_path):
    out = tmp_path/'one'
    done = train((), out, *options(images, out), *RATES, GHOSTS='1')
    assert done.returncode == 0, done.stderr
    history, of_one = (pd.read_csv(o/'history.csv') for o in (two[0], out))
    for loss in ('train_loss', 'test_loss'):  # but for roundings, which Adam's first steps magnify
        assert history[loss].tolist() == pytest.approx(of_one[loss].tolist(), rel=1e-2)
    assert (out/'schedule.csv').read_bytes() == (two[0]/'schedule.csv').read_bytes()
    alone, first = watched(out)[0], watched(two[0])[0]
    assert torch.equal(alone['seen'][0][0::2], first['seen'][0])
    assert first['accelerate']
    assert not alone['accelerate']


def test_a_process_that_dies_ends_the_run_which_can_be_resumed(two, images, tmp_path):
    out = tmp_path/'dies'
    done = train(LAUNCH, out, *options(images, out), *RATES, DIES=str(BATCHES + 2))
    assert done.returncode != 0
    line, = ours(done)
    assert line.endswith(f'accelerate launch --multi_gpu --num_processes 2 train_fastai.py --resume {out}')
    assert len(pd.read_csv(out/'history.csv')) == 1

    done = train(LAUNCH, out, '--resume', out)
    assert done.returncode == 0, done.stderr
    for name in ('model.pth', 'schedule.csv', 'misclassified.csv'):
        assert (out/name).read_bytes() == (two[0]/name).read_bytes(), name


def test_both_processes_use_the_rates_that_the_first_one_finds(images, tmp_path):
    out = tmp_path/'finder'
    done = train(LAUNCH, out, *options(images, out), '--epochs', 1)
    assert done.returncode == 0, done.stderr
    first, second = (o['schedule'] for o in watched(out))
    assert first == second == pd.read_csv(out/'schedule.csv').to_dict('records')
    assert len(pd.read_csv(out/'lr_find.csv')) > 50


def test_a_batch_that_cannot_be_shared_out(monkeypatch):
    monkeypatch.setattr(runs, 'RANKS', 2)
    with pytest.raises(InputError, match='--bs 15 is not a multiple of 2, the number of processes'):
        runs.Run(Options(bs=15), {'bs'})
