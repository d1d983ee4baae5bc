"""3×3 convolutions by Winograd's F(4×4, 3×3), for training in float32 on a CPU: a quarter of the multiplications.

A tile of 4×4 results needs 6×6 pixels. Tiles and weights are taken as polynomials and evaluated at six points in each
direction, the 36 values are multiplied and summed over the channels, a matrix product each, and 4×4 results are read
off (Lavin and Gray 2015, arXiv:1509.09308). Both gradients go the same way back, through the transposed steps.
"""
import torch
from torch import Tensor, nn

POINTS = torch.tensor([0, 5/8, -5/8, 3/2, -3/2]).double()  # and infinity: half the error of the paper's 0, ±1, ±2
MIN_CHANNELS = MIN_TILES = 64  # below, the transforms take longer than the multiplications that they save


def evaluate(k: int) -> Tensor:
    """Matrix (6, k), float64, from a polynomial's `k` coefficients to its values at `POINTS` and infinity."""
    return torch.cat([torch.linalg.vander(POINTS, N=k), torch.eye(k, dtype=torch.float64)[-1:]])


A, G, B = evaluate(4), evaluate(3), evaluate(6).inverse()  # as in the paper
RESULT, WEIGHT, PIXELS = (torch.kron(m, m) for m in (A, G, B.T))  # for both directions


def convolve_tile(tile: Tensor, weight: Tensor) -> Tensor:
    """What this file computes, as the paper has it: tile (C, 6, 6), weight (C', C, 3, 3) → (C', 4, 4), all float64."""
    return A.T @ ((G @ weight @ G.T) * (B.T @ tile @ B)).sum(1) @ A


def transform(matrix: Tensor, tiles: Tensor, out: Tensor | None = None) -> Tensor:
    """`matrix` (J, I) times each of `tiles` (T, I, C) → (T, J, C)."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles, out=out)


def transform_weight(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) → (C', 36, C)."""
    return transform(WEIGHT.to(weight), weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1))


def in_tiles(images: Tensor, side: int = 4) -> Tensor:
    """The view (N, H/4, W/4, side, side, C) of `images` (N, H, W, C), which are padded for a `side` of 6."""
    return images.unfold(1, side, 4).unfold(2, side, 4).movedim(3, -1)


class Tiles:
    """The T tiles of (N, H, W, C), with an `edge` of 0 or 1 pixels: memory that stays in the cache, and all its views.

    Their values lie by tile, (T, 36, C), where a transform wrote them, or else by point, (36, T, C), where a product
    did. By tile a 37th row, of zeros, keeps a point's rows from the same few cache sets.
    """

    def __init__(self, images: Tensor, c: int, edge: int, matrix: Tensor):
        (n, h, w, _), side, own = images.shape, 4 + 2 * edge, slice(edge, edge + 4)
        self.edge, padded = edge, images.new_zeros(n * edge, h + 2, w + 2, c)
        self.inner, self.windows = padded[:, 1:-1, 1:-1], in_tiles(padded, 6)
        self.tiles = tiles = images.new_empty(n, h // 4, w // 4, side, side, c)
        self.pixels, self.own = tiles.view(-1, side * side, c), tiles[:, :, :, own, own]
        self.overlapping = (tiles, tiles[:, :, :, own].transpose(1, 2).transpose(3, 4)) if edge else ()
        self.values = images.new_empty(len(self.pixels), 37, c)
        self.by_tile, self.by_point = self.values[:, :36].transpose(0, 1), self.values.view(37, -1, c)[:36]
        self.to_values, self.to_pixels = nn.functional.pad(matrix, (0, 0, 0, 1)), matrix.T

    def read(self, images: Tensor):
        """`images` (N, H, W, C) → `by_tile`."""
        if self.edge: self.inner.copy_(images)
        self.tiles.copy_(self.windows if self.edge else in_tiles(images))
        transform(self.to_values, self.pixels, out=self.values)

    def write(self, images: Tensor):
        """`by_point` → `images` (N, H, W, C), the transposed of `read`: what tiles have in common is summed."""
        transform(self.to_pixels, self.by_point.transpose(0, 1), out=self.pixels)
        for o in self.overlapping:  # down, then across
            o[:, :-1, :, 4].add_(o[:, 1:, :, 0])
            o[:, 1:, :, 1].add_(o[:, :-1, :, 5])
        in_tiles(images).copy_(self.own)


def in_chunks(c_out: int, x: Tensor, *others: Tensor):
    """Yields `Tiles` for inputs and outputs with their part of the images `x` (N, H, W, C) and `others`, one by one.

    64 tiles fit into a core's cache; large weights, read once a chunk, need more. No result depends on the machine.
    """
    (_, h, w, c), tiles = x.shape, None
    n, edge = max(1, (64 if c < 256 else 256) * 16 // (h * w)), int(h * w > 16)  # around one tile are only zeros
    pixels = PIXELS.to(x).view(36, 6, 6)[:, 1 - edge:5 + edge, 1 - edge:5 + edge].reshape(36, -1)
    for part, *parts in zip(*(o.split(n) for o in (x, *others)), strict=True):
        if not tiles or len(part) < n: tiles = Tiles(part, c, edge, pixels), Tiles(part, c_out, 0, RESULT.to(x))
        yield *tiles, part, *parts


class Winograd(torch.autograd.Function):
    """x (N, C, H, W), weight (C', C, 3, 3) → (N, C', H, W) in channels-last memory; sides are multiples of four."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, u = x.permute(0, 2, 3, 1).contiguous(), transform_weight(weight).permute(1, 2, 0)
        out = x.new_empty(*x.shape[:3], len(weight))
        for inputs, outputs, x_part, out_part in in_chunks(len(weight), x, out):
            inputs.read(x_part)
            torch.bmm(inputs.by_tile, u, out=outputs.by_point)
            outputs.write(out_part)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x, grad = (o.permute(0, 2, 3, 1).contiguous() for o in (x, grad))
        grad_x, grad_u = torch.empty_like(x), x.new_zeros(36, len(weight), x.shape[3])
        u = transform_weight(weight).transpose(0, 1)
        for inputs, outputs, x_part, grad_part, grad_x_part in in_chunks(len(weight), x, grad, grad_x):
            outputs.read(grad_part)
            inputs.read(x_part)
            grad_u.baddbmm_(outputs.by_tile.transpose(1, 2), inputs.by_tile)
            torch.bmm(outputs.by_tile, u, out=inputs.by_point)
            inputs.write(grad_x_part)
        grad_weight = transform(WEIGHT.to(x).T, grad_u.transpose(0, 1)).view(len(weight), 3, 3, -1)
        return grad_x.permute(0, 3, 1, 2), grad_weight.permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """A plain 3×3 convolution of `MIN_CHANNELS` or more: (N, C, H, W) → (N, C', H, W) in channels-last memory.

    Direct, as ever, for what it is not made for: other than float32 on a CPU, autocast, sides that are no multiples of
    four, very few pixels; and where products may be rounded further: transformed ones would lose most of their digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        fits = (x.dim() == 4 and x.dtype == self.weight.dtype == torch.float32 and x.device.type == 'cpu'
                and x.shape[2] % 4 == x.shape[3] % 4 == 0 and len(x) * x.shape[2] * x.shape[3] >= 16 * MIN_TILES
                and not torch.is_autocast_enabled('cpu') and torch.get_float32_matmul_precision() == 'highest')
        if not fits: return super().forward(x)
        return Winograd.apply(x.as_subclass(Tensor), self.weight).as_subclass(type(x))
