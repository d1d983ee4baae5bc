"""How a program ends when something goes wrong: one line on stderr, and an exit code that says what it was.

Imported first, it also silences the warnings of fastai's own import.
"""
import contextlib
import os
import signal
import sys
import traceback
import warnings

from fastcore.imports import IN_IPYTHON, noop
from fastcore.script import is_cli

from lab.processes import RANK, let_rank_0_report, lost_a_process

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)
warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # save_figure reports it in one line
warnings.filterwarnings('ignore', module=r'PIL\.')  # about images that can be read anyway


class InputError(ValueError):
    """The input cannot be used; the message is one line: what is wrong and how to fix it."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self): return self.message  # fastai rewrites the arguments of an error in a callback


class WriteError(RunError):
    """A file of the run cannot be written, because of a full disk, say."""


def one_line(e: BaseException) -> str:
    """The message of `e` on one line, or its type where it has none."""
    return ' '.join(str(e).split()) or type(e).__name__


def end_quietly_while_importing(program: str):
    """Make Ctrl-C and SIGTERM end `program` with one line during its imports, which take seconds.

    `one_line_errors` takes over afterwards. Characters that the terminal's encoding lacks are replaced from here on.
    """
    if IN_IPYTHON: return  # `%run`: the session keeps its own handlers
    for stream in (sys.stdout, sys.stderr): getattr(stream, 'reconfigure', noop)(errors='replace')  # editors' lack it
    sys.stdout = sys.stdout or open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115, it was closed

    def end(number, _):
        os.write(2, f'{program}: interrupted\n'.encode())
        os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, end)


def is_out_of_memory(e: Exception) -> bool:
    """Whether `e` reports that the device or the machine has no memory left."""
    reports = "can't allocate memory", 'not enough memory'
    return type(e).__name__ == 'OutOfMemoryError' or any(o in str(e) for o in reports)


def terminate(*_):
    """Handle SIGTERM like Ctrl-C, with its own exit code."""
    raise KeyboardInterrupt(143)


@contextlib.contextmanager
def one_line_errors(program: str):
    """End `program` with one line on stderr: exit code 2 for bad input, 1 for a failure, 130 or 143 for a signal.

    An unforeseen error shows its traceback first. Hints that were added to an error with `add_note` end the line. When
    nobody reads the output any more, as behind `| head`, the program ends silently with 141, as others do. With several
    processes, rank 0 reports the errors, and the others only those that rank 0 cannot know of.
    """
    silent, foreseen = RANK > 0, True
    try:
        if is_cli() and not IN_IPYTHON:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, terminate)
        yield
        sys.stdout.flush()  # at exit it would be too late to notice a closed pipe
        return
    except BrokenPipeError: sys.exit(141)
    except KeyboardInterrupt as e: error, message, code = e, 'interrupted', (*e.args, 130)[0]
    except InputError as e: error, message, code = e, f'error: {e}', 2
    except RunError as e: error, message, code = e, f'error: {e}', 1
    except Exception as e:
        error, code, silent = e, 1, silent and (lost_a_process(e) or hasattr(e, 'shared'))
        if is_out_of_memory(e): message = f'error: out of memory; try a smaller --bs ({one_line(e)[:120]})'
        elif lost_a_process(e): message = f"error: the run's processes cannot work together: {one_line(e)[:200]}"
        else: message, foreseen = f'error: {type(e).__name__}: {one_line(e)[:200]}', False
    hints = error.__dict__.pop('__notes__', [])
    let_rank_0_report(silent and code < 128)
    if not silent:
        if not foreseen: traceback.print_exception(error)
        print(f'{program}: {"; ".join([message, *hints])}', file=sys.stderr)
    sys.exit(code)
