import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from arch import ResNet
from lab.gradcam import grad_cam

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.manual_seed(0))
TARGETS = torch.tensor([[i, 9 - i] for i in range(5)])


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = ResNet()
    model(IMAGES)  # its batch norms have seen the images
    with torch.no_grad(): model.fc.weight += 0.05  # so that something speaks for every class
    return model


def test_maps_are_those_of_gradients_by_hand(model):
    cams = grad_cam(model, IMAGES, TARGETS, bs=2)
    assert (cams.shape, cams.dtype) == ((5, 2, 4, 4), torch.float32)
    for image, classes, pair in zip(IMAGES, TARGETS, cams, strict=True):
        maps = model.layer3(model.layer2(model.layer1(model.prep(image[None]))))
        logits = model.fc(maps.amax((2, 3)))[0]
        expected = torch.zeros(2, 4, 4)
        for c, cam in zip(classes, expected, strict=True):
            grads, = torch.autograd.grad(logits[c], maps, retain_graph=True)
            for k in range(64): cam += grads[0, k].mean() * maps[0, k].detach()
        torch.testing.assert_close(pair, expected.relu() / expected.max())


def test_the_model_stays_as_it_is_also_a_frozen_one(model):
    for p in model.parameters(): p.grad = torch.ones_like(p)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = grad_cam(model, IMAGES, TARGETS)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    with torch.no_grad(): assert grad_cam(model.requires_grad_(False), IMAGES, TARGETS).equal(expected)


def test_a_class_for_which_nothing_spoke_has_an_empty_map(model):
    with torch.no_grad(): model.fc.weight[:5] -= 1
    cams = grad_cam(model, IMAGES, TARGETS)
    assert (cams[:, 0] == 0).all()
    assert (cams[:, 1].amax((1, 2)) == 1).all()


def test_of_other_networks_it_takes_the_last_maps(model):
    assert grad_cam(resnet18(num_classes=10), IMAGES, TARGETS).shape == (5, 2, 2, 2)  # layer4 has one place only
    assert grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.Linear(64, 10)), IMAGES, TARGETS) is None
    assert grad_cam(model, IMAGES[:0], TARGETS[:0]).shape == (0, 2, 4, 4)
