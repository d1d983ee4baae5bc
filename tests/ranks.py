"""`tests/narrow.py` for one process of several: it leaves in the folder WATCH what the process saw and ended with.

Nothing is drawn, and images stay as they are. With DIES set, it is killed at that batch.
"""
import os
import signal
from pathlib import Path

import narrow  # noqa: F401, the narrow network
import torch
from fastai.distributed import DistributedDL
from fastai.vision.all import Pipeline

import train_fastai
from lab import results
from lab.loader import Augmentation

seen, draws, learners = [], [], []


class Watch(Augmentation):
    """In place of the augmentations: keeps the images, and a draw as an augmentation makes it."""

    def augment(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(learners[0], 'lr_finder'): return x
        seen.append(x.clone())
        draws.append(torch.randint(2**40, ()).item())
        if os.environ.get('DIES') == str(len(seen)): os.kill(os.getpid(), signal.SIGKILL)
        return x


def get_watched(dls, *args, **kwargs):
    learn = get_learner(dls, *args, **kwargs)
    learners.append(learn)
    dls.train.after_item = Pipeline([Watch()], split_idx=0)
    return learn


def broadcast(self, order: list[int], rank: int) -> list[int]:
    """fastai's own does this on a GPU."""
    order = torch.tensor(order)
    torch.distributed.broadcast(order, rank)
    return order.tolist()


get_learner, train_fastai.get_learner = train_fastai.get_learner, get_watched
results.save_figure = lambda *_: None
DistributedDL._broadcast = broadcast

if __name__ == '__main__':
    train_fastai.main()
    learn = learners[0]
    torch.save(dict(weights=learn.model.state_dict(), schedule=learn.history.schedule, seen=seen, draws=draws),
               Path(os.environ['WATCH'])/f'{os.environ.get("RANK", 0)}.pth')
