"""torch tensors to the C++ library and back by DLPack: memory is shared, no stream is waited for."""

from typing import Optional

import torch
from torch.utils import dlpack

from . import _cpp
from .errors import EpInvalidArgument

_D = _cpp.DType
# float8 and bool cross as bytes: DLPack has no code for them that every version of torch knows.
_DTYPES = {
    torch.bfloat16: _D.bf16,
    torch.float8_e4m3fn: _D.e4m3,
    torch.float32: _D.f32,
    torch.int32: _D.i32,
    torch.int64: _D.i64,
    torch.uint8: _D.u8,
    torch.bool: _D.u8,
}
_AS_BYTES = (torch.float8_e4m3fn, torch.bool)


def dtype_to_cpp(dtype: torch.dtype, what: str) -> _cpp.DType:
    """The library's type for a torch type; `what` begins the error message."""
    found = _DTYPES.get(dtype)
    if found is None:
        names = ", ".join(_short(known) for known in _DTYPES)
        raise EpInvalidArgument(f"{what}: its dtype must be one of {names}")
    return found


def to_cpp(name: str, tensor: torch.Tensor) -> _cpp.Tensor:
    """A view of `tensor` that keeps its memory alive."""
    if not isinstance(tensor, torch.Tensor):
        raise EpInvalidArgument(f"{name} is a {type(tensor).__name__}: it must be a torch.Tensor")
    what = f"{name} is {_short(tensor.dtype)}{list(tensor.shape)}"
    dtype = dtype_to_cpp(tensor.dtype, what)
    if tensor.device.type not in ("cpu", "cuda"):
        raise EpInvalidArgument(f"{what} on {tensor.device}: it must be on cpu or cuda")
    plain = tensor.detach()
    if tensor.dtype in _AS_BYTES:
        plain = plain.view(torch.uint8)
    # Not Tensor.__dlpack__(): without a stream it makes CUDA's default stream wait.
    return _cpp.Tensor(dlpack.to_dlpack(plain), dtype)


def to_torch(tensor: _cpp.Tensor, dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """A torch tensor that owns a share of the memory. `dtype` says what bytes mean (bool)."""
    result = dlpack.from_dlpack(tensor.to_dlpack())
    if tensor.dtype == _D.e4m3:
        return result.view(torch.float8_e4m3fn)
    return result if dtype is None else result.view(dtype)


def to_torch_if_any(tensor: _cpp.Tensor) -> Optional[torch.Tensor]:
    """As above; None for an absent tensor."""
    return to_torch(tensor) if tensor else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
