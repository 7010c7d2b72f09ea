"""deep_ep's calls that do not exist here yet: named, so that callers get a clear answer."""

from typing import Any, Optional

import torch

from .errors import EpUnsupported


class NotYet:
    """Every method raises EpUnsupported, which is a NotImplementedError."""

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        raise _no_low_latency("get_low_latency_rdma_size_hint")

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Optional[torch.Size] = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        raise EpUnsupported(
            "get_local_buffer_tensor: the buffer holds flags and other tensors and is not open to "
            "callers; empty_in_pool() gives peer-mapped memory"
        )

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_dispatch: dispatch between nodes does not exist yet")

    def internode_combine(self, *args: Any, **kwargs: Any) -> Any:
        raise EpUnsupported("internode_combine: combine between nodes does not exist yet")

    def low_latency_dispatch(self, *args: Any, **kwargs: Any) -> Any:
        raise _no_low_latency("low_latency_dispatch")

    def low_latency_combine(self, *args: Any, **kwargs: Any) -> Any:
        raise _no_low_latency("low_latency_combine")

    def clean_low_latency_buffer(self, *args: Any, **kwargs: Any) -> None:
        raise _no_low_latency("clean_low_latency_buffer")


def _no_low_latency(name: str) -> EpUnsupported:
    return EpUnsupported(f"{name}: low-latency kernels do not exist yet")
