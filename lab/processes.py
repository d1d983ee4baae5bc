"""Several processes, one for each GPU, as `accelerate launch` starts them; with one, all of this does nothing."""
import contextlib

from fastai.vision.all import *

replaced = contextlib.contextmanager(replacing_yield)  # an attribute of an object, for a while
alone = partial(modified_env, 'WORLD_SIZE')  # a while in which rank 0 works without those for whom fastai would wait


@contextlib.contextmanager
def join_processes():
    """Context manager that connects the processes of a run; only rank 0 prints."""
    if num_distrib() > 1:
        from accelerate import PartialState
        PartialState(cpu=not torch.cuda.is_available())
        if rank_distrib(): sys.stdout = open(os.devnull, 'w')  # noqa: SIM115, it stays open to the end
    yield
    if num_distrib() > 1: torch.distributed.destroy_process_group()  # not after an error: the others may not come


def on_first(f: Callable, *args) -> Any:
    """What `f(*args)` returns in rank 0, for all processes."""
    if num_distrib() < 2: return f(*args)
    from accelerate.utils import broadcast_object_list
    with alone(): result = None if rank_distrib() else f(*args)
    return broadcast_object_list([result])[0]


@contextlib.contextmanager
def data_parallel(learn: Learner):
    """Context manager that trains `learn` data-parallel, each process on its part of a batch."""
    if num_distrib() < 2: return (yield)
    import fastai.distributed  # noqa: F401, gives `Learner` its distrib_ctx
    dl, on_gpu = learn.dls.train, one_param(learn.model).is_cuda  # torch has no synchronised batch norm for CPUs
    with replaced(dl, 'bs', dl.bs // num_distrib()), learn.distrib_ctx(sync_bn=on_gpu): yield
