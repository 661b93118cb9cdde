"""Fixtures that every test file shares: the device as a parameter, and compiled kernels in one place for the run."""

import os

# What torch.compile kept of an earlier version's backward passes, under keys that know only operators' names.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import hypothesis
import pytest
import torch

from rawkern.autograd import operator
from rawkern.launchers import repeat

torch.manual_seed(0)
# The same examples in every run, so that what fails anywhere fails everywhere; HYPOTHESIS_PROFILE=explore draws others.
hypothesis.settings.register_profile("repeat", derandomize=True)
hypothesis.settings.register_profile("explore")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


def _has_gpu():
    return torch.cuda.is_available() and os.environ.get("RAWKERN_TEST_DEVICE", "cuda") == "cuda"


DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.skipif(not _has_gpu(), reason="no GPU here")),
]


@pytest.fixture(params=DEVICES)
def device(request):
    """The device under test: the emulator everywhere, and the GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    """torch's convolutions multiply float32 as float32, and so do ours; tests of TF32 ask for it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _decided_anew():
    """No test repeats launches that another test decided on: tests change what is decided by."""
    operator.forget_plans()
    repeat.forget_plans()
