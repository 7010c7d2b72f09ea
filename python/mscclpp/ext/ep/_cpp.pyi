"""The C++ module mscclpp_ep_cpp. One to one what include/mscclpp/ext/ep/buffer.hpp and
low_latency.hpp document."""

from enum import Enum
from typing import Any, Callable, List, Optional, Sequence, Tuple

class DType(Enum):
    bf16 = ...
    e4m3 = ...
    f32 = ...
    i32 = ...
    i64 = ...
    u8 = ...

class Platform(Enum):
    cpu = ...
    cuda = ...

class Tensor:
    """A dense tensor; shares the memory of `array` (anything that speaks DLPack) and holds it."""

    def __init__(self, array: Any, dtype: Optional[DType] = None) -> None: ...
    def to_dlpack(self) -> Any: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def data_ptr(self) -> int: ...
    def __bool__(self) -> bool: ...

class Event:
    def __init__(self) -> None: ...
    def __bool__(self) -> bool: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_ms(self, since: Event) -> float: ...

class Device:
    @staticmethod
    def open(platform: Platform, index: int = 0) -> Device: ...
    @staticmethod
    def count(platform: Platform) -> int: ...
    @property
    def platform(self) -> Platform: ...
    @property
    def index(self) -> int: ...
    def describe(self) -> str: ...
    def record(self, stream: int) -> Event: ...
    def wait(self, stream: int, event: Event) -> None: ...

class Bootstrap:
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_gather(self, data: bytes) -> List[bytes]: ...
    def barrier(self) -> None: ...

class Config:
    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def num_max_nvl_chunked_send_tokens(self) -> int: ...
    @property
    def num_max_nvl_chunked_recv_tokens(self) -> int: ...
    @property
    def num_max_rdma_chunked_send_tokens(self) -> int: ...
    @property
    def num_max_rdma_chunked_recv_tokens(self) -> int: ...
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...
    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...

class StreamOrder:
    def __init__(
        self,
        compute_stream: int = 0,
        previous_event: Event = ...,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> None: ...

class ExpertMap: ...

class DispatchHandle:
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_recv_tokens(self) -> int: ...
    def recv_source_tokens(self) -> Tensor: ...
    def rank_offsets(self) -> Tensor: ...

class LayoutRequest:
    topk_idx: Tensor
    num_experts: int
    expert_map: ExpertMap
    order: StreamOrder

class LayoutResult:
    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor
    event: Event

class DispatchRequest:
    x: Tensor
    x_scales: Tensor
    handle: DispatchHandle
    is_token_in_rank: Tensor
    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor
    num_tokens_per_expert: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    expert_map: ExpertMap
    expert_alignment: int
    num_worst_tokens: int
    config: Config
    order: StreamOrder

class DispatchResult:
    recv_x: Tensor
    recv_x_scales: Tensor
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor
    num_recv_tokens_per_expert: List[int]
    recv_tokens_per_expert: Tensor
    handle: DispatchHandle
    event: Event

class CombineRequest:
    x: Tensor
    handle: DispatchHandle
    topk_weights: Tensor
    bias_0: Tensor
    bias_1: Tensor
    config: Config
    order: StreamOrder

class CombineResult:
    x: Tensor
    topk_weights: Tensor
    event: Event

class LowLatencyHandle: ...

class LowLatencyDispatchOutputs:
    recv_x: Tensor
    recv_x_scales: Tensor
    recv_count: Tensor
    source_info: Tensor
    layout_range: Tensor
    slots: Tensor
    source_tokens: Tensor
    row_table: Tensor

class LowLatencyDispatchRequest:
    x: Tensor
    topk_idx: Tensor
    max_tokens: int
    experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    return_recv_hook: bool
    expert_totals: Tensor
    wait_totals: Tensor
    num_sms: int
    outputs: LowLatencyDispatchOutputs
    order: StreamOrder

class LowLatencyDispatchResult:
    recv_x: Tensor
    recv_x_scales: Tensor
    recv_count: Tensor
    handle: LowLatencyHandle
    event: Event
    def receive(self, compute_stream: int = 0) -> None: ...

class LowLatencyReduce(Enum):
    rank = ...
    source = ...

class LowLatencyCombineRequest:
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    handle: LowLatencyHandle
    use_logfmt: bool
    reduce: LowLatencyReduce
    return_recv_hook: bool
    wait_totals: Tensor
    num_sms: int
    out: Tensor
    order: StreamOrder

class LowLatencyCombineResult:
    x: Tensor
    event: Event
    def receive(self, compute_stream: int = 0) -> None: ...

class BufferOptions:
    platform: Platform
    device_index: int
    num_nvl_bytes: int
    num_rdma_bytes: int
    low_latency_mode: bool
    enable_shrink: bool
    staging_bytes: int
    max_experts_per_rank: int
    timeout_seconds: float
    first_epoch: int
    ranks_per_node: Optional[int]
    transport: Optional[str]

class Buffer:
    def __init__(self, bootstrap: Bootstrap, options: BufferOptions) -> None: ...
    def destroy(self) -> None: ...
    def get_dispatch_layout(self, request: LayoutRequest) -> LayoutResult: ...
    def dispatch(self, request: DispatchRequest) -> DispatchResult: ...
    def combine(self, request: CombineRequest) -> CombineResult: ...
    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest
    ) -> LowLatencyDispatchResult: ...
    def low_latency_combine(self, request: LowLatencyCombineRequest) -> LowLatencyCombineResult: ...
    def update_low_latency_mask(self, rank: int, masked: bool) -> None: ...
    def clean_low_latency_mask(self) -> None: ...
    def query_low_latency_mask(self, mask: Tensor, order: StreamOrder) -> None: ...
    def create_tensor(
        self, dtype: DType, shape: Sequence[int], compute_stream: int = 0
    ) -> Tensor: ...
    def in_pool(self, tensor: Tensor) -> bool: ...
    def pool_bytes_free(self) -> int: ...
    def create_expert_map(self, rank_of_expert: Sequence[int]) -> ExpertMap: ...
    def comm_stream(self) -> int: ...
    def check_health(self) -> None: ...

def create_unique_id(interface: str = "") -> str: ...
def tcp_bootstrap(rank: int, size: int, unique_id: str, timeout: float = 100.0) -> Bootstrap: ...
def callback_bootstrap(
    rank: int, size: int, all_gather: Callable[[bytes], Sequence[bytes]]
) -> Bootstrap: ...
def low_latency_size_hint(
    max_tokens: int,
    hidden: int,
    ranks: int,
    experts: int,
    reduce: LowLatencyReduce,
    topk: int,
    spans_nodes: bool,
) -> int: ...
def env_platform() -> Optional[Platform]: ...
def has_cuda() -> bool: ...
def is_sm90_compiled() -> bool: ...
