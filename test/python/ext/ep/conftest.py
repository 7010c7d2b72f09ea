"""Fixtures of the tests of mscclpp.ext.ep."""

import os

import pytest
from ranks import Launcher, Rank, ThreadComm


@pytest.fixture(scope="session")
def platform(request) -> str:
    return request.config.getoption("--platform")


@pytest.fixture(scope="session")
def _launcher(request, platform):
    launcher = Launcher(platform, request.config.getoption("--threads"))
    yield launcher
    launcher.close()


@pytest.fixture
def run_ranks(_launcher):
    """run_ranks(function, ranks, *args): results of all ranks. Skips where they cannot run."""

    def run(function, ranks, *args, **options):
        reason = _launcher.why_not(ranks)
        if reason is not None:
            pytest.skip(reason)
        return _launcher.run(function, ranks, *args, **options)

    return run


@pytest.fixture
def solo(platform):
    """The only rank of a group of one, in this process."""
    reason = Launcher(platform, False).why_not(1)
    if reason is not None:
        pytest.skip(reason)
    return Rank(0, 1, platform, comm=ThreadComm(1).of(0))


@pytest.fixture(autouse=True)
def _no_platform_from_outside(monkeypatch):
    if "MSCCLPP_EP_PLATFORM" in os.environ:
        monkeypatch.delenv("MSCCLPP_EP_PLATFORM")
