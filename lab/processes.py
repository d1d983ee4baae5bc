"""What the processes of one run agree on, when `accelerate launch` starts several, on one machine or more.

In a run of one process all of this does nothing, and neither torch nor accelerate is imported here.
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
RANK = int(os.environ['RANK']) if LAUNCHED else 0  # this one; only rank 0 prints, draws and writes
COMMAND = f'accelerate launch --multi_gpu --num_processes {RANKS}' if RANKS > 1 else 'python'  # what started the run
TIMEOUT = timedelta(minutes=30)  # for a process that is late: on a CPU the finder may keep rank 0 busy that long


@contextlib.contextmanager
def ignore_other_launch():
    """Context manager that hides what another launch left in the environment, where fastai looks for processes."""
    hidden = {k: os.environ.pop(k) for k in ('RANK', 'WORLD_SIZE') if RANKS == 1 and k in os.environ}
    try: yield
    finally: os.environ.update(hidden)


@contextlib.contextmanager
def join_processes():
    """Context manager that connects the run's processes; only rank 0 prints."""
    if RANKS == 1:
        with ignore_other_launch(): yield
        return
    from accelerate import Accelerator, InitProcessGroupKwargs
    from fastai.torch_core import default_device
    from torch import cuda
    from torch import distributed as dist

    if RANK: sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115, it stays open to the end
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(cpu=not cuda.is_available(), kwargs_handlers=[timeout])
    if accelerator.device.type == 'cpu': default_device(False)  # accelerate's own settings may ask for the CPU
    del os.environ['WORLD_SIZE']  # where rank 0 works alone, fastai would wait for the others
    yield
    dist.destroy_process_group()  # not after an error: the others may not come


def gather(x: Any) -> list:
    """The `x` of every process, by rank."""
    if RANKS == 1: return [x]
    from accelerate.utils import gather_object
    return gather_object([x])


def run_together(f: Callable, *args, here: bool = True) -> Any:
    """Call `f(*args)` in every process where `here`, else return None. An error in one process is raised in all."""
    if RANKS == 1: return f(*args)
    result = error = None
    try: result = f(*args) if here else None
    except Exception as e: error = e
    for e in filter(None, gather(error)):
        e.shared = True  # rank 0 reports it for all
        raise e
    return result


def one_by_machine(f: Callable, *args) -> Any:
    """Call `f(*args)` in the first process of every machine, then in the others: no file is downloaded twice."""
    if RANKS == 1: return f(*args)
    first = os.environ['LOCAL_RANK'] == '0'
    results = [run_together(f, *args, here=first), run_together(f, *args, here=not first)]
    return results[0 if first else 1]


def on_first(f: Callable, *args) -> Any:
    """What `f(*args)` returns in rank 0, for all processes. An error there is raised in all."""
    if RANKS == 1: return f(*args)
    from accelerate.utils import broadcast_object_list
    return broadcast_object_list([run_together(f, *args, here=RANK == 0)])[0]


def let_rank_0_report(silent: bool):
    """Give rank 0 time to print its error before the launcher kills it.

    The launcher kills all processes once one of them has ended: a `silent` one waits for that, at most half a minute,
    and the one that reports ignores it.
    """
    if RANKS == 1: return
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL if silent else signal.SIG_IGN)
    if silent: time.sleep(30)


def lost_a_process(e: BaseException) -> bool:
    """Whether `e` says that another process of the run cannot be reached any more."""
    message = str(e)
    return RANKS > 1 and isinstance(e, RuntimeError) and (
        type(e).__name__.startswith('Dist') or any(o in message for o in ('gloo', 'Gloo', 'NCCL')))
