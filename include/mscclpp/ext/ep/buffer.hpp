#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/ext/ep/low_latency.hpp>
#include <mscclpp/ext/ep/types.hpp>
#include <mscclpp/platform.hpp>
#include <mscclpp/proxy.hpp>
#include <mscclpp/topology.hpp>

namespace mscclpp::ep {

struct HandleState;
class ExpertMapState;

/// A routing that a dispatch computed: what a combine, or a cached dispatch, needs to follow it
/// again. Cheap to copy; belongs to the Buffer that made it and must not outlive it.
class DispatchHandle {
 public:
  DispatchHandle() = default;
  explicit DispatchHandle(std::shared_ptr<const HandleState> state) : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }
  const HandleState& operator*() const { return *state_; }
  const HandleState* operator->() const { return state_.get(); }

  int numTokens() const;      ///< tokens this rank sent
  int numRecvTokens() const;  ///< rows this rank receives (the bound, in num_worst_tokens mode)
  Tensor recvSourceTokens() const;  ///< i32 [rows]: the token's index at its source rank
  Tensor rankOffsets() const;       ///< i32 [ranks + 1]: first row of every source rank

 private:
  std::shared_ptr<const HandleState> state_;
};

/// Which rank hosts each expert, when experts are not dealt out in equal contiguous blocks.
class ExpertMap {
 public:
  ExpertMap() = default;
  explicit ExpertMap(std::shared_ptr<const ExpertMapState> state) : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }
  const ExpertMapState* operator->() const { return state_.get(); }

 private:
  std::shared_ptr<const ExpertMapState> state_;
};

struct BufferOptions {
  Platform platform = Platform::cpu;
  int deviceIndex = 0;
  /// Peer-mapped bytes for staging and for the pool that outputs are taken from. 0: no dispatch.
  std::size_t numNvlBytes = 0;
  /// Bytes for what is on its way between nodes, 0 = a quarter of numNvlBytes; of no use when all
  /// ranks share a node. With lowLatencyMode:
  std::size_t numRdmaBytes = 0;
  /// numRdmaBytes become the region of the low-latency calls; see lowLatencySizeHint().
  bool lowLatencyMode = false;
  /// Low-latency calls mask a rank that is late instead of failing, and go on without it.
  bool enableShrink = false;
  /// Part of numNvlBytes kept for staging; 0 = a quarter.
  std::size_t stagingBytes = 0;
  int maxExpertsPerRank = 1024;
  /// Which ranks share a node, and what carries data between nodes; what is left out is found as
  /// TopologyOptions says. Must be the same on all ranks.
  TopologyOptions topology = {};
  /// Limit of every device and host wait; negative = MSCCLPP_EP_TIMEOUT; 0 = none.
  double timeoutSeconds = -1;
  /// First epoch; tests start near 2^31 and 2^32 to cross the wrap.
  std::uint32_t firstEpoch = 0;
};

struct LayoutRequest {
  Tensor topkIdx;  ///< i64 [tokens, topk], -1 = no selection
  int numExperts = 0;
  ExpertMap expertMap;
  StreamOrder order;
};

struct LayoutResult {
  Tensor numTokensPerRank;      ///< i32 [ranks]
  Tensor numTokensPerRdmaRank;  ///< i32 [nodes]; absent when all ranks share a node
  Tensor numTokensPerExpert;    ///< i32 [experts]
  Tensor isTokenInRank;         ///< u8 (bool) [tokens, ranks]
  Event event;
};

struct DispatchRequest {
  Tensor x;        ///< bf16 or e4m3 [tokens, hidden], hidden a multiple of 8
  Tensor xScales;  ///< with e4m3: f32 or i32 [tokens, ceil(hidden / 128)], any strides
  /// Set: the routing of an earlier dispatch is used again, without any host synchronisation, and
  /// the routing arguments below must be absent.
  DispatchHandle handle;
  Tensor isTokenInRank;         ///< u8 [tokens, ranks]
  Tensor numTokensPerRank;      ///< i32 [ranks]; checked for shape only (recomputed)
  Tensor numTokensPerRdmaRank;  ///< i32 [nodes]; likewise
  Tensor numTokensPerExpert;    ///< i32 [experts]
  Tensor topkIdx;               ///< optional: i64 [tokens, topk]
  Tensor topkWeights;           ///< with topkIdx: f32 [tokens, topk]
  ExpertMap expertMap;
  int expertAlignment = 1;
  /// > 0: no host synchronisation; outputs have this many rows, unused rows of recvTopkIdx are -1.
  /// Must be the same on all ranks and at least the tokens of each rank.
  int numWorstTokens = 0;
  Config config;
  StreamOrder order;
};

