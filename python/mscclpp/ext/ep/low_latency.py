"""The low-latency calls of deep_ep's Buffer: for decoding, a few tokens per rank."""

import weakref
from typing import Any, Callable, Optional, Tuple, Union

import torch

from . import _cpp
from .calls import Inputs, stream_order
from .core import Core
from .errors import EpInvalidArgument, EpInvalidState, EpUnsupported
from .event import EventOverlap
from .low_latency_parts import (
    CombineBuffers,
    DispatchOutputs,
    LowLatencyHandle,
    ReceiveHook,
    Result,
    can_be_met,
    low_latency_handle,
    reduce_of,
    refuse_both,
    refuse_set,
    zero_copy_source,
)

Hook = Optional[Callable[[], None]]
Received = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


class LowLatencyCalls(Core):
    """The part of Buffer for decoding. Needs low_latency_mode and num_rdma_bytes.

    All ranks make the same calls with equal num_max_dispatch_tokens_per_rank, hidden, top-k, experts
    and formats; token counts may differ. With return_recv_hook the call only sends, and nothing runs
    on the device until the hook is called; two dispatches, and two combines, may be under way.
    """

    _combine_buffers: CombineBuffers

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        *,
        combine_reduce: str = "rank",
        num_topk: int = 32,
        spans_nodes: bool = False,
    ) -> int:
        """The num_rdma_bytes that calls of this size need, exactly. With combine_reduce = "rank" it
        grows with ranks times tokens, not with the experts. "source" needs room for num_topk rows
        per token and, where spans_nodes (some ranks are on another node), for min(num_topk, local
        experts) rows per token and rank. For calls of both kinds: the larger of both."""
        return _cpp.low_latency_size_hint(
            num_max_dispatch_tokens_per_rank,
            hidden,
            num_ranks,
            num_experts,
            reduce_of("get_low_latency_rdma_size_hint", combine_reduce),
            num_topk,
            spans_nodes,
        )

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        use_nvfp4: bool = False,
        x_global_scale: Optional[torch.Tensor] = None,
    ) -> Tuple[Received, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """Sends every token to each of its experts. Collective, does not block (on the CPU, only when
        async_finish is set). Can be captured into a CUDA graph.

        Arguments:
            x: `[num_tokens, hidden]` bfloat16, hidden a multiple of 8.
            topk_idx: `[num_tokens, num_topk]` int64; -1 = no selection. An expert that is named more
                than ranks * num_max_dispatch_tokens_per_rank times, which takes rows that name it
                several times, is an error.
            num_max_dispatch_tokens_per_rank: of any rank, up to 4096.
            num_experts: of all ranks together; rank r hosts those from r * ceil(experts / ranks) on.
            cumulative_local_expert_recv_stats: `[local experts]` int32: received rows are added.
            dispatch_wait_recv_cost_stats: `[num_ranks]` int64, or `[num_ranks, num_ranks]` of which
                this rank's row is used: nanoseconds spent waiting for each rank are added.
            use_fp8: rows arrive as float8_e4m3fn with a scale per 128 values, else as bfloat16.
            round_scale, use_ue8m0: scales are powers of two; they arrive as their exponents, four to
                an int32 (needs round_scale). Of no meaning without use_fp8, as in deep_ep.
            async_finish: the current stream does not wait; wait for the returned event. Inputs and
                outputs may be dropped at once.
            return_recv_hook: send only; the returned hook receives. Not with async_finish.
            use_nvfp4, x_global_scale: EpUnsupported when set.

        Returns:
            recv_x: `[local experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]`, of which
                each expert's first recv_count rows are defined, by source rank and token; with
                use_fp8 a pair with the scales, `[.., .., ceil(hidden / 128)]` float32 or
                `[.., .., ceil(hidden / 512)]` int32, whose last but one dimension is contiguous.
            recv_count: `[local experts]` int32.
            handle: for low_latency_combine; deep_ep's tuple of five.
            event: after the work; empty unless async_finish.
            hook: a callable without arguments, after which the then current stream has the outputs;
                None unless return_recv_hook. It holds the call's tensors until it is called.
        """
        call = "low_latency_dispatch"
        runtime = self._alive()
        why = "rows travel as bfloat16 or as float8_e4m3fn"
        refuse_set(call, why, use_nvfp4=use_nvfp4, x_global_scale=x_global_scale)
        refuse_both(call, async_finish, return_recv_hook)
        request, inputs = _cpp.LowLatencyDispatchRequest(), Inputs()
        request.x = inputs.add("x", x)
        request.topk_idx = inputs.add("topk_idx", topk_idx)
        request.max_tokens, request.experts = num_max_dispatch_tokens_per_rank, num_experts
        request.use_fp8 = bool(use_fp8)
        request.round_scale = bool(use_fp8 and round_scale)
        request.use_ue8m0 = bool(use_fp8 and use_ue8m0)
        request.return_recv_hook = bool(return_recv_hook)
        if cumulative_local_expert_recv_stats is not None:
            request.expert_totals = inputs.add(
                "cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats
            )
        if dispatch_wait_recv_cost_stats is not None:
            request.wait_totals = inputs.add(
                "dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats
            )
        outputs = DispatchOutputs(self._place, inputs)
        if can_be_met(request, self.group_size, self.num_rdma_bytes):
            outputs.allocate(request, self.group_size)
            request.outputs = outputs.native
        request.order = stream_order(self._place, None, async_finish, False)
        result = runtime.low_latency_dispatch(request)
        event, hook = self._finish_half(result, async_finish, return_recv_hook, inputs)
        made = outputs.tensors
        handle = LowLatencyHandle.of(
            (
                made["source_info"],
                made["layout_range"],
                num_max_dispatch_tokens_per_rank,
                x.size(1),
                num_experts,
            ),
            result.handle,
            outputs.handles_own,
        )
        return outputs.received(), made["recv_count"], handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[torch.Tensor] = None,
        combine_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        *,
        overlap: bool = False,
        packed_recv_count: Optional[torch.Tensor] = None,
        comp_signal: Optional[torch.Tensor] = None,
        block_m: int = 64,
        threshold: int = 0,
        num_sms: int = 0,
        src_signals: Optional[torch.Tensor] = None,
        src_signal_expect_value: int = 0,
        combine_reduce: str = "rank",
    ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        """Brings the experts' rows back and adds them up with their weights: in float32 on the
        experts' rank, rounded to bfloat16 for the way, and in float32 again; or all at home, see
        combine_reduce. Collective, does not block (on the CPU, only when async_finish is set). Can be
        captured into a CUDA graph.

        Arguments:
            x: `[local experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]` bfloat16: the
                experts' output, rows as in recv_x.
            topk_idx, topk_weights: `[num_tokens, num_topk]` int64, as dispatched, and float32.
            handle: what low_latency_dispatch returned.
            use_logfmt: the sums travel as 10-bit logarithmic values, 5/8 of bfloat16's bytes: each
                is off by at most 1/1020 of the octaves between the smallest and the largest of 56
                neighbours (typically 0.8 %, at most 1.6 %); magnitudes below 2^-16 of the largest
                become 0, and 56 with an infinity or NaN become NaN. Equal on all ranks.
            zero_copy: the experts' output is read from the tensor that
                get_next_low_latency_combine_buffer(handle) returned; x is only looked at.
            async_finish, return_recv_hook: see low_latency_dispatch. After the send half x may be
                written to.
            out: `[num_tokens, hidden]` bfloat16, written and returned.
            combine_wait_recv_cost_stats: as dispatch_wait_recv_cost_stats.
            num_sms: blocks at most; 0 = one per multiprocessor.
            combine_reduce: "rank", or "source": every selection's row is sent home and added there in
                float32, in the order of the selections, and rounded once; more bytes, nobody waits
                for weights. Equal on all ranks, may change from call to call; topk_weights must then
                stay as they are until the hook is called. The Buffer needs
                get_low_latency_rdma_size_hint(..., combine_reduce="source").
            overlap, comp_signal, src_signals: EpUnsupported when set; packed_recv_count, block_m,
                threshold and src_signal_expect_value mean nothing without them.

        Returns:
            combined_x: `[num_tokens, hidden]` bfloat16; 0 for a token without selections.
            event, hook: see low_latency_dispatch.
        """
        del packed_recv_count, block_m, threshold, src_signal_expect_value
        call = "low_latency_combine"
        runtime = self._alive()
        why = "combine starts when the experts' output is complete"
        signals = {"overlap": overlap, "comp_signal": comp_signal, "src_signals": src_signals}
        refuse_set(call, why, **signals)
        refuse_both(call, async_finish, return_recv_hook)
        own = low_latency_handle(handle)
        request, inputs = _cpp.LowLatencyCombineRequest(), Inputs()
        request.reduce = reduce_of(call, combine_reduce)
        request.x = inputs.add("x", zero_copy_source(own, x) if zero_copy else x)
        request.topk_idx = inputs.add("topk_idx", topk_idx)
        request.topk_weights = inputs.add("topk_weights", topk_weights)
        request.handle = own.native
        inputs.tensors.extend(own.memory)
        request.use_logfmt = bool(use_logfmt)
        request.return_recv_hook, request.num_sms = bool(return_recv_hook), num_sms
        if combine_wait_recv_cost_stats is not None:
            request.wait_totals = inputs.add(
                "combine_wait_recv_cost_stats", combine_wait_recv_cost_stats
            )
        if out is None:
            out = torch.empty(
                (topk_idx.size(0) if topk_idx.dim() else 0, own[3]),
                dtype=torch.bfloat16,
                device=self._place.device,
            )
        request.out = inputs.add("out", out)
        request.order = stream_order(self._place, None, async_finish, False)
        result = runtime.low_latency_combine(request)
        own.combine_buffer_used = own.combine_buffer_used or zero_copy
        return out, *self._finish_half(result, async_finish, return_recv_hook, inputs)

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """Where the experts may write their output for a combine with zero_copy:
        `[local experts, num_ranks * num_max_dispatch_tokens_per_rank, hidden]` bfloat16. Local.

        Two tensors per shape are used in turn; the next one comes when a combine of this handle has
        read this one. What an earlier combine of the same turn read is overwritten: that combine
        must have been waited for (without async_finish it always has).
        """
        self._alive()
        return self._combine_buffers.of(low_latency_handle(handle), self.group_size)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Checks that calls of this size fit. Local. There is nothing to clean: messages carry the
        number of their call, so what earlier calls (or other modes) left is never mistaken."""
        self._alive()
        if not self.low_latency_mode:
            raise EpInvalidState(
                "clean_low_latency_buffer: the Buffer was made without low_latency_mode"
            )
        needed = self.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, self.group_size, num_experts
        )
        if needed > self.num_rdma_bytes:
            raise EpInvalidArgument(
                f"clean_low_latency_buffer: {num_max_dispatch_tokens_per_rank} tokens of hidden "
                f"{hidden} on {self.group_size} ranks need num_rdma_bytes = {needed}, the Buffer has "
                f"{self.num_rdma_bytes}: make it with get_low_latency_rdma_size_hint()"
            )

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Optional[torch.Size] = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Callers have no part in the mapped memory. What deep_ep's users say to clean it,
        `get_local_buffer_tensor(dtype, use_rdma_buffer=True).zero_()`, works and does nothing: the
        tensor is empty, since cleaning is never needed. Anything else raises EpUnsupported."""
        self._alive()
        if use_rdma_buffer and self.low_latency_mode and size is None and offset == 0:
            return torch.empty(0, dtype=dtype, device=self._place.device)
        raise EpUnsupported(
            "get_local_buffer_tensor: the buffer holds flags and other tensors, is not open to "
            "callers and never needs cleaning; empty_in_pool() gives peer-mapped memory"
        )

    # ---- ranks to do without ---------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Low-latency calls do without a rank from now on (mask=True), or with it again: it must
        have made the same calls. Local, in the order of the calls. Needs enable_shrink."""
        self._alive().update_low_latency_mask(rank_to_mask, bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for every rank that is masked, by a call or because it was late, else 0.

        Arguments:
            mask_status: `[num_ranks]` int32.
        """
        runtime, inputs = self._alive(), Inputs()
        order = stream_order(self._place, None, False, False)
        runtime.query_low_latency_mask(inputs.add("mask_status", mask_status), order)

    def low_latency_clean_mask_buffer(self) -> None:
        """Masks no rank any more; see low_latency_update_mask_buffer."""
        self._alive().clean_low_latency_mask()

    # ---- inside ----------------------------------------------------------------------------

    def _finish_half(
        self, result: Result, async_finish: bool, return_recv_hook: bool, inputs: Inputs
    ) -> Tuple[EventOverlap, Hook]:
        event = self._finish(result.event, async_finish, inputs)
        if not return_recv_hook:
            return event, None
        owner: "weakref.ref[Any]" = weakref.ref(self)
        return event, ReceiveHook(owner, self._place, self._in_flight, result, inputs)
