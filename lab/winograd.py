"""3×3 convolutions by Winograd's F(4×4, 3×3), for training in float32 on a CPU: a quarter of the multiplications.

A tile of 4×4 results needs 6×6 pixels. Tiles and weights are taken as polynomials and evaluated at six points in each
direction, the 36 values are multiplied and summed over the channels, a matrix product each, and 4×4 results are read
off (Lavin and Gray 2015, arXiv:1509.09308). Both gradients go the same way back, through the transposed steps.
"""
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

POINTS = 0, 5/8, -5/8, 3/2, -3/2  # and infinity; half the rounding error of the paper's 0, ±1, ±2
MIN_CHANNELS = MIN_TILES = 64  # below, the transforms take longer than the multiplications that they save


def evaluate(k: int) -> Tensor:
    """Matrix (6, k), float64, from a polynomial's `k` coefficients to its values at `POINTS` and infinity."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(k)
    return torch.cat([powers, torch.eye(k, dtype=torch.float64)[-1:]])


RESULT, WEIGHT, PIXELS = (torch.kron(m, m) for m in (  # for both directions; m is the paper's A, G or Bᵀ
    evaluate(4), evaluate(3), evaluate(6).inverse().T))


def convolve_tile(tile: Tensor, weight: Tensor) -> Tensor:
    """What this file computes, as the paper has it: tile (C, 6, 6), weight (C', C, 3, 3) → (C', 4, 4), all float64."""
    a, g, b = evaluate(4), evaluate(3), evaluate(6).inverse()
    return a.T @ ((g @ weight @ g.T) * (b.T @ tile @ b)).sum(1) @ a


def transform(matrix: Tensor, tiles: Tensor, out: Tensor | None = None) -> Tensor:
    """`matrix` (J, I) times each of `tiles` (T, I, C) → (T, J, C)."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles, out=out)


def transform_weight(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) → (C', 36, C)."""
    return transform(WEIGHT.to(weight), weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1))


def in_tiles(x: Tensor) -> Tensor:
    """The view (N, H/4, W/4, 4, 4, C) of (N, H, W, C)."""
    n, h, w, c = x.shape
    return x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3)


