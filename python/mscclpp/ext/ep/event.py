"""Events: where a call's communication stands relative to the caller's stream."""

from typing import Any, Callable, Optional, Tuple

import torch

from . import _cpp
from .place import Place, current_place

Done = Callable[[int], None]


class EventHandle:
    """A point in a stream's order.

    Made without arguments, it records the current stream: `torch.cuda.current_stream()` once CUDA
    is in use, else the host, whose events are always complete.
    """

    def __init__(self) -> None:
        self._place = current_place()
        self._native = _cpp.Event()
        self._on_wait: Optional[Done] = None
        if self._place.is_cuda:
            self._native = self._place.cpp.record(self._place.compute_stream())

    @classmethod
    def _of(cls, native: _cpp.Event, place: Place, on_wait: Done) -> "EventHandle":
        """For an event of a Buffer; `on_wait(stream)` runs after each current_stream_wait()."""
        self = cls.__new__(cls)
        self._native, self._place, self._on_wait = native, place, on_wait
        return self

    def current_stream_wait(self) -> None:
        """Work that is enqueued on the current stream after this call starts after the event. Does
        not block; on the CPU the current stream is the host, so there it does.

        Raises what the communication has reported by then, on the CPU.
        """
        stream = self._place.compute_stream()
        self._place.cpp.wait(stream, self._native)
        if self._on_wait is not None:
            self._on_wait(stream)

    def query(self) -> bool:
        """Whether the event is complete. Does not block."""
        return self._native.query()

    def synchronize(self) -> None:
        """Blocks the host until the event is complete."""
        self._native.synchronize()


class EventOverlap:
    """What calls take as `previous_event` and return: an event, or none.

    As a context manager it makes the current stream wait at the end of the block:
    ```python
    recv_x, _, _, _, _, event = buffer.dispatch(..., async_finish=True)
    with event:
        something_that_does_not_need(recv_x)
    ```

    Attributes:
        event: the EventHandle, or None.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: Optional[EventHandle] = None,
        extra_tensors: Optional[Tuple[torch.Tensor, ...]] = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """The current stream waits for the event; without an event there is nothing to wait for."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        self.current_stream_wait()
