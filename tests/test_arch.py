import pytest
import torch
from torch.nn import functional as F

from arch import ResNet


@pytest.fixture(scope='module', autouse=True)
def whole_width():
    """In this file the network has the width of the assignment by default, as outside of tests."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ResNet, '__init__', vars(ResNet)['__init__'].func)
        yield


@pytest.fixture(scope='module')
def net(whole_width):
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    net = ResNet()
    for _ in range(3): net(torch.randn(8, 3, 32, 32) * 2 + 1)
    return net


def as_in_the_assignment(w: dict, x: torch.Tensor) -> torch.Tensor:
    """The assignment's list, stage by stage, with the weights of `ResNet` in their order: x to logits."""
    w = [v for k, v in w.items() if 'num_batches' not in k]  # conv, then BN's weight, bias, mean, variance, nine times

    def stage(x, pool=False):
        conv, gamma, beta, mean, var = (w.pop(0) for _ in range(5))
        x = F.conv2d(x, conv, stride=1, padding=1)
        if pool: x = F.max_pool2d(x, 2)
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, training=False))

    x = stage(x)
    x = stage(x, pool=True)
    x = x + stage(stage(x))
    x = stage(x, pool=True)
    x = stage(x, pool=True)
    x = x + stage(stage(x))
    x = F.linear(F.max_pool2d(x, 4).flatten(1), w.pop(0), w.pop(0))
    assert not w
    return x


def test_same_weights_give_the_output_of_the_written_list(net):
    assert sum(p.numel() for p in net.parameters()) == 6_573_130
    net.eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), as_in_the_assignment(net.state_dict(), x).log_softmax(1))


def test_layers_are_named_and_shaped_as_in_the_assignment(net):
    shapes, x = {}, torch.randn(2, 3, 32, 32)
    for name, m in net.named_children():
        if name == 'fc': x = x.flatten(1)
        x = m(x)
        shapes[name] = (*x.shape,)
    assert [*shapes.items()] == [
        ('prep', (2, 64, 32, 32)), ('layer1', (2, 128, 16, 16)), ('layer2', (2, 256, 8, 8)),
        ('layer3', (2, 512, 4, 4)), ('pool', (2, 512, 1, 1)), ('fc', (2, 10)), ('softmax', (2, 10))]
    assert ResNet(c_in=1, n_out=7)(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize('autocast', [False, True])
def test_cross_entropy_on_the_output_is_that_on_the_logits(net, autocast):
    logits, y = [], torch.arange(16) % 10
    hook = net.fc.register_forward_hook(lambda _, __, out: logits.append(out.float()))
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast): out = net.eval()(torch.randn(16, 3, 32, 32) * 3)
    hook.remove()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.exp().sum(1), torch.ones(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(F.cross_entropy(out, y), F.cross_entropy(logits[0], y))
    grads = [torch.autograd.grad(F.cross_entropy(f(z), y), z)[0] for f in (lambda z: z, net.softmax)
             for z in [logits[0].detach().requires_grad_()]]
    torch.testing.assert_close(*grads)
