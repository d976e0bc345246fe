"""The network that the tests of the attacks attack, trained once, and what is put around it to mask it."""

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
