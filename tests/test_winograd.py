import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arch import ResNet
from lab.speed import faster_class
from lab.winograd import Winograd, WinogradConv2d, convolve_tile
from train_fastai import get_dls

TOLERANCE = 3e-6  # of a result's norm; direct convolutions in float32 are at 0.2 to 0.9e-6


def error(x: Tensor, true: Tensor) -> float: return ((x - true).norm() / true.norm()).item()


def examples(c_in: int, c_out: int, side: int, n: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and gradients as they occur in training."""
    torch.manual_seed(n)
    x, grad = torch.randn(n, c_in, side, side, dtype=dtype).relu(), torch.randn(n, c_out, side, side, dtype=dtype)
    return x, torch.randn(c_out, c_in, 3, 3, dtype=dtype) / (9 * c_in)**.5, grad


def convolve(how, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `how` and its gradients with respect to inputs and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = how(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


def direct(x: Tensor, weight: Tensor) -> Tensor: return F.conv2d(x, weight, padding=1)


def layer() -> WinogradConv2d:
    torch.manual_seed(0)
    return WinogradConv2d(64, 64, 3, padding=1, bias=False)


def test_a_tile_in_the_papers_notation_is_a_sum_of_products():
    x, weight, _ = examples(3, 5, 12, 1, torch.float64)
    tile = x[0, :, 3:9, 3:9]  # the middle one of nine
    out = convolve_tile(tile, weight)
    by_definition = torch.einsum('cyxij,dcij->dyx', tile.unfold(1, 3, 1).unfold(2, 3, 1), weight)
    assert torch.allclose(out, by_definition, rtol=0, atol=1e-12)
    assert torch.allclose(out, Winograd.apply(x, weight)[0, :, 4:8, 4:8], rtol=0, atol=1e-12)


@pytest.mark.parametrize(('c_in', 'c_out', 'side', 'n'), [
    (64, 128, 32, 7), (128, 256, 16, 48), (256, 512, 8, 512), (512, 512, 4, 1), (512, 512, 4, 512)])
def test_every_layer_agrees_with_direct_convolution(c_in, c_out, side, n):
    """In one chunk, in several, and with a last one that is smaller."""
    few = [*range(n)] if n < 48 else [0, 1, n - 2, n - 1]  # the others are black: float64 takes its time
    some, weight, some_grads = examples(c_in, c_out, side, len(few))
    x, grad = (torch.zeros(n, side, side, c).permute(0, 3, 1, 2) for c in (c_in, c_out))
    x[few], grad[few] = some, some_grads
    true = convolve(direct, some.double(), weight.double(), some_grads.double())
    out, grad_x, grad_weight = convolve(Winograd.apply, x, weight, grad)
    for found, expected in zip((out[few], grad_x[few], grad_weight), true, strict=True):
        assert error(found, expected) < TOLERANCE
    assert n < 48 or not (out[2:-2].any() or grad_x[2:-2].any())


def test_a_layer_used_twice_gets_both_gradients():
    x, _, grad = examples(64, 64, 16, 5)
    conv = layer()
    conv(conv(x)).backward(grad)
    weight = conv.weight.detach().double().requires_grad_()
    direct(direct(x.double(), weight), weight).backward(grad.double())
    assert error(conv.weight.grad, weight.grad) < TOLERANCE


@pytest.mark.parametrize('size', [(4, 4), (4, 8)])
def test_gradients_of_small_double_maps_are_right(size):
    torch.manual_seed(0)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Winograd.apply, (x, weight))


def test_memory_formats_make_no_difference():
    x, weight, grad = examples(64, 64, 16, 5)
    expected = convolve(Winograd.apply, x, weight, grad)
    last = [o.to(memory_format=torch.channels_last) for o in (x, weight, grad)]
    turned = [o.transpose(2, 3).contiguous().transpose(2, 3) for o in (x, weight, grad)]
    for other in (last, turned): assert all(map(torch.equal, convolve(Winograd.apply, *other), expected))
    summed = convolve(Winograd.apply, x, weight, torch.ones(1, 1, 1, 1).expand_as(grad))  # as `sum` sends it
    assert all(map(torch.equal, summed, convolve(Winograd.apply, x, weight, torch.ones_like(grad))))


def test_a_second_derivative_is_refused():
    x, weight, _ = examples(4, 4, 8, 1)
    x.requires_grad_()
    grad, = torch.autograd.grad(Winograd.apply(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): grad.sum().backward()


def test_evaluation_and_threads_change_no_bit():
    x, _, grad = examples(64, 64, 16, 6)
    conv, threads = layer(), torch.get_num_threads()
    expected = convolve(Winograd.apply, x, conv.weight, grad)
    with torch.inference_mode(): out = conv(x)
    assert torch.equal(out, expected[0])
    assert out.is_contiguous(memory_format=torch.channels_last)
    try:
        for t in (1, 2):
            torch.set_num_threads(t)
            assert all(map(torch.equal, convolve(Winograd.apply, x, conv.weight, grad), expected))
    finally: torch.set_num_threads(threads)


def test_what_it_is_not_made_for_is_convolved_directly(monkeypatch):
    conv = layer()
    plain = copy.deepcopy(conv)
    plain.__class__ = nn.Conv2d
    x = torch.randn(64, 64, 8, 8)
    assert error(conv(x), plain(x)) < TOLERANCE
    monkeypatch.setattr(Winograd, 'apply', None)
    with pytest.raises(TypeError): conv(x)
    for other in (x[:1], x[:0], x[..., :6], x[:, :, :7], x[0]):
        assert torch.equal(conv(other), plain(other))
    with torch.autocast('cpu', torch.bfloat16): assert conv(x).dtype == torch.bfloat16
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'high')
    assert torch.equal(conv(x), plain(x))
    monkeypatch.undo()
    assert torch.equal(conv.double()(x.double()), plain.double()(x.double()))
    assert conv.to('meta')(x.to('meta')).shape == x.shape


def test_convolutions_of_another_kind_do_not_fit():
    def fits(m) -> bool: return faster_class(m, mixed=False) is WinogradConv2d
    assert [fits(m) for m in ResNet(width=64).modules() if isinstance(m, nn.Conv2d)] == [False] + 7 * [True]
    def conv(c: int = 64, size: int = 3, **kwargs) -> nn.Conv2d: return nn.Conv2d(c, 64, size, **kwargs)
    fitting = dict(padding=1, bias=False)
    assert fits(conv(**fitting))
    for other in (conv(padding=1), conv(bias=False), conv(32, **fitting), conv(size=5, **fitting), nn.Linear(64, 64),
                  conv(**fitting, stride=2), conv(**fitting, groups=2), conv(**fitting, dilation=2),
                  conv(**fitting, padding_mode='reflect'), nn.Conv1d(64, 64, 3, padding=1, bias=False)):
        assert not fits(other), other


def test_real_images_are_learned_as_by_direct_convolution(sample):
    dls = get_dls(sample, bs=32, every=100, item_tfms=[], device='cpu')
    x, y = (o.as_subclass(Tensor) for o in dls.train.one_batch())

    def losses(winograd: bool) -> list[float]:
        torch.manual_seed(0)
        model = ResNet(width=32).to(memory_format=torch.channels_last)  # five of its convolutions have enough channels
        for m in model.modules():
            if winograd: m.__class__ = faster_class(m, mixed=False)
        opt, found = torch.optim.Adam(model.parameters(), 3e-4), []
        for _ in range(4):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            found.append(loss.item())
        return found
    expected, found = losses(False), losses(True)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=.01)  # as closely as two memory layouts of direct convolution
    assert found[-1] < .5 * found[0]