class Chunk:
    """The T tiles of `n` images (N, H, W, C) like `x`: memory that stays in the cache, and all views that a step needs.

    Values of inputs, `x`, and outputs, `y`, lie by tile, (T, 36, C), where a transform wrote them, or else by point,
    (36, T, C), where a product did. By tile a 37th row, of zeros, keeps a point's rows from the same few cache sets.
    """

    def __init__(self, x: Tensor, n: int, c_out: int):
        h, w, c = x.shape[1:]
        t = n * h * w // 16
        edge = int(t > n)  # around a map of one tile there is nothing but zeros, which are left out
        side, own = 4 + 2 * edge, slice(edge, edge + 4)
        padded, tiles = x.new_zeros(n, h + 2 * edge, w + 2 * edge, c), x.new_empty(n, h // 4, w // 4, side, side, c)
        self.inner = padded[:, edge:edge + h, edge:edge + w]
        self.windows = padded.unfold(1, side, 4).unfold(2, side, 4).movedim(3, -1)
        self.tiles, self.pixels, self.own = tiles, tiles.view(t, -1, c), tiles[:, :, :, own, own]
        self.overlapping = (tiles, tiles[:, :, :, own].transpose(1, 2).transpose(3, 4)) if edge else ()
        pixels = PIXELS.to(x).view(36, 6, 6)[:, 1 - edge:5 + edge, 1 - edge:5 + edge].reshape(36, -1)
        result = RESULT.to(x)
        self.from_pixels, self.to_pixels = F.pad(pixels, (0, 0, 0, 1)), pixels.T
        self.from_result, self.to_result = F.pad(result, (0, 0, 0, 1)), result.T
        self.result = x.new_empty(t, 16, c_out)
        self.result_tiles = self.result.view(n, h // 4, w // 4, 4, 4, c_out)
        self.x, self.y = x.new_empty(t, 37, c), x.new_empty(t, 37, c_out)
        self.x_by_tile, self.y_by_tile = (v[:, :36].transpose(0, 1) for v in (self.x, self.y))
        self.x_by_point, self.y_by_point = (v.view(37, t, -1)[:36] for v in (self.x, self.y))

    def read(self, x: Tensor):
        """Images `x` (n, H, W, C) → `x_by_tile`."""
        self.inner.copy_(x)
        self.tiles.copy_(self.windows)
        transform(self.from_pixels, self.pixels, out=self.x)

    def write_gradient(self, out: Tensor):
        """`x_by_point` → `out` (n, H, W, C), the transposed of `read`: what tiles have in common is summed."""
        transform(self.to_pixels, self.x_by_point.transpose(0, 1), out=self.pixels)
        for o in self.overlapping:  # down, then across
            o[:, :-1, :, 4].add_(o[:, 1:, :, 0])
            o[:, 1:, :, 1].add_(o[:, :-1, :, 5])
        in_tiles(out).copy_(self.own)


def in_chunks(c_out: int, x: Tensor, *others: Tensor):
    """Yields a `Chunk` with its images of `x` (N, H, W, C) and of `others`, until all had their turn.

    64 tiles stay in a core's cache; large weights, read once a chunk, need more of them to be worth it. A fixed size
    keeps results from depending on the machine.
    """
    chunk, n = None, max(1, (64 if x.shape[3] < 256 else 256) * 16 // (x.shape[1] * x.shape[2]))
    for parts in zip(*(o.split(n) for o in (x, *others)), strict=True):
        if chunk is None or len(parts[0]) < n: chunk = Chunk(x, len(parts[0]), c_out)
        yield chunk, *parts


def nhwc(x: Tensor) -> Tensor: return x.permute(0, 2, 3, 1).contiguous()


class Winograd(torch.autograd.Function):
    """x (N, C, H, W), weight (C', C, 3, 3) → (N, C', H, W) in channels-last memory; sides are multiples of four."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, u = nhwc(x), transform_weight(weight).permute(1, 2, 0)
        out = x.new_empty(*x.shape[:3], len(weight))
        for c, x_part, out_part in in_chunks(len(weight), x, out):
            c.read(x_part)
            torch.bmm(c.x_by_tile, u, out=c.y_by_point)
            transform(c.to_result, c.y_by_point.transpose(0, 1), out=c.result)
            in_tiles(out_part).copy_(c.result_tiles)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x, u = nhwc(x), transform_weight(weight).transpose(0, 1)
        grad_x, grad_u = torch.empty_like(x), x.new_zeros(36, len(weight), x.shape[3])
        for c, x_part, grad_part, grad_x_part in in_chunks(len(weight), x, nhwc(grad), grad_x):
            c.result_tiles.copy_(in_tiles(grad_part))
            transform(c.from_result, c.result, out=c.y)
            c.read(x_part)
            grad_u.baddbmm_(c.y_by_tile.transpose(1, 2), c.x_by_tile)
            torch.bmm(c.y_by_tile, u, out=c.x_by_point)
            c.write_gradient(grad_x_part)
        grad_weight = transform(WEIGHT.to(x).T, grad_u.transpose(0, 1)).view(len(weight), 3, 3, -1)
        return grad_x.permute(0, 3, 1, 2), grad_weight.permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution of `MIN_CHANNELS` or more: (N, C, H, W) → (N, C', H, W) in channels-last memory.

    Direct, as ever, for what it is not made for: other than float32 on a CPU, autocast, sides that are no multiples of
    four, very few pixels; and where products may be rounded further: transformed ones would lose most of their digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        fits = (x.dim() == 4 and x.dtype == self.weight.dtype == torch.float32 and x.device.type == 'cpu'
                and x.shape[2] % 4 == x.shape[3] % 4 == 0 and len(x) * x.shape[2] * x.shape[3] >= 16 * MIN_TILES
                and not torch.is_autocast_enabled('cpu') and torch.get_float32_matmul_precision() == 'highest')
        if not fits: return super().forward(x)
        return Winograd.apply(x.as_subclass(Tensor), self.weight).as_subclass(type(x))


def is_plain_3x3(module: nn.Module) -> bool:
    """Whether `module` is a 3×3 convolution with stride 1, zeros around and no bias."""
    plain = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode='zeros')
    return type(module) is nn.Conv2d and module.bias is None and plain.items() <= vars(module).items()
