"""What the low-latency calls are made of: handle, outputs, hook, buffers for zero_copy."""

import weakref
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from . import _cpp
from .calls import InFlight, Inputs
from .errors import EpInvalidArgument, EpInvalidState, EpUnsupported
from .place import Place

Result = Union[_cpp.LowLatencyDispatchResult, _cpp.LowLatencyCombineResult]


class LowLatencyHandle(tuple):
    """Where a low-latency dispatch put its rows. Belongs to the Buffer that made it.

    deep_ep's tuple of five: source info `[local experts, ranks * max tokens]` int32, the token's
    index at the rank that sent the row; layout range `[local experts, ranks]` int64, the first row
    of every source rank `<< 32 |` their number; num_max_dispatch_tokens_per_rank; hidden;
    num_experts.
    """

    native: _cpp.LowLatencyHandle
    memory: List[_cpp.Tensor]  # what a combine reads beside the caller's tensors
    combine_buffer: Optional[torch.Tensor]  # of get_next_low_latency_combine_buffer
    combine_buffer_used: bool

    @classmethod
    def of(
        cls, deep_ep: Tuple[Any, ...], native: _cpp.LowLatencyHandle, memory: List[_cpp.Tensor]
    ) -> "LowLatencyHandle":
        self = cls(deep_ep)
        self.native, self.memory = native, memory
        self.combine_buffer, self.combine_buffer_used = None, False
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a LowLatencyHandle stands for memory of this process: it has no copies")


def low_latency_handle(handle: object) -> LowLatencyHandle:
    """The handle, or an error that says what was passed instead."""
    if not isinstance(handle, LowLatencyHandle):
        raise EpInvalidArgument(
            f"handle is a {type(handle).__name__}: pass what low_latency_dispatch() of this Buffer "
            "returned"
        )
    return handle


def refuse_set(call: str, why: str, **values: Any) -> None:
    """EpUnsupported for the first value that is neither None nor False."""
    for name, value in values.items():
        if value is not None and value is not False:
            shown = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
            raise EpUnsupported(f"{call}: {name} = {shown} is not supported: {why}")


def reduce_of(call: str, combine_reduce: str) -> _cpp.LowLatencyReduce:
    """Where a combine is reduced, or an error that names what is allowed."""
    known = {"rank": _cpp.LowLatencyReduce.rank, "source": _cpp.LowLatencyReduce.source}
    if not isinstance(combine_reduce, str) or combine_reduce not in known:
        raise EpInvalidArgument(
            f'{call}: combine_reduce = {combine_reduce!r} must be "rank" or "source"'
        )
    return known[combine_reduce]


