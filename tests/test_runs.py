import dataclasses
import errno
import os
import pickle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import Malicious

from lab import runs
from lab.errors import InputError, RunError, WriteError
from lab.runs import Run, load_state, locked, save_csv, save_figure, save_state, write_whole
from train_fastai import Options


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    file = tmp_path/'x.pth'
    save_state(file, dict(a=torch.ones(3)))
    def full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runs.os, 'fsync', full)
    with pytest.raises(WriteError, match='x.pth: No space left on device$'): save_state(file, dict(a=1))
    assert (load_state(file)['a'] == 1).all()
    assert list(tmp_path.iterdir()) == [file]


def test_damage_anywhere_in_a_checkpoint_is_noticed(tmp_path):
    save_state(tmp_path/'whole.pth', dict(a=torch.arange(5000.), b=dict(c=1, d='text')))
    whole = (tmp_path/'whole.pth').read_bytes()
    good = load_state(tmp_path/'whole.pth')
    bad = tmp_path/'bad.pth'
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with pytest.raises(InputError, match='bad.pth is damaged'): load_state(bad)
    noticed = 0
    for at in range(0, len(whole), 251):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        try: state = load_state(bad)
        except InputError: noticed += 1
        else:  # in padding or a time stamp
            assert (state['a'] == good['a']).all()
            assert state['b'] == good['b']
    assert noticed > 70  # of 84


@pytest.mark.parametrize('zipped', [False, True])
def test_a_malicious_file_is_refused_and_its_code_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv('MALICIOUS_DIR', str(tmp_path/'was here'))
    file = tmp_path/'model.pth'
    if zipped: torch.save(dict(a=Malicious()), file)
    else: file.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match='model.pth'): load_state(file)
    assert not (tmp_path/'was here').exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match='none.pth does not exist'): load_state(tmp_path/'none.pth')
    with pytest.raises(WriteError, match='no/x: No such file or directory$'): write_whole(tmp_path/'no'/'x', b'')


def test_csv_without_rows_has_its_header(tmp_path):
    save_csv(tmp_path/'x.csv', pd.DataFrame([], columns=['a', 'b']))
    assert (tmp_path/'x.csv').read_text() == 'a,b\n'


def test_a_file_that_is_locked_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As on Windows, while a virus scanner or a spreadsheet has it open."""
    replace, refused = Path.replace, []
    def locked(self, target):
        if len(refused) < 2:
            refused.append(target)
            raise PermissionError(errno.EACCES, 'locked')
        return replace(self, target)
    monkeypatch.setattr(Path, 'replace', locked)
    monkeypatch.setattr(runs.time, 'sleep', lambda _: None)
    write_whole(tmp_path/'x', b'new')
    assert (tmp_path/'x').read_bytes() == b'new'
    assert len(refused) == 2


def test_a_figure_that_cannot_be_drawn_is_a_line_on_stderr_and_leaves_no_figure_open(tmp_path, capsys):
    def draw():
        plt.figure()
        raise ValueError('no such\nfont')
    save_figure(tmp_path/'x.png', draw)
    assert capsys.readouterr().err == f'{tmp_path}/x.png was not written: no such font\n'
    assert not list(tmp_path.iterdir())
    assert not plt.get_fignums()


OPTIONS = Options(epochs=1, bs=8, lr_min=1e-4, lr_max=1e-3)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch, dls):
    monkeypatch.chdir(tmp_path)
    runs = [Run(OPTIONS, set()) for _ in range(30)]
    for run in runs: run.claim_folder(dls)
    assert len({run.folder for run in runs}) == len(list((tmp_path/'runs').iterdir())) == 30


def test_an_error_before_training_offers_nothing_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as e, Run(OPTIONS, set()): raise OSError(2, 'No such file', 'a/file')
    assert e.value.__notes__ == ['nothing was trained yet']


@pytest.mark.parametrize('error', [InputError('no such folder'), RunError('the loss was not finite')], ids=repr)
def test_an_error_that_would_only_happen_again_offers_nothing(tmp_path, error):
    (tmp_path/'checkpoint.pth').touch()
    run = Run(dataclasses.replace(OPTIONS, out=str(tmp_path/'new')), set())
    run.folder = tmp_path
    with pytest.raises(type(error)) as e, run: raise error
    assert not hasattr(e.value, '__notes__')


def test_a_command_in_a_message_can_be_pasted(tmp_path):
    out = tmp_path/'my run'
    out.mkdir()
    (out/'metrics.json').touch()
    with pytest.raises(InputError, match=f"resume it with: python train_fastai.py --resume '{out}'"):
        Run(dataclasses.replace(OPTIONS, out=out), {'out'})


@pytest.mark.parametrize(('changes', 'options'), [
    ({}, ''), (dict(out='runs/X', epochs=24, wd=0.1), ''),
    (dict(quick=True, epochs=4, bs=64), '--epochs 4 --bs 64 --quick'),
    (dict(data='/my images', lr_min=1e-4, lr_max=1e-3), "--data '/my images' --lr-min 0.0001 --lr-max 0.001"),
    (dict(label_smoothing=0, ema=0.), '--label-smoothing 0 --ema 0.0')], ids=str)
def test_the_command_that_repeats_a_run_has_what_differs_from_the_defaults(changes, options):
    assert Run(Options(**changes), set()).command == f'python train_fastai.py {options}'.strip()


def test_a_lock_is_gone_with_its_run_and_nobody_else_gets_in_before(tmp_path):
    with locked(tmp_path):
        assert (tmp_path/'.lock').exists()
        with pytest.raises(InputError, match='in use by another run'), locked(tmp_path): pass
        assert (tmp_path/'.lock').exists(), 'whoever was refused leaves the lock'
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path): pass
    with pytest.raises(ValueError, match='no more'), locked(tmp_path): raise ValueError('no more')
    assert list(tmp_path.iterdir()) == []
