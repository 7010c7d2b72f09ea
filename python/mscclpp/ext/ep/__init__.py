"""Expert-parallel dispatch and combine with deep_ep's interface, on CUDA and on CPU tensors.

docs/python.md of the project explains it.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "mscclpp.ext.ep works on torch tensors: pip install torch"
    ) from _error

from .buffer import Buffer
from .config import Config
from .errors import (
    EpCudaError,
    EpError,
    EpInvalidArgument,
    EpInvalidState,
    EpOutOfMemory,
    EpPeerFailure,
    EpSystemError,
    EpTimeout,
    EpUnsupported,
)
from .event import EventHandle, EventOverlap
from .handle import DispatchHandle
from .low_latency_parts import LowLatencyHandle

#: The type of expert indices.
topk_idx_t = _torch.int64

__all__ = [
    "Buffer",
    "Config",
    "DispatchHandle",
    "EpCudaError",
    "EpError",
    "EpInvalidArgument",
    "EpInvalidState",
    "EpOutOfMemory",
    "EpPeerFailure",
    "EpSystemError",
    "EpTimeout",
    "EpUnsupported",
    "EventHandle",
    "EventOverlap",
    "LowLatencyHandle",
    "topk_idx_t",
]