def refuse_both(call: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise EpInvalidArgument(
            f"{call}: async_finish = True and return_recv_hook = True: the hook orders the receive "
            "half, set one of them"
        )


class DispatchOutputs:
    """The tensors that a dispatch writes. torch allocates them, so that a CUDA graph that is being
    captured gets them from its own pool."""

    def __init__(self, place: Place, inputs: Inputs) -> None:
        self.native = _cpp.LowLatencyDispatchOutputs()
        self.tensors: Dict[str, torch.Tensor] = {}
        self.handles_own: List[_cpp.Tensor] = []
        self._place, self._inputs = place, inputs

    def add(self, name: str, dtype: torch.dtype, *shape: int) -> _cpp.Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._place.device)
        self.tensors[name] = made
        native = self._inputs.add(name, made)
        setattr(self.native, name, native)
        return native

    def allocate(self, request: _cpp.LowLatencyDispatchRequest, ranks: int) -> None:
        hidden, topk = request.x.shape[1], request.topk_idx.shape[1]
        tokens = request.max_tokens
        local, rows = -(-request.experts // ranks), ranks * tokens
        if request.use_fp8:
            self.add("recv_x", torch.float8_e4m3fn, local, rows, hidden)
            blocks = -(-hidden // 128)
            if request.use_ue8m0:
                self.add("recv_x_scales", torch.int32, local, -(-blocks // 4), rows)
            else:
                self.add("recv_x_scales", torch.float32, local, blocks, rows)
        else:
            self.add("recv_x", torch.bfloat16, local, rows, hidden)
        self.add("recv_count", torch.int32, local)
        self.add("source_info", torch.int32, local, rows)
        self.add("layout_range", torch.int64, local, ranks)
        self.handles_own = [
            self.add("slots", torch.int32, ranks, tokens, topk),
            self.add("source_tokens", torch.int32, ranks),
            self.add("row_table", torch.int32, 2, ranks, tokens + 2),
        ]

    def received(self) -> Any:
        """recv_x; with FP8 beside its scales, transposed: rows are their contiguous dimension."""
        x, scales = self.tensors["recv_x"], self.tensors.get("recv_x_scales")
        return x if scales is None else (x, scales.transpose(1, 2))


def can_be_met(request: _cpp.LowLatencyDispatchRequest, ranks: int, region_bytes: int) -> bool:
    """False for requests that the library refuses and whose outputs may be senseless or huge: they
    are passed on without outputs, and its message says what is wrong."""
    x, topk_idx = request.x, request.topk_idx
    if len(x.shape) != 2 or len(topk_idx.shape) != 2:
        return False
    if request.max_tokens < 0 or not 1 <= request.experts < 1 << 16:
        return False
    row_bytes = x.shape[1] * (1 if request.use_fp8 else 2)
    return 4 * ranks * request.max_tokens * row_bytes <= region_bytes


class ReceiveHook:
    """The second half of a call with return_recv_hook. Callable once, without arguments: the
    current stream (of that moment) then waits for it. Until then it holds the call's tensors."""

    def __init__(
        self,
        owner: "weakref.ref[Any]",
        place: Place,
        in_flight: InFlight,
        result: Result,
        inputs: Inputs,
    ) -> None:
        self._owner, self._place, self._in_flight = owner, place, in_flight
        self._sent: Optional[Tuple[Result, Inputs]] = (result, inputs)
        self._made_on = place.compute_stream()

    def __call__(self) -> None:
        if self._sent is None:
            raise EpInvalidState("the hook was called before: it receives once")
        result, inputs = self._sent
        stream = self._place.compute_stream()
        result.receive(stream)
        self._sent = None
        if stream != self._made_on:  # the stream that the tensors belong to does not wait
            self._in_flight.hold(self._place.cpp.record(stream), inputs)
        buffer = self._owner()
        if buffer is not None and buffer.runtime is not None and not self._place.is_cuda:
            buffer.runtime.check_health()


class CombineBuffers:
    """What get_next_low_latency_combine_buffer hands out: per shape two tensors, used in turn."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._made: Dict[Tuple[int, ...], List[torch.Tensor]] = {}

    def of(self, handle: LowLatencyHandle, ranks: int) -> torch.Tensor:
        """The handle's, until a combine has read it; then the other one."""
        if handle.combine_buffer is None or handle.combine_buffer_used:
            local, tokens, hidden = handle[0].size(0), handle[2], handle[3]
            handle.combine_buffer = self._next((local, ranks * tokens, hidden))
            handle.combine_buffer_used = False
        return handle.combine_buffer

    def _next(self, shape: Tuple[int, ...]) -> torch.Tensor:
        pair = self._made.setdefault(shape, [])
        if len(pair) < 2:
            pair.append(torch.empty(shape, dtype=torch.bfloat16, device=self._place.device))
        else:
            pair.reverse()
        return pair[-1]

    def clear(self) -> None:
        self._made.clear()


def zero_copy_source(handle: LowLatencyHandle, x: torch.Tensor) -> torch.Tensor:
    """The tensor that a combine with zero_copy reads; `x` only has to look like it."""
    source = handle.combine_buffer
    if source is None:
        raise EpInvalidState(
            "zero_copy = True reads the tensor of get_next_low_latency_combine_buffer(handle), which "
            "was not called for this handle: call it and write the experts' output there"
        )
    if isinstance(x, torch.Tensor) and (x.shape != source.shape or x.dtype != source.dtype):
        raise EpInvalidArgument(
            f"x is {x.dtype}{list(x.shape)}: with zero_copy = True it must be as the buffer that is "
            f"read instead, {source.dtype}{list(source.shape)}"
        )
    return source
