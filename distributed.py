"""One run in several processes, on one machine or more, as `accelerate launch` starts them: they agree on what they do.

In a run of one process all of it does nothing, and neither torch nor accelerate is imported here.
"""
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LAUNCHED = {'WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR'} <= os.environ.keys()
RANKS = int(os.environ['WORLD_SIZE']) if LAUNCHED else 1  # processes of this run
RANK = int(os.environ['RANK']) if LAUNCHED else 0  # this one; only the first, 0, prints, draws and writes
COMMAND = f'accelerate launch --multi_gpu --num_processes {RANKS}' if RANKS > 1 else 'python'  # what started the run
PATIENCE = timedelta(minutes=30)  # with a process that is late: on a CPU the finder may take the first one as long


@contextlib.contextmanager
def joined():
    """Joins the run's processes: within it they can reach each other, and only the first one prints."""
    if RANKS == 1:
        yield
        return
    from accelerate import Accelerator, InitProcessGroupKwargs
    from fastai.torch_core import default_device
    from torch import cuda
    from torch import distributed as dist

    if RANK: sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115, it stays open to the end
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=not cuda.is_available(), kwargs_handlers=[patience])
    if accelerator.device.type == 'cpu': default_device(False)  # by a setting of accelerate's, perhaps
    del os.environ['WORLD_SIZE']  # where the first process works alone, fastai would wait for the others
    yield
    dist.destroy_process_group()  # not after an error: the others may not come


def gathered(x: Any) -> list:
    """The `x` of every process, in their order."""
    if RANKS == 1: return [x]
    from torch import distributed as dist
    xs = [None] * RANKS
    dist.all_gather_object(xs, x)
    return xs


def everywhere(f: Callable, *args, here: bool = True) -> Any:
    """`f(*args)` in every process where `here`, else None. What it raises in one of them is raised in all."""
    if RANKS == 1: return f(*args)
    result = error = None
    try: result = f(*args) if here else None
    except Exception as e: error = e
    for e in filter(None, gathered(error)):
        e.shared = True  # one process tells of it
        raise e
    return result


def by_machine(f: Callable, *args) -> Any:
    """`f(*args)` in the first process of every machine, then in the others: two should not download the same file."""
    if RANKS == 1: return f(*args)
    first = os.environ['LOCAL_RANK'] == '0'
    results = [everywhere(f, *args, here=first), everywhere(f, *args, here=not first)]
    return results[0 if first else 1]


def by_first(f: Callable, *args) -> Any:
    """What `f(*args)` returns in the first process, for all of them. What it raises there is raised in all."""
    if RANKS == 1: return f(*args)
    from torch import distributed as dist
    result = [everywhere(f, *args, here=RANK == 0)]
    dist.broadcast_object_list(result)
    return result[0]


def leave_the_word(silent: bool):
    """Before this process ends with an error: the first one, which tells of it, is not cut short by the launcher.

    It ends all processes once the first of them has ended. So one that is `silent` waits to be ended, half a minute at
    most, and another no longer listens.
    """
    if RANKS == 1: return
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL if silent else signal.SIG_IGN)
    if silent: time.sleep(30)


def lost(e: Exception) -> bool:
    """Does `e` tell that another process cannot be reached any more?"""
    said = str(e)
    return RANKS > 1 and (type(e).__name__.startswith('Dist') or any(o in said for o in ('gloo', 'Gloo', 'NCCL')))
