"""What all calls of a Buffer share: inputs, their place in the caller's stream, their lifetime."""

import collections
import weakref
from typing import Any, Callable, Deque, List, Optional, Tuple

import torch

from . import _cpp
from .errors import EpInvalidArgument
from .event import EventHandle, EventOverlap
from .place import Place, capturing
from .tensors import to_cpp


class Inputs:
    """The tensors of one call, in the library's form; holding them holds their memory."""

    def __init__(self) -> None:
        self.tensors: List[_cpp.Tensor] = []

    def add(self, name: str, tensor: torch.Tensor) -> _cpp.Tensor:
        self.tensors.append(to_cpp(name, tensor))
        return self.tensors[-1]


def pair(x: Any) -> Tuple[Any, Any]:
    """A tensor or a pair of them, as a pair."""
    if not isinstance(x, (tuple, list)):
        return x, None
    if len(x) != 2:
        raise EpInvalidArgument(f"a tuple of {len(x)} was passed: one tensor or a pair is allowed")
    return x[0], x[1]


def set_routing(
    request: _cpp.DispatchRequest, inputs: Inputs, **tensors: Optional[torch.Tensor]
) -> None:
    """The routing arguments of a dispatch, as far as they are given."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(request, name, inputs.add(name, tensor))


def stream_order(
    place: Place, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool
) -> _cpp.StreamOrder:
    """Where a call fits among the caller's work. `previous_event`: EventOverlap, EventHandle, None."""
    event = getattr(previous_event, "event", previous_event)
    native = _cpp.Event()
    if isinstance(event, EventHandle):
        if event._place.platform == place.platform:
            native = event._native
        else:  # captured on the other platform: no stream here can wait for it
            event.synchronize()
    elif event is not None:
        raise EpInvalidArgument(
            f"previous_event is a {type(previous_event).__name__}: it must be an EventOverlap"
        )
    return _cpp.StreamOrder(
        place.compute_stream(), native, bool(async_finish), bool(allocate_on_comm_stream)
    )


class InFlight:
    """Holds the inputs of asynchronous calls until the communication has read them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._pending: Deque[Tuple[_cpp.Event, List[_cpp.Tensor]]] = collections.deque()
        self._captured: List[List[_cpp.Tensor]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def hold(self, event: _cpp.Event, inputs: Inputs) -> Callable[[int], None]:
        """Returns what to call when a stream has been made to wait for `event`."""
        held, made_on = inputs.tensors, self._place.compute_stream()
        if capturing(self._place):
            self._captured.append(held)  # a replay reads them again

            return lambda stream: None
        self._pending.append((event, held))

        def waited(stream: int) -> None:
            if stream == made_on:
                held.clear()  # whoever gets the memory next comes after the communication

        return waited

    def overlap(
        self, event: _cpp.Event, inputs: Inputs, owner: "weakref.ref[Any]"
    ) -> EventOverlap:
        """What an asynchronous call returns. `owner`: the Buffer; on the CPU, where a wait means that
        everything is done, it is asked then what went wrong."""
        waited = self.hold(event, inputs)

        def on_wait(stream: int) -> None:
            waited(stream)
            buffer = owner()
            if buffer is not None and buffer.runtime is not None and not self._place.is_cuda:
                buffer.runtime.check_health()

        return EventOverlap(EventHandle._of(event, self._place, on_wait))

    def retire(self) -> None:
        """Lets go of what is done. Does not block."""
        if not capturing(self._place):
            while self._pending and self._pending[0][0].query():
                self._pending.popleft()

    def clear(self) -> None:
        """For the end, when everything is done."""
        self._pending.clear()
        self._captured.clear()
