"""One process of several, with a narrow network and no figures: killed at batch DIES, resumed, and looked at.

It leaves beside the run's folder what it saw of the resumed part, and what it ended with. Images stay as they are.
"""
import os
import signal
import sys
from pathlib import Path

import narrow  # noqa: F401, the narrow network
import torch
from fastai.distributed import DistributedDL
from fastai.vision.all import num_distrib, rank_distrib

import train_fastai
from lab import results

dies, seen, draws = int(os.environ['DIES']), [], []


def watch(self, x: torch.Tensor) -> torch.Tensor:
    """In place of an augmentation: keeps the images, and a draw as an augmentation makes it."""
    if num_distrib() < 2: return x  # the finder's
    seen.append(x.clone())
    draws.append(torch.randint(2**40, ()).item())
    if len(seen) == dies: os.kill(os.getpid(), signal.SIGKILL)
    return x


def keep(run, learn):
    save_results(run, learn)
    torch.save(dict(weights=learn.model.state_dict(), schedule=learn.history.schedule, seen=seen, draws=draws),
               run.folder.parent/f'{rank_distrib()}.pth')


def broadcast(self, order: list[int], rank: int) -> list[int]:
    """fastai's own does this on a GPU."""
    torch.distributed.broadcast(order := torch.tensor(order), rank)
    return order.tolist()


save_results, train_fastai.save_results = train_fastai.save_results, keep
train_fastai.PadCrop.augment = watch
train_fastai.FlipLR.augment = train_fastai.Cutout.augment = lambda self, x: x
results.save_figure = lambda *_: None
DistributedDL._broadcast = broadcast

if __name__ == '__main__':
    if not (child := os.fork()): train_fastai.main()
    _, status = os.waitpid(child, 0)
    if not rank_distrib(): print(f'Ended by signal {status}', flush=True)
    dies, out = 0, Path(sys.argv[sys.argv.index('--out') + 1])
    torch.distributed.init_process_group(  # in a store of its own: the launcher's still has the addresses of the dead
        'gloo', f'file://{out.parent}/store', rank=rank_distrib(), world_size=num_distrib())
    train_fastai.main(['--resume', str(out)])
