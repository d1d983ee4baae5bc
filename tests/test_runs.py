import dataclasses
import random
import signal
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import SIX_EPOCHS, args, disturbed, ends, interrupt, make_folder
from kill import differences, start_and_kill

from lab import results
from lab.errors import InputError
from lab.runs import Run, load_state
from train_fastai import Options, main

OPTIONS = Options(epochs=1, bs=8, lr_min=1e-4, lr_max=1e-3)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch, dls):
    monkeypatch.chdir(tmp_path)
    runs = [Run(OPTIONS) for _ in range(30)]
    for run in runs: run.claim_folder(dls)
    assert len({run.folder for run in runs}) == len(list((tmp_path/'runs').iterdir())) == 30


def test_a_command_in_a_message_can_be_pasted(tmp_path):
    out = tmp_path/'my run'
    out.mkdir()
    (out/'metrics.json').touch()
    with pytest.raises(InputError, match=f"resume it with: python train_fastai.py --resume '{out}'"):
        Run(dataclasses.replace(OPTIONS, out=out))


@pytest.mark.parametrize(('changes', 'options'), [
    ({}, ''), (dict(out='runs/X', epochs=24, wd=0.1), ''),
    (dict(quick=True, epochs=3, bs=64), '--epochs 3 --bs 64 --quick'),
    (dict(data='/my images', lr_min=1e-4, lr_max=1e-3), "--data '/my images' --lr-min 0.0001 --lr-max 0.001"),
    (dict(ema=0.), '--ema 0.0')], ids=str)
def test_the_command_that_repeats_a_run(changes, options):
    assert Run(Options(**changes)).command() == f'python train_fastai.py {options}'.strip()


def test_a_finished_run_is_not_overwritten(folder, run, tmp_path, capsys):
    before = {f: f.stat().st_mtime_ns for f in run.iterdir()}
    for options in (dict(data=folder, out=run, bs=8), dict(resume=run)):
        assert f'{run} holds a finished run; choose another folder' in ends(capsys, 2, main, **options)
    assert {f: f.stat().st_mtime_ns for f in run.iterdir()} == before
    (tmp_path/'file').touch()
    line = ends(capsys, 1, main, data=folder, out=tmp_path/'file', bs=8)
    assert line == f"error: [Errno 17] File exists: '{tmp_path}/file'; nothing was trained yet\n"


def test_a_folder_in_use_is_refused(folder, dls, tmp_path, capsys, no_pictures):
    new = dict(data=folder, out=tmp_path, **SIX_EPOCHS)
    with Run(dataclasses.replace(OPTIONS, out=tmp_path)) as run:
        run.claim_folder(dls)
        assert 'in use by another run' in ends(capsys, 2, main, **new)
    with disturbed(interrupt): ends(capsys, 130, main, **new)
    with Run(dataclasses.replace(OPTIONS, resume=tmp_path)) as run:
        run.claim_folder(dls)
        assert 'in use by another run' in ends(capsys, 2, main, resume=tmp_path)


def test_ctrl_c_and_resume_end_like_the_whole_run(folder, run, tmp_path, capsys, monkeypatch):
    out = tmp_path/'out'
    with disturbed(interrupt): message = ends(capsys, 130, main, data=folder, out=out, **SIX_EPOCHS)
    assert message == f'interrupted; resume it with: python train_fastai.py --resume {out}\n'
    assert len(pd.read_csv(out/'history.csv')) == 3
    assert (out/'history.png').exists()
    assert not {f.name for f in out.iterdir()} & {'model.pth', 'metrics.json'}
    assert '--out does not go with --resume' in ends(capsys, 2, main, resume=out, out=tmp_path/'elsewhere')
    other = make_folder(tmp_path/'other', seed=1)
    assert 'these are not the images that the run in' in ends(capsys, 2, main, resume=out, data=other)
    monkeypatch.setattr(results, 'save_figure', lambda *_: None)
    main(args(resume=out))
    assert differences(run, out) == []
    assert {f.name for f in run.iterdir()} - {f.name for f in out.iterdir()} == {
        'misclassified.png', 'confusion_matrix.png', 'top_losses.png'}, 'the figures of results'


def test_sigterm_and_resume_from_elsewhere(folder, run, tmp_path, capsys, monkeypatch, no_pictures):
    out = tmp_path/'out'
    with monkeypatch.context() as m, disturbed(partial(signal.raise_signal, signal.SIGTERM)):
        m.chdir(folder.parent)
        assert f'--resume {out}' in ends(capsys, 130, main, '--data', folder.name, out=out, **SIX_EPOCHS)
    main(args('--resu', out, f'--dat={folder}'))
    assert differences(run, out) == []


