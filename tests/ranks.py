"""`tests/narrow.py` for one process of several: it leaves in the folder WATCH what the process saw and ended with.

Nothing is drawn, and images stay as they are. With GHOSTS set, a single process computes as two do together: batch norm
takes every second image of a batch for a batch of its own. With DIES set, the second process is killed at that batch.
"""
import os
import runpy
import signal
import sys
from pathlib import Path

import narrow  # the narrow network
import torch
from fastai.vision.all import Pipeline
from torch import nn

from lab import learner, runs
from lab.loader import Augmentation

seen, draws, learners = [], [], []


class Watch(Augmentation):
    """In place of the augmentations: keeps the images, and a draw as an augmentation makes it."""

    def augment(self, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        draws.append(torch.randint(2**40, ()).item())
        if os.environ.get('DIES') == str(len(seen)) and os.environ.get('RANK') == '1':
            os.kill(os.getpid(), signal.SIGKILL)
        return x


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Two batch norms, whose statistics are those of the first: what two processes without SyncBatchNorm compute."""

    def forward(self, x):
        if not self.training: return super().forward(x)
        second = nn.functional.batch_norm(x[1::2], None, None, self.weight, self.bias, True, eps=self.eps)
        return torch.stack([super().forward(x[0::2]), second], 1).flatten(0, 1)


class WatchedLearner(learner.RobustLearner):
    def __init__(self, dls, *args, **kwargs):
        super().__init__(dls, *args, **kwargs)
        learners.append(self)
        dls.train.after_item = Pipeline([Watch()], split_idx=0)


learner.RobustLearner = WatchedLearner
runs.Run.save_figure = lambda *_: None
if os.environ.get('GHOSTS'): nn.BatchNorm2d = GhostBatchNorm2d

if __name__ == '__main__':
    runpy.run_path(str(narrow.ROOT/'train_fastai.py'), run_name='__main__')
    learn = learners[0]
    torch.save(dict(weights=learn.model.state_dict(), schedule=learn.history.schedule, seen=seen, draws=draws,
                    accelerate='accelerate' in sys.modules),
               Path(os.environ['WATCH'])/f'{os.environ.get("RANK", 0)}.pth')
