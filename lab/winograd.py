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
MIN_CHANNELS = 64  # with fewer, transforming the tiles takes longer than the multiplications that it saves


def evaluate(k: int) -> Tensor:
    """Matrix (6, k), float64, from a polynomial's `k` coefficients to its values at `POINTS` and infinity."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(k)
    return torch.cat([powers, torch.eye(k, dtype=torch.float64)[-1:]])


RESULT, WEIGHT, PIXELS = evaluate(4), evaluate(3), evaluate(6).inverse().T  # the paper's A, G and Bᵀ


def convolve_tile(tile: Tensor, weight: Tensor) -> Tensor:
    """What this file computes, in the paper's notation: tile (C, 6, 6), weight (C', C, 3, 3) → (C', 4, 4), float64."""
    return RESULT.T @ ((WEIGHT @ weight @ WEIGHT.T) * (PIXELS @ tile @ PIXELS.T)).sum(1) @ RESULT


def both_ways(matrix: Tensor, x: Tensor) -> Tensor: return torch.kron(matrix, matrix).to(x.dtype)


def transform(matrix: Tensor, tiles: Tensor, out: Tensor | None = None) -> Tensor:
    """`matrix` (J, I) times each of `tiles` (T, I, C) → (T, J, C)."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles, out=out)


def transform_weight(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) → (C', 36, C)."""
    return transform(both_ways(WEIGHT, weight), weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1))


def in_tiles(x: Tensor) -> Tensor:
    """The view (N, H/4, W/4, 4, 4, C) of (N, H, W, C)."""
    n, h, w, c = x.shape
    return x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3)


