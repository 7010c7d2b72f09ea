"""The constructor's arguments of a Buffer, checked and in the library's form."""

from typing import Optional

from . import _cpp
from .errors import EpInvalidArgument
from .place import Place


def buffer_options(
    place: Place,
    num_nvl_bytes: int,
    num_rdma_bytes: int,
    staging_bytes: int,
    max_experts_per_rank: int,
    timeout: Optional[float],
) -> _cpp.BufferOptions:
    """`timeout`: seconds, None = MSCCLPP_EP_TIMEOUT."""
    if timeout is not None and timeout < 0:
        raise EpInvalidArgument(f"timeout = {timeout}: it must be 0 (no limit) or more seconds")
    options = _cpp.BufferOptions()
    options.platform, options.device_index = place.platform, place.index
    options.num_nvl_bytes = _whole("num_nvl_bytes", num_nvl_bytes)
    options.num_rdma_bytes = _whole("num_rdma_bytes", num_rdma_bytes)
    options.staging_bytes = _whole("staging_bytes", staging_bytes)
    options.max_experts_per_rank = max_experts_per_rank
    options.timeout_seconds = -1.0 if timeout is None else float(timeout)
    return options


def _whole(name: str, value: int) -> int:
    if value != int(value) or value < 0:
        raise EpInvalidArgument(f"{name} = {value}: it must be a whole number of bytes, 0 or more")
    return int(value)
