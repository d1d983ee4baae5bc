"""How the programs end when something goes wrong: with one line on stderr and an exit code that tells what it was.

Imported first, it also keeps silent what fastai's own import warns of.
"""
import contextlib
import os
import signal
import sys
import warnings

from fastcore.script import is_cli

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)


class InputError(ValueError):
    """What was given cannot be used; the message is one line that names the culprit and the way out."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line."""


def one_line(e: Exception) -> str:
    """What `e` says, on one line."""
    return ' '.join(str(e).split()) or type(e).__name__


def end_quietly_while_importing(program: str):
    """Ctrl-C and SIGTERM end `program` with one line until `one_line_errors` takes over; imports take seconds."""
    def end(number, _):
        os.write(2, f'{program}: interrupted\n'.encode())
        os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, end)


def terminate(*_):
    """SIGTERM as an interruption with its own exit code."""
    raise KeyboardInterrupt(143)


@contextlib.contextmanager
def one_line_errors(program: str):
    """Ends `program` with one line: exit code 2 for bad input, 1 for a failure, 130 or 143 for a signal.

    Where nobody reads what it prints, as behind `| head`, it ends in silence, with 141 as other programs do.
    """
    try:
        if is_cli():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, terminate)
        yield
        sys.stdout.flush()  # at the exit it would be too late to say that nobody reads on
    except BrokenPipeError: sys.exit(141)
    except InputError as e: message, code = f'error: {e}', 2
    except (RunError, OSError) as e: message, code = f'error: {e}', 1
    except KeyboardInterrupt as e: message, code = '; '.join(['interrupted', *map(str, e.args[1:])]), (*e.args, 130)[0]
    else: return
    print(f'{program}: {message}', file=sys.stderr)
    sys.exit(code)
