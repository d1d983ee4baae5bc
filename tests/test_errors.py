import io
import sys

import pytest
import torch
from conftest import ends, ends_unforeseen

from lab import errors
from lab.errors import InputError, RunError, WriteError, one_line_errors


def test_a_console_that_is_no_terminal_or_closed(monkeypatch):
    monkeypatch.setattr(errors.signal, 'signal', lambda *_: None)
    for stream in (own := io.StringIO(), None):
        monkeypatch.setattr(sys, 'stdout', stream)
        errors.end_quietly_while_importing('a program')
        print('said')
    assert sys.stdout.encoding == 'utf-8', 'in another locale it would lack letters'
    assert own.getvalue() == 'said\n'


def test_a_notebooks_signals_stay_its_own(monkeypatch):
    monkeypatch.setattr(errors, 'IN_IPYTHON', True)
    monkeypatch.setattr(errors, 'is_cli', lambda: True)  # as with %run
    monkeypatch.setattr(errors.signal, 'signal', None)
    errors.end_quietly_while_importing('a program')
    with errors.one_line_errors('a program'): pass


def raising(error, *notes):
    """A program that ends with this `error`."""
    @one_line_errors('train_fastai.py')
    def program():
        for note in notes: error.add_note(note)
        raise error
    return program


@pytest.mark.parametrize(('error', 'code', 'line'), [
    (InputError('no such folder'), 2, 'error: no such folder'),
    (RunError('no usable rates'), 1, 'error: no usable rates'),
    (WriteError('a.csv: full'), 1, 'error: a.csv: full'), (KeyboardInterrupt(), 130, 'interrupted'),
    (KeyboardInterrupt(143), 143, 'interrupted'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried\nto'), 1,
     'error: out of memory; try a smaller --bs (CUDA out of memory. Tried to)'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
     "error: out of memory; try a smaller --bs ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried)"),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), 1,
     'error: out of memory; try a smaller --bs (DefaultCPUAllocator: not enough memory: you tried)')], ids=repr)
def test_a_foreseen_error_is_one_line_which_hints_end(capsys, error, code, line):
    assert ends(capsys, code, raising(error)) == f'{line}\n'
    assert ends(capsys, code, raising(error, 'do this', 'or that')) == f'{line}; do this; or that\n'


@pytest.mark.parametrize('error', [
    ValueError('too many\n  values'), OSError(28, 'No space left on device'), FileNotFoundError(2, 'None', 'a/file'),
    RuntimeError('CUDA error: no kernel image is available for execution on the device'), KeyError('lr')], ids=repr)
def test_an_unforeseen_error_shows_its_traceback_and_then_one_line(capsys, error):
    assert ends_unforeseen(capsys, error, raising(error, 'do this')).endswith('; do this')


def test_a_reader_that_left_is_no_error(capsys):
    with pytest.raises(SystemExit) as e: raising(BrokenPipeError())()
    assert (e.value.code, capsys.readouterr().err) == (141, '')
