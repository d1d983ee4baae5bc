import io
import sys

import errors


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