class Chunk:
    """Memory for the tiles of `n` images, small enough to stay in the cache, and every view of it that a step needs.

    `x` (N, H, W, C) and `c_out` say of what shape and dtype. Values lie by tile, (T, 36, C), as transforms write them, or
    by point, (36, T, C), as products do, never both at once. By tile a 37th row, of zeros, keeps the rows of a point from
    meeting in few sets of the cache.
    """

    def __init__(self, x: Tensor, n: int, c_out: int):
        h, w, c = x.shape[1:]
        t = n * h * w // 16
        pixels, result = both_ways(PIXELS, x), both_ways(RESULT, x)
        self.whole = t == n  # a map of one tile: all around it is padding
        if self.whole: pixels = pixels.view(36, 6, 6)[:, 1:5, 1:5].reshape(36, 16)
        self.from_pixels, self.to_pixels = F.pad(pixels, (0, 0, 0, 1)), pixels.T
        self.from_result, self.to_result = F.pad(result, (0, 0, 0, 1)), result.T
        if not self.whole:
            padded, tiles = x.new_zeros(n, h + 2, w + 2, c), x.new_empty(n, h // 4, w // 4, 6, 6, c)
            self.inner, self.tiles, self.pixels = padded[:, 1:-1, 1:-1], tiles, tiles.view(t, 36, c)
            self.windows = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3)
            rows = tiles[:, :, :, 1:5]  # of the 4×4 pixels that are the tile's own
            self.shared = ((tiles[:, :-1, :, 4], tiles[:, 1:, :, 0]), (tiles[:, 1:, :, 1], tiles[:, :-1, :, 5]),
                           (rows[:, :, :-1, :, 4], rows[:, :, 1:, :, 0]), (rows[:, :, 1:, :, 1], rows[:, :, :-1, :, 5]))
            self.own = rows[..., 1:5, :]
        self.result = x.new_empty(t, 16, c_out)
        self.result_tiles = self.result.view(n, h // 4, w // 4, 4, 4, c_out)
        self.x, self.y = x.new_empty(t, 37, c), x.new_empty(t, 37, c_out)
        self.x_by_tile, self.y_by_tile = (v[:, :36].transpose(0, 1) for v in (self.x, self.y))
        self.x_by_point, self.y_by_point = (v.view(37, t, -1)[:36] for v in (self.x, self.y))

    def read(self, x: Tensor):
        """Images `x` (n, H, W, C) → their values at the points, `x_by_tile`."""
        if not self.whole:
            self.inner.copy_(x)
            self.tiles.copy_(self.windows)
        transform(self.from_pixels, x.view(-1, 16, x.shape[3]) if self.whole else self.pixels, out=self.x)

    def write_gradient(self, out: Tensor):
        """`x_by_point` → `out` (n, H, W, C), the transposed of `read`: what tiles have in common is summed."""
        by_tile, own = self.x_by_point.transpose(0, 1), out.view(-1, 16, out.shape[3]) if self.whole else self.pixels
        transform(self.to_pixels, by_tile, out=own)
        if self.whole: return
        for mine, others in self.shared: mine.add_(others)
        in_tiles(out).copy_(self.own)


def chunks(c_out: int, x: Tensor, *others: Tensor):
    """Yields a `Chunk` and its images of `x` (N, H, W, C) and of `others`, for all of them in turn.

    At 64 tiles the values stay in a core's cache. Large weights, read once a chunk, need more tiles to be worth it. The
    size depends on the layer alone, so that results do not depend on the machine.
    """
    c, size = None, max(1, max(64, x.shape[3] * c_out // 512) * 16 // x[0, :, :, 0].numel())
    for parts in zip(*(o.split(size) for o in (x, *others)), strict=True):
        if c is None or len(parts[0]) < size: c = Chunk(x, len(parts[0]), c_out)
        yield c, *parts


def nhwc(x: Tensor) -> Tensor: return x.permute(0, 2, 3, 1).contiguous()


class Winograd(torch.autograd.Function):
    """x (N, C, H, W), weight (C', C, 3, 3) → (N, C', H, W) in channels-last memory; H, W multiples of four; on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, u = nhwc(x), transform_weight(weight).permute(1, 2, 0)
        out = x.new_empty(*x.shape[:3], len(weight))
        for c, x_part, out_part in chunks(len(weight), x, out):
            c.read(x_part)
            torch.bmm(c.x_by_tile, u, out=c.y_by_point)
            transform(c.to_result, c.y_by_point.transpose(0, 1), out=c.result)
            in_tiles(out_part).copy_(c.result_tiles)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (x_too, weight_too) = ctx.saved_tensors, ctx.needs_input_grad
        x, grad, u = nhwc(x), nhwc(grad), transform_weight(weight).transpose(0, 1)
        grad_x, grad_u = torch.empty_like(x), torch.zeros_like(u, memory_format=torch.contiguous_format)
        for c, x_part, grad_part, grad_x_part in chunks(len(weight), x, grad, grad_x):
            c.result_tiles.copy_(in_tiles(grad_part))
            transform(c.from_result, c.result, out=c.y)
            if weight_too:
                c.read(x_part)
                grad_u.baddbmm_(c.y_by_tile.transpose(1, 2), c.x_by_tile)
            if x_too:
                torch.bmm(c.y_by_tile, u, out=c.x_by_point)
                c.write_gradient(grad_x_part)
        grad_weight = transform(both_ways(WEIGHT, x).T, grad_u.transpose(0, 1)).view(len(weight), 3, 3, -1)
        return grad_x.permute(0, 3, 1, 2) if x_too else None, grad_weight.permute(0, 3, 1, 2) if weight_too else None


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution that `fits_winograd`: (N, C, H, W) → (N, C', H, W), as `nn.Conv2d`, in channels-last memory.

    Inputs that it is not made for are convolved directly: other than float32 on a CPU, autocast, sides that are no
    multiples of four. So are all if products may be rounded further: transformed ones would lose most of their digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        fits = (x.dim() == 4 and x.dtype == self.weight.dtype == torch.float32 and x.device.type == 'cpu' and len(x)
                and x.shape[2] % 4 == x.shape[3] % 4 == 0 and not torch.is_autocast_enabled('cpu')
                and torch.get_float32_matmul_precision() == 'highest')
        if not fits: return super().forward(x)
        return Winograd.apply(x.as_subclass(Tensor), self.weight).as_subclass(type(x))


def is_plain_3x3(module: nn.Module) -> bool:
    """Whether `module` is a 3×3 convolution with stride 1, zeros around and no bias."""
    return type(module) is nn.Conv2d and module.bias is None and (
        (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
        == ((3, 3), (1, 1), (1, 1), (1, 1), 1, 'zeros'))


def wins(conv: nn.Conv2d) -> bool:
    """Whether Winograd's products save `conv`, a plain 3×3, more time than they cost."""
    return min(conv.weight.shape[:2]) >= MIN_CHANNELS and torch.get_float32_matmul_precision() == 'highest'
