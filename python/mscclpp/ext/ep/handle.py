"""What a dispatch leaves for the combine and the cached dispatches that follow it."""

import torch

from . import _cpp
from .errors import EpInvalidArgument
from .tensors import to_torch


class DispatchHandle:
    """A routing. Belongs to the Buffer that made it; opaque to deep_ep's callers.

    Attributes:
        num_tokens: tokens that this rank sent.
        num_recv_tokens: rows that this rank received (num_worst_tokens in that mode).
        recv_tokens_per_expert: `[local experts]` int32 on the device: rows for each expert of this
            rank, not rounded up to expert_alignment. Known without any host synchronisation.
    """

    def __init__(self, native: _cpp.DispatchHandle, recv_tokens_per_expert: torch.Tensor) -> None:
        self._native = native
        self.recv_tokens_per_expert: torch.Tensor = recv_tokens_per_expert

    @property
    def num_tokens(self) -> int:
        return self._native.num_tokens

    @property
    def num_recv_tokens(self) -> int:
        return self._native.num_recv_tokens

    @property
    def recv_source_tokens(self) -> torch.Tensor:
        """`[num_recv_tokens]` int32: each row's index at the rank that sent it."""
        return to_torch(self._native.recv_source_tokens())

    @property
    def rank_offsets(self) -> torch.Tensor:
        """`[ranks + 1]` int32: the first row of every source rank, and their number."""
        return to_torch(self._native.rank_offsets())

    def __repr__(self) -> str:
        return f"DispatchHandle({self.num_tokens} tokens sent, {self.num_recv_tokens} received)"


def native_handle(handle: object) -> _cpp.DispatchHandle:
    """The C++ handle, or an error that says what was passed instead."""
    if not isinstance(handle, DispatchHandle):
        raise EpInvalidArgument(
            f"handle is a {type(handle).__name__}: pass what dispatch() of this Buffer returned"
        )
    return handle._native
