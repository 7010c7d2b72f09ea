"""How the ranks of a group find each other: the group is used once, to pass on an address."""

from typing import Any, List, Optional, Tuple

import torch.distributed as dist

from . import _cpp
from .errors import EpError, EpInvalidArgument
from .place import Place


def join(
    group: Any, comm: Any, bootstrap: Optional[_cpp.Bootstrap], place: Place, timeout: float
) -> _cpp.Bootstrap:
    """The group of ranks as the C++ library needs it. Collective.

    Rank 0 opens a socket, the group carries its address and a secret to the others, and TCP does the
    rest; torch.distributed and MPI are not used again.
    """
    if bootstrap is not None:
        return bootstrap
    rank, size = rank_and_size(group, comm)
    mine = {"platform": place.device.type, "unique_id": None, "error": None}
    if rank == 0:
        try:
            mine["unique_id"] = _cpp.create_unique_id()
        except EpError as error:  # the others must hear of it
            mine["error"] = str(error)
    everyone = _all_gather(group, comm, size, mine)
    if everyone[0]["error"] is not None:
        raise EpError(f"rank 0 cannot listen for the others: {everyone[0]['error']}")
    for other, info in enumerate(everyone):
        if info["platform"] != everyone[0]["platform"]:
            raise EpInvalidArgument(
                f"the Buffer is on {everyone[0]['platform']} on rank 0 and on {info['platform']} on "
                f"rank {other}: pass the same device type, or set MSCCLPP_EP_PLATFORM on all ranks"
            )
    return _cpp.tcp_bootstrap(rank, size, everyone[0]["unique_id"], timeout)


def rank_and_size(group: Any, comm: Any) -> Tuple[int, int]:
    if group is not None:
        return group.rank(), group.size()
    if comm is not None:
        return comm.Get_rank(), comm.Get_size()
    raise EpInvalidArgument(
        "a Buffer needs one of group (torch.distributed), comm (mpi4py) or bootstrap"
    )


def _all_gather(group: Any, comm: Any, size: int, mine: Any) -> Any:
    if group is None:
        return comm.allgather(mine)
    everyone: List[Any] = [None] * size
    dist.all_gather_object(everyone, mine, group)
    return everyone
