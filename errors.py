"""How the programs end when something goes wrong: with one line on stderr and an exit code that tells what it was.

It is imported first and also silences the warnings of fastai's own import.
"""
import contextlib
import os
import signal
import sys
import warnings

from fastcore.imports import IN_IPYTHON, noop
from fastcore.script import is_cli

from distributed import RANK, leave_the_word, lost

warnings.filterwarnings('ignore', r'`torch\.jit\.script` is deprecated', FutureWarning)
warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # save_figure says so in one line
warnings.filterwarnings('ignore', module=r'PIL\.')  # of images that can be read all the same


class InputError(ValueError):
    """What was given cannot be used; the message is one line: what is wrong and how to fix it."""


class RunError(RuntimeError):
    """The run cannot go on; the message is one line."""


def one_line(e: Exception) -> str:
    """What `e` says, on one line."""
    return ' '.join(str(e).split()) or type(e).__name__


def end_quietly_while_importing(program: str):
    """Ctrl-C and SIGTERM end `program` with one line until `one_line_errors` takes over; imports take seconds.

    From here on a character that the terminal's encoding lacks is replaced.
    """
    if IN_IPYTHON: return  # with `%run`, in a session that has its own ways and goes on
    for stream in (sys.stdout, sys.stderr): getattr(stream, 'reconfigure', noop)(errors='replace')  # editors' lack it
    sys.stdout = sys.stdout or open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115, it was closed

    def end(number, _):
        os.write(2, f'{program}: interrupted\n'.encode())
        os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, end)


def device_trouble(e: Exception) -> str | None:
    """What went wrong on the processor or GPU, and what helps, if that is what `e` tells of."""
    said = one_line(e)
    if type(e).__name__ == 'OutOfMemoryError' or "can't allocate memory" in said or 'not enough memory' in said:
        return f'out of memory; try a smaller --bs ({said[:120]})'
    if type(e).__name__ == 'AcceleratorError' or any(o in said for o in ('CUDA', 'cuDNN', 'CUBLAS')):
        return f'the device failed: {said[:200]}'
    return None


def terminate(*_):
    """SIGTERM as an interruption with its own exit code."""
    raise KeyboardInterrupt(143)


@contextlib.contextmanager
def one_line_errors(program: str):
    """Ends `program` with one line on stderr: exit code 2 for bad input, 1 for a failure, 130 or 143 for a signal.

    Where nobody reads its output any more, as behind `| head`, it ends in silence with 141, as other programs do. Of
    several processes only the first one prints errors, except those it cannot know of.
    """
    silent = RANK > 0
    try:
        if is_cli() and not IN_IPYTHON:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, terminate)
        yield
        sys.stdout.flush()  # at the exit it would be too late to say that nobody reads on
    except BrokenPipeError: sys.exit(141)
    except InputError as e: message, code = f'error: {e}', 2
    except (RunError, OSError) as e: message, code = f'error: {e}', 1
    except KeyboardInterrupt as e: message, code = '; '.join(['interrupted', *map(str, e.args[1:])]), (*e.args, 130)[0]
    except RuntimeError as e:
        message = f"the run's processes cannot work together: {one_line(e)[:200]}" if lost(e) else device_trouble(e)
        if not message: raise
        message, code, silent = f'error: {message}', 1, silent and (lost(e) or hasattr(e, 'shared'))
    else: return
    leave_the_word(silent and code < 128)
    if not silent: print(f'{program}: {message}', file=sys.stderr)
    sys.exit(code)
