"""The network that the tests of the attacks attack, trained once, and the attacks as a textbook would write them."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

_weights = {}


def trained(make_network, digits):
    """A small network that knows its digits, in eval mode; each call gives a new copy."""
    if not _weights:
        images, labels = digits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = make_network()
            optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
            for _ in range(150):
                rows = torch.randint(0, 1500, (128,))
                optimizer.zero_grad()
                cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
        _weights.update(network.state_dict())
    with torch.random.fork_rng(devices=[]):
        network = make_network()
    network.load_state_dict(_weights)
    return network.eval()


class Around(nn.Module):
    """Something done to the pixels before a network, or to its logits after it."""

    def __init__(self, network, before=lambda images: images, after=lambda logits: logits):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, images):
        return self.after(self.network(self.before(images)))


def quantised(images, levels=15):
    """Pixels without a gradient."""
    return (levels * images).round() / levels


def noisy(images):
    return images + 0.1 * torch.randn_like(images)


def right(model, images, labels):
    """Which images are classified as their label."""
    with torch.no_grad():
        return model(images).argmax(dim=1) == labels


def margin(logits, labels):
    """The label's logit minus the largest other one."""
    losses = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        losses.append(row[label] - max(row[j] for j in range(len(row)) if j != label))
    return torch.stack(losses)


def textbook_pgd(network, images, labels, *, eps, steps, step_size, norm="linf", loss="cross_entropy", choose=None):
    """float64 images after so many steps from the image, one image after the other; `network` is in float64.

    `choose`, of the logits (classes,), names a target to approach.
    """
    found = []
    for image, label in zip(images.double(), labels, strict=True):
        point = image.clone()
        for _ in range(steps):
            point.requires_grad_()
            logits = network(point[None])
            if choose is not None:
                value = -cross_entropy(logits, choose(logits.detach()[0])[None])
            elif loss == "margin":
                value = -margin(logits, label[None])[0]
            else:
                value = cross_entropy(logits, label[None])
            (gradient,) = torch.autograd.grad(value, point)
            if norm == "linf":
                change = point.detach() + step_size * gradient.sign() - image
                change = change.clamp(-eps, eps)
            else:
                change = point.detach() + step_size * gradient / gradient.norm() - image
                change = change * min(1, eps / change.norm())
            point = (image + change).clamp(0, 1)
        found.append(point.detach())
    return torch.stack(found)