def test_a_run_that_only_lacks_results_is_finished(folder, run, tmp_path, capsys, no_pictures):
    out = tmp_path/'out'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(results, 'write_page', lambda *_: interrupt())
        line = ends(capsys, 130, main, data=folder, out=out, **SIX_EPOCHS)
    assert line == f'interrupted; resume it with: python train_fastai.py --resume {out}\n'
    (out/'report.md').unlink()
    (out/'report.md').mkdir()
    line = ends(capsys, 1, main, resume=out)
    assert line.endswith(f'resume it with: python train_fastai.py --resume {out}\n')
    assert not (out/'model.pth').exists()
    (out/'report.md').rmdir()
    main(args(resume=out))
    assert differences(run, out) == []


def test_an_unforeseen_error_says_how_to_resume(folder, tmp_path, no_pictures):
    out = tmp_path/'out'
    def fail(): raise RuntimeError('CUDA error: an illegal memory access was encountered')
    with disturbed(fail, 0), pytest.raises(RuntimeError, match='illegal memory') as e:
        main(args(data=folder, out=out, **SIX_EPOCHS))
    assert e.value.__notes__ == [f'resume it with: python train_fastai.py --resume {out}']


def test_kills_at_random_moments(folder, run, tmp_path, no_pictures):
    print('seed', seed := random.randrange(10**6))
    options = start_and_kill(folder, tmp_path/'out', random.Random(seed))
    if options: main(args(**options))  # else the run was faster
    assert differences(run, tmp_path/'out') == []


def full_disk(out): (out/'checkpoint.pth.part').symlink_to('/dev/full')
def read_only_folder(out): out.chmod(0o555)


@pytest.mark.parametrize(('fault', 'message'), [
    pytest.param(full_disk, 'No space left on device', marks=pytest.mark.skipif(
        not Path('/dev/full').exists(), reason='this system has no device that is always full')),
    (read_only_folder, 'Permission denied')])
def test_a_failed_checkpoint_leaves_the_old_one(folder, run, tmp_path, capsys, permissions_bind, fault, message,
                                                no_pictures):
    out = tmp_path/'out'
    with disturbed(lambda: fault(out)): line = ends(capsys, 1, main, data=folder, out=out, **SIX_EPOCHS)
    assert message in line
    assert f'--resume {out}' in line
    assert not list(out.glob('*.part'))
    out.chmod(0o755)
    main(args(resume=out))
    assert differences(run, out) == []


def test_a_table_that_cannot_be_written_costs_a_line(folder, run, tmp_path, capsys, no_pictures):
    def block():
        (tmp_path/'history.csv').unlink()
        (tmp_path/'history.csv').mkdir()
    with disturbed(block): main(args(data=folder, out=tmp_path, **SIX_EPOCHS))
    assert 'history.csv was not written' in capsys.readouterr().err
    assert (tmp_path/'model.pth').read_bytes() == (run/'model.pth').read_bytes()


def test_an_out_folder_that_cannot_be_written(folder, tmp_path, capsys, permissions_bind):
    (tmp_path/'closed').mkdir(mode=0o555)
    for out in (tmp_path/'closed', tmp_path/'closed/in it'):
        assert str(out) in ends(capsys, 1, main, data=folder, out=out, **SIX_EPOCHS)
    assert not list((tmp_path/'closed').iterdir())


def test_a_damaged_or_foreign_checkpoint_is_named(folder, tmp_path, capsys, no_pictures):
    with disturbed(interrupt, 0): ends(capsys, 130, main, data=folder, out=tmp_path, **SIX_EPOCHS)
    file, state = tmp_path/'checkpoint.pth', load_state(tmp_path/'checkpoint.pth')
    content = file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert 'checkpoint.pth is damaged' in ends(capsys, 2, main, resume=tmp_path)
    assert not any('record' in o for o in state['states']), 'it may go on on another device'
    for other in (torch.ones(2), dict(options=(o := state['options'])), state | dict(options=o | dict(taste=0))):
        torch.save(other, file)
        assert 'was not written by this version of the program' in ends(capsys, 2, main, resume=tmp_path)
    torch.save(dict(a=Path), file)
    assert 'holds more than weights' in ends(capsys, 2, main, resume=tmp_path)
