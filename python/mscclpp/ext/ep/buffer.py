"""The Buffer: deep_ep's interface to dispatch and combine."""

import warnings
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist

from . import _cpp
from .bootstrap import join
from .calls import InFlight, Inputs, pair, set_routing, stream_order
from .config import Config, combine_config, dispatch_config
from .errors import EpInvalidArgument
from .event import EventHandle, EventOverlap
from .handle import DispatchHandle, native_handle
from .low_latency import LowLatencyCalls
from .low_latency_parts import CombineBuffers
from .options import buffer_options
from .place import DeviceLike, choose_place
from .pool import PoolTensors
from .tensors import to_torch, to_torch_if_any
from .unsupported import NotYet

TensorOrPair = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


class Buffer(LowLatencyCalls, PoolTensors, NotYet):
    """Expert-parallel communication among the ranks of a group: dispatch sends every token to the
    ranks that host its experts, combine brings the experts' outputs back and adds them.

    All ranks make the same calls in the same order; no barrier between calls is ever needed. One
    thread at a time may use a Buffer. A rank that does not arrive in time gives EpTimeout, which
    names it, here or (on CUDA) at a later call; the Buffer is of no use after that.

    Attributes:
        num_sms: blocks per kernel in the recommended configs (class attribute: set_num_sms).
        rank, group_size, group: of this process in the group.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode: as passed.
        device: where the tensors of all calls must be.
        runtime: the C++ Buffer, None after destroy().
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Optional[dist.ProcessGroup] = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
        device: DeviceLike = None,
        timeout: Optional[float] = None,
        bootstrap: Optional[_cpp.Bootstrap] = None,
        staging_bytes: int = 0,
        max_experts_per_rank: int = 1024,
        ranks_per_node: Optional[int] = None,
        transport: Optional[str] = None,
    ) -> None:
        """Collective. Allocates the memory that peers map, and loads every kernel.

        Arguments:
            group: the torch.distributed group, of any backend. Used here only.
            num_nvl_bytes: peer-mapped bytes for staging and for the pool that outputs are taken
                from; must be equal on all ranks. See Config.get_nvl_buffer_size_hint. More keeps
                more tensors in the pool, less costs copies, never correctness.
            num_rdma_bytes: with low_latency_mode, peer-mapped bytes of the low-latency calls: see
                get_low_latency_rdma_size_hint; else bytes for what is on its way between nodes, see
                Config.get_rdma_buffer_size_hint (0 = a quarter of num_nvl_bytes). Equal on all
                ranks; of no use when all share a node.
            low_latency_mode: whether the low-latency calls may be made, beside the others.
            enable_shrink: low-latency calls mask a rank that is late and go on without it.
            num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted
                with any value; they have no meaning here.
            explicitly_destroy: destroy() is allowed either way. True warns (ResourceWarning) when
                the Buffer goes away without it.
            comm: an mpi4py communicator (or anything with Get_rank, Get_size and allgather), when
                there is no group.
            device: where the tensors will be. Without it MSCCLPP_EP_PLATFORM decides, then: the
                current CUDA device if this build and this machine have one, else the CPU.
            timeout: seconds that any wait may take, 0 = no limit, None = MSCCLPP_EP_TIMEOUT.
            bootstrap: a Bootstrap of the C++ module, instead of group or comm.
            staging_bytes: the part of num_nvl_bytes kept for staging; 0 = a quarter.
            max_experts_per_rank: at most so many experts on one rank.
            ranks_per_node: so many consecutive ranks make a node; None = MSCCLPP_EP_RANKS_PER_NODE,
                else the ranks of a host do. A host may play several nodes.
            transport: what carries data between nodes: "shm", "cuda_ipc", "tcp" or "verbs"; None =
                MSCCLPP_EP_TRANSPORT, else the best that every rank has.

        Raises:
            EpInvalidArgument, EpUnsupported, EpTimeout, EpOutOfMemory, EpCudaError.
        """
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        self.runtime: Optional[_cpp.Buffer] = None
        self._place = choose_place(device)
        self.device: torch.device = self._place.device
        options = buffer_options(
            self._place, num_nvl_bytes, num_rdma_bytes, staging_bytes, max_experts_per_rank, timeout
        )
        options.ranks_per_node, options.transport = ranks_per_node, transport
        options.low_latency_mode = bool(low_latency_mode)
        options.enable_shrink = bool(enable_shrink)
        limit = 100.0 if timeout is None else float(timeout)
        joined = join(group, comm, bootstrap, self._place, limit)

        self.group = group if group is not None else comm
        self.rank: int = joined.rank
        self.group_size: int = joined.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._in_flight = InFlight(self._place)
        self._combine_buffers = CombineBuffers(self._place)
        self.runtime = _cpp.Buffer(joined, options)

    def destroy(self) -> None:
        """Collective. Waits for all enqueued work, then for all ranks, then frees. Later calls
        raise EpInvalidState; a second destroy() does nothing. Tensors that are still held stay
        valid."""
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            runtime.destroy()
            self._in_flight.clear()
            self._combine_buffers.clear()

    def __del__(self) -> None:
        runtime = getattr(self, "runtime", None)
        if runtime is None:
            return
        if self.explicitly_destroy:
            warnings.warn(
                "a Buffer with explicitly_destroy=True goes away without destroy()",
                ResourceWarning,
                stacklevel=2,
            )
        # Waits for this rank's work, which reads the inputs in flight, and for no other rank.
        self.runtime = None
        del runtime
        self._in_flight.clear()

    # ---- statics ---------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether this build has kernels for Hopper GPUs."""
        return _cpp.is_sm90_compiled()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the blocks per kernel of the recommended configs, 1 or more (odd is fine)."""
        Config(num_sms=new_num_sms)  # refuses bad values
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream (`torch.cuda.current_stream()`, or the host)."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The recommended Config of dispatch, for any number of ranks."""
        return dispatch_config(Buffer.num_sms, num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The recommended Config of combine, for any number of ranks."""
        return combine_config(Buffer.num_sms, num_ranks)

    # ---- memory and streams ----------------------------------------------------------------

    def get_comm_stream(self) -> Any:
        """The stream that carries the communication: a `torch.cuda.ExternalStream`, which must not
        be used after the Buffer is gone; on the CPU, torch's placeholder for a stream."""
        runtime = self._alive()
        if not self._place.is_cuda:
            return torch.cpu.current_stream()
        return torch.cuda.ExternalStream(runtime.comm_stream(), device=self.device)

    def create_expert_map(self, rank_of_expert: Sequence[int]) -> _cpp.ExpertMap:
        """Which rank hosts each expert, when they are not dealt out in equal contiguous blocks. Pass
        it as expert_map to get_dispatch_layout and dispatch; all ranks must make the same one."""
        return self._alive().create_expert_map([int(rank) for rank in rank_of_expert])

    # ---- communication ---------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        expert_map: Optional[_cpp.ExpertMap] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts where this rank's tokens go. Local, does not block (on the CPU, only when
        async_finish is set).

        Arguments:
            topk_idx: `[num_tokens, num_topk]` int64; -1 = no selection.
            num_experts: of all ranks together.
            previous_event, async_finish, allocate_on_comm_stream: see dispatch.
            expert_map: see create_expert_map.

        Returns:
            num_tokens_per_rank: `[num_ranks]` int32.
            num_tokens_per_rdma_rank: `[num_nodes]` int32; None when all ranks share a node.
            num_tokens_per_expert: `[num_experts]` int32.
            is_token_in_rank: `[num_tokens, num_ranks]` bool.
            event: after the work; empty unless async_finish.
        """
        runtime = self._alive()
        request, inputs = _cpp.LayoutRequest(), Inputs()
        request.topk_idx = inputs.add("topk_idx", topk_idx)
        request.num_experts = num_experts
        if expert_map is not None:
            request.expert_map = expert_map
        request.order = stream_order(
            self._place, previous_event, async_finish, allocate_on_comm_stream
        )
        result = runtime.get_dispatch_layout(request)
        event = self._finish(result.event, async_finish, inputs)
        return (
            to_torch(result.num_tokens_per_rank),
            to_torch_if_any(result.num_tokens_per_rdma_rank),
            to_torch(result.num_tokens_per_expert),
            to_torch(result.is_token_in_rank, torch.bool),
            event,
        )

    def dispatch(
        self,
        x: TensorOrPair,
        handle: Optional[DispatchHandle] = None,
        num_tokens_per_rank: Optional[torch.Tensor] = None,
        num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
        is_token_in_rank: Optional[torch.Tensor] = None,
        num_tokens_per_expert: Optional[torch.Tensor] = None,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        expert_map: Optional[_cpp.ExpertMap] = None,
    ) -> Tuple[
        TensorOrPair,
        Optional[torch.Tensor],
        Optional[torch.Tensor],
        Optional[List[int]],
        Optional[DispatchHandle],
        EventOverlap,
    ]:
        """Sends every token to the ranks that host its experts. Collective. Blocks the host until
        the counts are known, unless a handle or num_worst_tokens is given.

        Arguments:
            x: `[num_tokens, hidden]` bfloat16, hidden a multiple of 8; or a pair: float8_e4m3fn and
                its scales, `[num_tokens, ceil(hidden / 128)]` float32 (or packed int32), any strides.
            handle: the routing of an earlier dispatch, used again; the routing arguments are then
                left out.
            num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert:
                from get_dispatch_layout.
            topk_idx, topk_weights: `[num_tokens, num_topk]` int64 and float32; both or neither.
            expert_alignment: num_recv_tokens_per_expert_list is rounded up to multiples of this.
            num_worst_tokens: > 0: no host synchronisation; outputs have this many rows, and
                recv_topk_idx is -1 in the unused ones. Equal on all ranks, at least the tokens of
                each rank.
            config: None = get_dispatch_config(group_size).
            previous_event: the communication waits for it; None = for all work of the current
                stream so far.
            async_finish: the current stream does not wait for the communication; wait for the
                returned event. Inputs may be dropped at once.
            allocate_on_comm_stream: outputs belong to the communication stream instead of the
                current one.
            expert_map: see create_expert_map.

        Returns:
            recv_x: `[num_recv_tokens, hidden]`, ordered by (source rank, token); a pair if x is one.
            recv_topk_idx: `[num_recv_tokens, num_topk]` int64, indices among this rank's experts, -1
                elsewhere; None without topk_idx and with a handle.
            recv_topk_weights: likewise, float32, 0 where recv_topk_idx is -1.
            num_recv_tokens_per_expert_list: rows for each expert of this rank; empty with
                num_worst_tokens, None with a handle. handle.recv_tokens_per_expert has the counts
                on the device in every mode.
            handle: for combine and for cached dispatches; None with a handle.
            event: after the work; empty unless async_finish.
        """
        runtime = self._alive()
        request, inputs = _cpp.DispatchRequest(), Inputs()
        if num_tokens_per_rdma_rank is not None:
            request.num_tokens_per_rdma_rank = inputs.add(
                "num_tokens_per_rdma_rank", num_tokens_per_rdma_rank
            )
        values, x_scales = pair(x)
        request.x = inputs.add("x", values)
        if x_scales is not None:
            request.x_scales = inputs.add("x_scales", x_scales)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise EpInvalidArgument(
                    "a handle brings its routing along: leave topk_idx and topk_weights out"
                )
            request.handle = native_handle(handle)
        else:
            set_routing(
                request,
                inputs,
                is_token_in_rank=is_token_in_rank,
                num_tokens_per_rank=num_tokens_per_rank,
                num_tokens_per_expert=num_tokens_per_expert,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
            )
            if expert_map is not None:
                request.expert_map = expert_map
            request.expert_alignment = expert_alignment
            request.num_worst_tokens = num_worst_tokens
        request.config = self.get_dispatch_config(self.group_size) if config is None else config
        request.order = stream_order(
            self._place, previous_event, async_finish, allocate_on_comm_stream
        )
        result = runtime.dispatch(request)
        event = self._finish(result.event, async_finish, inputs)
        recv_x: Any = to_torch(result.recv_x)
        if x_scales is not None:
            recv_x = (recv_x, to_torch(result.recv_x_scales))
        if handle is not None:
            return recv_x, None, None, None, None, event
        return (
            recv_x,
            to_torch_if_any(result.recv_topk_idx),
            to_torch_if_any(result.recv_topk_weights),
            list(result.num_recv_tokens_per_expert),
            DispatchHandle(result.handle, to_torch(result.recv_tokens_per_expert)),
            event,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        topk_weights: Optional[torch.Tensor] = None,
        bias: Optional[TensorOrPair] = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Brings rows back to the tokens' ranks and adds them there, in float32, in ascending order
        of the ranks, without weights. Collective, does not block (on the CPU, only when async_finish
        is set). Rows of another node are added there, in the same way, and come as one bfloat16 row;
        such sums follow the own node's rows, nodes ascending.

        Arguments:
            x: `[num_recv_tokens, hidden]` bfloat16: the experts' output in the order of recv_x. A
                tensor of empty_in_pool(), or a recv_x, is read in place.
            handle: what the dispatch returned.
            topk_weights: `[num_recv_tokens, num_topk]` float32, added up beside x.
            bias: one tensor or a pair, `[num_tokens, hidden]` bfloat16, added in float32.
            config: None = get_combine_config(group_size).
            previous_event, async_finish, allocate_on_comm_stream: see dispatch.

        Returns:
            combined_x: `[num_tokens, hidden]` bfloat16.
            combined_topk_weights: `[num_tokens, num_topk]` float32, or None.
            event: after the work; empty unless async_finish.
        """
        runtime = self._alive()
        request, inputs = _cpp.CombineRequest(), Inputs()
        request.x = inputs.add("x", x)
        request.handle = native_handle(handle)
        if topk_weights is not None:
            request.topk_weights = inputs.add("topk_weights", topk_weights)
        bias_0, bias_1 = (None, None) if bias is None else pair(bias)
        if bias_0 is not None:
            request.bias_0 = inputs.add("bias", bias_0)
        if bias_1 is not None:
            request.bias_1 = inputs.add("bias", bias_1)
        request.config = self.get_combine_config(self.group_size) if config is None else config
        request.order = stream_order(
            self._place, previous_event, async_finish, allocate_on_comm_stream
        )
        result = runtime.combine(request)
        event = self._finish(result.event, async_finish, inputs)
        return to_torch(result.x), to_torch_if_any(result.topk_weights), event
