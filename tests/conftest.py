"""What all tests share: one thread, warnings as errors where they are this package's own, and small real data."""

import gc
import os
import sys

import pytest
import torch
from loopback_hub.clients import hub, waits, xet_hub  # noqa: F401
from torch import nn

torch.set_num_threads(1)


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, and of the workers of pytest
    # A warning of this package that a test does not expect is a failure; those of other packages are not ours to judge.
    config.addinivalue_line("filterwarnings", "error::timm_lowrank.ProjectionWarning")
    config.addinivalue_line("filterwarnings", "error::UserWarning:timm_lowrank")
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning:timm_lowrank")


_imported = 0  # modules, when those that were there were last frozen


def pytest_collection_finish(session):
    freeze_what_was_imported()


def pytest_runtest_setup(item):
    if len(sys.modules) > _imported + 100:
        freeze_what_was_imported()


def freeze_what_was_imported():
    """accelerate collects garbage after each run; most of what it would look at are the modules that were imported."""
    global _imported
    gc.collect()
    gc.freeze()
    _imported = len(sys.modules)


@pytest.fixture(autouse=True)
def global_state_is_left_alone():
    """Tests may seed torch's global generator; the library may not draw from it, and `random_stream` proves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def random_stream():
    """A function that says whether the global random stream of torch is where it was when the test began."""
    before = torch.get_rng_state()
    return lambda: torch.equal(before, torch.get_rng_state())


@pytest.fixture
def fresh_accelerate():
    """accelerate holds one precision per process; a test that asks for this starts without one."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()


@pytest.fixture(scope="session")
def digits():
    """1,797 real images of handwritten digits, (1797, 1, 8, 8) float32 in [0, 1], and their labels (1797,)."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished run with its plain twin, as `publishable.make_run` leaves it, to be copied."""
    from publishable import make_run

    folder = tmp_path_factory.mktemp("finished") / "run"
    with torch.random.fork_rng(devices=[]):
        make_run(folder)
    return folder


class SmallNet(nn.Module):
    """A network that is not timm's: two convolutions, a hidden layer of 32 features, a classifier."""

    def __init__(self, classes=10, channels=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(32, 32)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(32, classes)

    def forward(self, images):
        return self.classifier(self.act(self.hidden(self.body(self.stem(images)).flatten(1))))


@pytest.fixture
def small_net():
    """The class of a small convolutional network for 8 x 8 images."""
    return SmallNet
