"""Tensors in the memory that peers have mapped."""

from typing import Sequence

import torch

from .core import Core
from .tensors import dtype_to_cpp, to_cpp, to_torch


class PoolTensors(Core):
    """The part of Buffer that hands out its pool."""

    def empty_in_pool(
        self, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """An uninitialised tensor that peers read in place: let the experts write their output
        there, and combine needs no staging copy. Local, does not block.

        It belongs to the current stream. When the pool is full the tensor is ordinary memory, and
        combine stages its rows (in_pool() tells).
        """
        runtime = self._alive()
        cpp_dtype = dtype_to_cpp(dtype, f"dtype = {dtype}")
        extents = [int(extent) for extent in shape]
        made = runtime.create_tensor(cpp_dtype, extents, self._place.compute_stream())
        return to_torch(made, torch.bool if dtype == torch.bool else None)

    def in_pool(self, tensor: torch.Tensor) -> bool:
        """Whether peers can read this tensor in place."""
        return self._alive().in_pool(to_cpp("tensor", tensor))
