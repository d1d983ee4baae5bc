"""How a program ends when something goes wrong: one line on stderr, and an exit code that says what it was."""
import contextlib
import os
import signal
import sys

from fastcore.imports import IN_IPYTHON, noop


class InputError(ValueError):
    """The input cannot be used; the message is one line: what is wrong and how to fix it."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line."""

    def __init__(self, message: str): self.message = message
    def __str__(self): return self.message  # fastai rewrites the arguments of an error in a callback


def one_line(e: BaseException) -> str:
    """The message of `e` on one line, or its type where it has none."""
    return ' '.join(str(e).split()) or type(e).__name__


@contextlib.contextmanager
def one_line_errors(program: str):
    """End `program` with one line on stderr: exit code 2 for bad input, 1 for a failure, 130 for Ctrl-C and SIGTERM.

    Hints that were added to an error with `add_note` end the line. If stdout is closed (`| head`), the exit code is
    141. An unforeseen error, other than of files, is a traceback, as Python prints it.
    """
    if not IN_IPYTHON: signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    for stream in (sys.stdout, sys.stderr): getattr(stream, 'reconfigure', noop)(errors='replace')  # editors' lack it
    try:
        yield
        if sys.stdout: sys.stdout.flush()  # at exit it would be too late to notice a closed pipe
    except BrokenPipeError:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, for what Python flushes at exit
        sys.exit(141)
    except (KeyboardInterrupt, InputError, RunError, OSError) as e:
        interrupted = isinstance(e, KeyboardInterrupt)
        message = '; '.join(['interrupted' if interrupted else f'error: {e}', *getattr(e, '__notes__', [])])
        print(f'{program}: {message}', file=sys.stderr)
        sys.exit(130 if interrupted else 2 if isinstance(e, InputError) else 1)
