import errno
import os
import pickle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import Malicious

import run
from errors import InputError, RunError
from run import Run, load_state, save_csv, save_figure, save_state, write_whole


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    file = tmp_path/'x.pth'
    save_state(file, dict(a=torch.ones(3)))
    def full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(run.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left on device: .*x.pth'): save_state(file, dict(a=1))
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
    with pytest.raises(FileNotFoundError, match='no/x'): write_whole(tmp_path/'no'/'x', b'')


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
    monkeypatch.setattr(run.time, 'sleep', lambda _: None)
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


OPTIONS = dict(data=None, out=None, epochs=1, bs=8, seed=1, lr_min=1e-4, lr_max=1e-3, final_div=1, wd=0., ema=0.,
               label_smoothing=0., precision='auto', taste=False)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({Run(OPTIONS, set(), None).claim('images') for _ in range(30)}) == 30


def test_an_error_before_training_offers_nothing_to_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as e, Run(OPTIONS, set(), None): raise OSError(2, 'No such file', 'a/file')
    assert str(e.value) == 'a/file: No such file; nothing was trained yet'


def test_a_command_in_a_message_can_be_pasted(tmp_path):
    out = tmp_path/'my run'
    out.mkdir()
    (out/'metrics.json').touch()
    with pytest.raises(InputError, match=f"resume it with: python train_fastai.py --resume '{out}'"):
        Run(OPTIONS | dict(out=out), {'out'}, None)
