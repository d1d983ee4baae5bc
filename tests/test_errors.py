import io
import sys

import pytest
from conftest import ends

from lab import errors
from lab.errors import InputError, RunError, one_line_errors


def test_a_notebooks_signals_and_its_console_stay_its_own(monkeypatch):
    monkeypatch.setattr(errors, 'IN_IPYTHON', True)
    monkeypatch.setattr(errors.signal, 'signal', None)
    for stream in (own := io.StringIO(), None):  # or it is closed
        monkeypatch.setattr(sys, 'stdout', stream)
        with one_line_errors('a program'): print('said')
    assert own.getvalue() == 'said\n'


def raising(error, *notes):
    """The main of a program that ends with this `error`."""
    def main(_=None):
        with one_line_errors('train_fastai.py'):
            for note in notes: error.add_note(note)
            raise error
    return main


@pytest.mark.parametrize(('error', 'code', 'line'), [
    (InputError('no such folder'), 2, 'error: no such folder'), (RunError('no rates'), 1, 'error: no rates'),
    (KeyboardInterrupt(), 130, 'interrupted')], ids=repr)
def test_a_foreseen_error_is_one_line_which_hints_end(capsys, error, code, line):
    assert ends(capsys, code, raising(error)) == f'{line}\n'
    assert ends(capsys, code, raising(error, 'do this', 'or that')) == f'{line}; do this; or that\n'