struct DispatchResult {
  Tensor recvX;            ///< [rows, hidden], ordered by (source rank, token)
  Tensor recvXScales;      ///< f32 or i32 [rows, ceil(hidden / 128)] when scales were sent
  Tensor recvTopkIdx;      ///< i64 [rows, topk]: index among this rank's experts, -1 elsewhere
  Tensor recvTopkWeights;  ///< f32 [rows, topk]: 0 where recvTopkIdx is -1
  /// Rows per local expert, rounded up to expertAlignment. Empty in cached and worst-case mode.
  std::vector<int> numRecvTokensPerExpert;
  /// The same on the device, i32 [local experts], not rounded. Absent in cached mode.
  Tensor recvTokensPerExpert;
  DispatchHandle handle;
  Event event;
};

struct CombineRequest {
  Tensor x;  ///< bf16 [rows, hidden]: the experts' output, in the order of the dispatch
  DispatchHandle handle;
  Tensor topkWeights;   ///< optional: f32 [rows, topk], summed beside x
  Tensor bias0, bias1;  ///< optional: bf16 [tokens, hidden], added in fp32
  Config config;
  StreamOrder order;
};

struct CombineResult {
  /// bf16 [tokens, hidden]: fp32 sum over the own node's ranks in ascending order, then over other
  /// nodes; a sum that another node has made is a bf16 row.
  Tensor x;
  Tensor topkWeights;  ///< f32 [tokens, topk] when weights were given
  Event event;
};

/// Expert-parallel communication among the ranks of a Bootstrap: dispatch sends every token to the
/// ranks that host its experts, combine brings the experts' outputs back and adds them.
///
/// All ranks make the same calls in the same order. A call may be enqueued before earlier ones have
/// finished; no barrier between calls is ever needed. One thread at a time may use a Buffer.
/// Errors: bad arguments throw Error(invalidArgument) before anything is sent; a peer that does not
/// arrive within the limit gives TimeoutError naming it, here or on the next call.
class Buffer {
 public:
  /// Collective. Allocates and exchanges the symmetric heap, loads every kernel.
  Buffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options);
  /// Local: waits for this rank's own work, and until its proxies have delivered what other nodes
  /// are to get of it, then frees. Prefer destroy(), which waits for the peers.
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  /// Collective. Waits for all enqueued work, then for all peers, then frees. Later calls throw.
  void destroy();

  int rank() const;
  int ranks() const;
  const BufferOptions& options() const;
  const Topology& topology() const;
  /// Local: what this rank's proxies have done so far. Empty when all ranks share a node.
  std::vector<ProxyStatistics> proxyStatistics() const;
  /// Local, for measurements: see ProxyService. Does nothing, and gives nothing, when all ranks
  /// share a node.
  void noteProxySignals(bool on);
  std::vector<SignalTime> takeProxySignals();

  /// Local, asynchronous: counts where tokens go.
  LayoutResult getDispatchLayout(const LayoutRequest& request);
  /// Collective. Blocks the host until the counts are known, unless a handle or numWorstTokens is
  /// given.
  DispatchResult dispatch(const DispatchRequest& request);
  /// Collective, asynchronous.
  CombineResult combine(const CombineRequest& request);

  /// Collective, asynchronous. Needs lowLatencyMode. Mixes freely with the calls above; at most two
  /// dispatches, and two combines, may have their hooks outstanding. Can be captured into a graph
  /// when the outputs are given; hooks must be called before a graph is replayed.
  LowLatencyDispatchResult lowLatencyDispatch(const LowLatencyDispatchRequest& request);
  /// Collective, asynchronous. x may be used otherwise once the send half is done.
  LowLatencyCombineResult lowLatencyCombine(const LowLatencyCombineRequest& request);
  /// Local, in stream order, with enableShrink: does without `rank` from now on, or with it again
  /// (it must have made the same calls).
  void updateLowLatencyMask(int rank, bool masked);
  void cleanLowLatencyMask();
  /// Local, in stream order: writes 1 for each masked rank, else 0, to i32 [ranks].
  void queryLowLatencyMask(const Tensor& mask, const StreamOrder& order);

  /// Local: memory that peers can read in place, for experts' outputs that go into combine. Falls
  /// back to ordinary memory when the pool is full (combine then stages the rows).
  Tensor createTensor(DType dtype, std::vector<std::int64_t> shape, void* computeStream = nullptr);
  /// True when `tensor` lies in this Buffer's pool.
  bool inPool(const Tensor& tensor) const;
  /// Bytes of the pool that are free now.
  std::size_t poolBytesFree() const;

  /// Local: experts' hosts, one rank per expert. Kept by the caller as long as it is used.
  ExpertMap createExpertMap(const std::vector<int>& rankOfExpert);

  /// The stream that carries the communication (cudaStream_t or device::cpu::Stream*).
  void* commStream() const;
  /// Throws what the kernels have reported since the last call, if anything.
  void checkHealth();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mscclpp::ep
