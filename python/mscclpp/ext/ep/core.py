"""What the parts of Buffer share."""

import weakref
from typing import Optional

from . import _cpp
from .calls import InFlight, Inputs
from .errors import EpInvalidState
from .event import EventOverlap
from .place import Place


class Core:
    """The C++ Buffer, where its tensors live, and what is under way."""

    runtime: Optional[_cpp.Buffer]
    rank: int
    group_size: int
    num_rdma_bytes: int
    low_latency_mode: bool
    _place: Place
    _in_flight: InFlight

    def _alive(self) -> _cpp.Buffer:
        if self.runtime is None:
            raise EpInvalidState("the Buffer was destroyed: make a new one to dispatch or combine")
        self._in_flight.retire()
        return self.runtime

    def _finish(self, native: _cpp.Event, async_finish: bool, inputs: Inputs) -> EventOverlap:
        """The event to return. Until the current stream has reached it somebody must hold the
        inputs; for a synchronous call the order of the stream sees to that."""
        if async_finish:
            return self._in_flight.overlap(native, inputs, weakref.ref(self))
        if not self._place.is_cuda:  # everything is done: say at once what went wrong
            self._alive().check_health()
        return EventOverlap()
