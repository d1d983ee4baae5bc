"""The network of the assignment: a small ResNet for 32×32 images with 6,573,130 parameters.

    layer    stages                                                          output, (N, C, H, W)
    prep     Conv 3×3 → BN → ReLU                                            (N,  64, 32, 32)
    layer1   X = Conv 3×3 → MaxPool 2 → BN → ReLU;  X + ResBlock(X)          (N, 128, 16, 16)
    layer2   Conv 3×3 → MaxPool 2 → BN → ReLU                                (N, 256,  8,  8)
    layer3   X = Conv 3×3 → MaxPool 2 → BN → ReLU;  X + ResBlock(X)          (N, 512,  4,  4)
    pool     MaxPool 4                                                       (N, 512,  1,  1)
    fc       Linear with bias                                                (N, n_out)
    softmax  SoftMax, as its logarithm                                       (N, n_out)

Every convolution is 3×3 with stride 1, padding 1 and no bias.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn_relu(c_in: int, c_out: int, pool: bool = False) -> nn.Sequential:
    """Conv 3×3 → [MaxPool 2] → BN → ReLU: (N, c_in, H, W) → (N, c_out, H, W), halving H and W with `pool`."""
    conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=1, padding=1, bias=False)
    return nn.Sequential(conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(c_out), nn.ReLU())


class ResBlock(nn.Module):
    """X + R, where R = Conv-BN-ReLU-Conv-BN-ReLU of X: (N, c, H, W) → (N, c, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        self.residual = nn.Sequential(conv_bn_relu(c, c), conv_bn_relu(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class LogSoftmax(nn.Module):
    """The assignment's SoftMax stage as log-probabilities: (N, C), any float dtype → (N, C), float32.

    Cross-entropy applies log-softmax itself. After a plain softmax that flattens the gradients; after this one it
    changes nothing: log-softmax of log-probabilities is the identity. `exp` of the output gives the probabilities.
    """

    def forward(self, x: Tensor) -> Tensor:
        # In bfloat16, where autocast on a CPU would leave it, probabilities no longer sum to 1.
        return F.log_softmax(x, dim=1, dtype=torch.float32)


class ResNet(nn.Module):
    """The network in the module's table: float images (N, c_in, 32, 32) → float32 log-probabilities (N, n_out).

    `width` is the number of channels of the first stage; the assignment's is 64.
    """
    memory_format = torch.channels_last  # the layout in which it trains fastest

    def __init__(self, c_in: int = 3, n_out: int = 10, width: int = 64):
        super().__init__()
        w = width
        self.prep = conv_bn_relu(c_in, w)
        self.layer1 = nn.Sequential(conv_bn_relu(w, 2*w, pool=True), ResBlock(2*w))
        self.layer2 = conv_bn_relu(2*w, 4*w, pool=True)
        self.layer3 = nn.Sequential(conv_bn_relu(4*w, 8*w, pool=True), ResBlock(8*w))
        self.pool = nn.MaxPool2d(4)
        self.fc = nn.Linear(8*w, n_out)
        self.softmax = LogSoftmax()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.softmax(self.fc(self.pool(x).flatten(1)))
