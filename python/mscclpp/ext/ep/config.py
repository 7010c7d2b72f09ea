"""Tuning of the calls, with deep_ep's names."""

from typing import Tuple

from ._cpp import Config

__all__ = ["Config", "dispatch_config", "combine_config"]

# Chunk sizes by number of ranks, as deep_ep recommends them:
# (ranks up to, NVLink send, NVLink receive, RDMA send, RDMA receive).
# They size the buffer hints; the kernels of this library write rows in place and have no chunks.
_DISPATCH_CHUNKS = (
    (2, 24, 256, 6, 128),
    (8, 6, 256, 6, 128),
    (16, 36, 288, 20, 128),
    (64, 32, 288, 8, 128),
    (96, 20, 480, 12, 128),
    (128, 20, 560, 12, 128),
    (144, 32, 720, 12, 128),
    (160, 28, 720, 12, 128),
)
_COMBINE_CHUNKS = (
    (2, 10, 256, 6, 128),
    (4, 9, 256, 6, 128),
    (8, 4, 256, 6, 128),
    (16, 4, 288, 12, 128),
    (64, 1, 288, 8, 128),
    (96, 1, 480, 8, 128),
    (128, 1, 560, 8, 128),
    (160, 2, 720, 8, 128),
)


def _pick(table: Tuple[Tuple[int, ...], ...], num_sms: int, num_ranks: int) -> Config:
    for up_to, *chunks in table:
        if num_ranks <= up_to:
            return Config(num_sms, *chunks)
    return Config(num_sms, *table[-1][1:])


def dispatch_config(num_sms: int, num_ranks: int) -> Config:
    """The recommended Config of dispatch for any number of ranks."""
    return _pick(_DISPATCH_CHUNKS, num_sms, num_ranks)


def combine_config(num_sms: int, num_ranks: int) -> Config:
    """The recommended Config of combine for any number of ranks."""
    return _pick(_COMBINE_CHUNKS, num_sms, num_ranks)
