"""Shared by all tests: seeds, the `gpu` marker, and the devices that the tests of the operators run on."""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "kda",
    deadline=None,  # the first call of an operator is slow, and so is a shared machine
    derandomize=True,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("kda")

# One thread, here and in processes that tests start: the tensors are small, and where other work shares the cores,
# OpenMP threads that wait for each other make a test ten times slower. A test of speed asks for more itself.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

HOPPER = (9, 0)


@functools.cache
def reason_without_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != HOPPER:
        return f"the kernels need a Hopper GPU, found {torch.cuda.get_device_name()}"
    import kda_cuda

    if not kda_cuda.build_info()["cuda_kernels"]:
        return "this build of kda_cuda has no CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := reason_without_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the operators run on: the composite implementation on the CPU, the kernels on a GPU."""
    return request.param
