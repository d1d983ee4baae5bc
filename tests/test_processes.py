"""A run in two processes on the CPU, as `accelerate launch` starts them, beside the same run in one."""
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, args, make_folder, read_metrics
from torch import nn

import train_fastai
from lab import runs
from lab.errors import InputError
from train_fastai import Options, get_dls, get_learner, main

BS, BATCHES, IMAGES = 16, 3, 51
OPTIONS = dict(epochs=2, bs=BS, precision='fp32')
LAUNCH = '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', '0'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of 51 training images, three batches of 16 and three that an epoch drops, and of 12 test images."""
    return make_folder(tmp_path_factory.mktemp('data')/'images', train=IMAGES // 3)


@pytest.fixture(scope='module')
def two(images, tmp_path_factory):
    """A run in two processes that are killed in the second epoch, and resumed: its folder, and what both said."""
    out = tmp_path_factory.mktemp('runs')/'two'
    env = os.environ | dict(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', DIES=str(BATCHES + 2))
    done = subprocess.run([sys.executable, *LAUNCH, str(ROOT/'tests/ranks.py'), *args(data=images, out=out, **OPTIONS)],
                          capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return out, *done.stdout.split(f'Ended by signal {signal.SIGKILL}')


def test_first_process_alone_prints(two):
    out, killed, resumed = two
    assert resumed.splitlines()[-1] == f'Results: {out}'
    assert ' 2 × cpu' in killed
    for said, counts in ((killed, [1, 1, 1, 0]), (resumed, [1, 0, 0, 1])):
        assert [said.count(o) for o in ('Reading', 'Finding', 'epoch 0  ', 'epoch 1  ')] == counts


def test_both_share_an_epoch_and_end_with_equal_weights(two):
    """Every image once an epoch, augmented anew."""
    ranks = [torch.load(two[0].parent/f'{rank}.pth', weights_only=True) for rank in (0, 1)]  # of the second epoch
    schedule, kept = pd.read_csv(two[0]/'schedule.csv'), torch.load(two[0]/'model.pth', weights_only=True)
    assert len(schedule) == 2 * BATCHES
    assert all(o['schedule'] == schedule.to_dict('records') for o in ranks)
    assert all(kept.keys() == o['weights'].keys() and v.equal(o['weights'][k]) for k, v in kept.items() for o in ranks)
    assert all(len(o['seen']) == BATCHES and {len(x) for x in o['seen']} == {BS // 2} for o in ranks)
    assert len({x.numpy().tobytes() for o in ranks for x in torch.cat(o['seen'])}) == BATCHES * BS
    assert len({draw for o in ranks for draw in o['draws']}) == 2 * BATCHES


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Two batch norms, whose statistics are those of the first: what two processes without SyncBatchNorm compute."""

    def forward(self, x):
        if not self.training: return super().forward(x)
        half = BS // 2
        second = nn.functional.batch_norm(x[half:], None, None, self.weight, self.bias, True, eps=self.eps)
        return torch.cat([super().forward(x[:half]), second])


def test_two_processes_learn_as_one_from_the_whole_batch(two, images, tmp_path, monkeypatch, no_pictures):
    def get(dls, **kwargs):
        idxs, half, part = dls.train.get_idxs, BS // 2, (IMAGES + 1) // 2
        def order() -> list[int]:
            """Each batch is what the two processes see at the same time."""
            found = [*map(int, idxs())]
            return [o for i in range(0, BATCHES * half, half) for start in (0, part) for o in found[start + i:][:half]]
        dls.train.get_idxs = order
        return get_learner(dls, **kwargs)
    monkeypatch.setattr(train_fastai, 'get_learner', get)
    monkeypatch.setattr(nn, 'BatchNorm2d', GhostBatchNorm2d)
    monkeypatch.setattr(train_fastai, 'get_dls', lambda **kwargs: get_dls(**kwargs, item_tfms=[]))
    m = read_metrics(two[0])
    main(args(data=images, out=tmp_path, **OPTIONS, lr_min=m['lr_min'], lr_max=m['lr_max']))
    history, of_one = (pd.read_csv(o/'history.csv') for o in (two[0], tmp_path))
    for column in ('train_loss', 'test_loss', 'test_accuracy'):  # but for roundings, which Adam's first steps magnify
        assert history[column].tolist() == pytest.approx(of_one[column].tolist(), rel=1e-2)
    assert (tmp_path/'schedule.csv').read_bytes() == (two[0]/'schedule.csv').read_bytes()
    assert m['test_accuracy'] == read_metrics(tmp_path)['test_accuracy']


def test_a_batch_that_cannot_be_shared_out(monkeypatch):
    monkeypatch.setattr(runs, 'num_distrib', lambda: 2)
    with pytest.raises(InputError, match='--bs 15 is not a multiple of the 2 processes'):
        runs.Run(Options(bs=15))
