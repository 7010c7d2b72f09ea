"""Where a Buffer's tensors live, and the caller's stream there."""

import functools
from typing import Optional, Union

import torch

from . import _cpp
from .errors import EpInvalidArgument, EpUnsupported

DeviceLike = Union[torch.device, str, int, None]


class Place:
    """One device of one platform."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.platform = _cpp.Platform.cuda if device.type == "cuda" else _cpp.Platform.cpu
        self.index = device.index or 0
        self.cpp = _cpp.Device.open(self.platform, self.index)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def compute_stream(self) -> int:
        """The caller's stream as an integer: the current cudaStream_t, or 0 (the host) on the CPU."""
        return torch.cuda.current_stream(self.device).cuda_stream if self.is_cuda else 0


@functools.lru_cache(maxsize=None)
def place_of(kind: str, index: int) -> Place:
    return Place(torch.device(kind, index) if kind == "cuda" else torch.device("cpu"))


@functools.lru_cache(maxsize=None)
def cuda_is_usable() -> bool:
    """Whether this build has CUDA kernels and both torch and the library see a GPU."""
    return (
        _cpp.has_cuda() and torch.cuda.is_available() and _cpp.Device.count(_cpp.Platform.cuda) > 0
    )


def choose_place(device: DeviceLike) -> Place:
    """The argument wins, then MSCCLPP_EP_PLATFORM, then CUDA if it is usable, then the CPU.

    The group's backend does not count: serving engines pass a gloo group with CUDA tensors.
    """
    if device is None:
        wanted = _cpp.env_platform()
        if wanted is None:
            wanted = _cpp.Platform.cuda if cuda_is_usable() else _cpp.Platform.cpu
        device = "cuda" if wanted == _cpp.Platform.cuda else "cpu"
    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if chosen.type == "cpu":
        return place_of("cpu", 0)
    if chosen.type != "cuda":
        raise EpInvalidArgument(f"device = {chosen}: allowed are cpu and cuda")
    if not _cpp.has_cuda():
        raise EpUnsupported(
            f"device = {chosen}, but this build has no CUDA kernels: build with nvcc, or pass "
            'device="cpu"'
        )
    if not cuda_is_usable():
        raise EpUnsupported(f'device = {chosen}, but no GPU is usable here: pass device="cpu"')
    return place_of("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


def current_place() -> Place:
    """Where the caller computes now, for events that are captured without a Buffer."""
    if torch.cuda.is_initialized() and cuda_is_usable():
        return place_of("cuda", torch.cuda.current_device())
    return place_of("cpu", 0)


def capturing(place: Optional[Place]) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return place is not None and place.is_cuda and torch.cuda.is_current_stream_capturing()
