#pragma once

#include <cstdint>

#include <mscclpp/failure.hpp>

#include "../plan/internode_plan.hpp"
#include "../plan/memory_plan.hpp"
#include "../port_words.hpp"

/// The host-callable list: one Args struct and one launch function per kernel, the same for both
/// platforms. Pointers are device pointers of the platform unless stated otherwise.
namespace mscclpp::ep {

/// What a wait was for; the host turns it into words (failure_text.cc).
enum class WaitWhat : std::uint32_t {
  counts = 1,     ///< a peer's token counts in notify
  dispatchEntry,  ///< a peer's dispatch kernel to start
  dispatchDone,   ///< a peer's rows to arrive
  combineEntry,   ///< a peer's combine kernel to start
  combineChunk,   ///< a chunk of a peer's staged rows
  combineDone,    ///< a peer to finish reading
  pipeline,       ///< a stage of a block's own pipeline: an internal error
  shapeMismatch,  ///< not a wait: a peer's call differs in shape (expected, seen = signatures)
  overflow,       ///< not a wait: more rows than numWorstTokens (expected = limit, seen = rows)
  invalidExpert,  ///< not a wait: a topk index out of range (seen = the index)

  lowLatencyRoom = 32,   ///< a peer to have read what an earlier call sent it
  lowLatencyIds,         ///< a peer's expert ids, with which it enters a dispatch
  lowLatencyRow,         ///< a row of a peer's
  lowLatencyWeights,     ///< a peer's weights, with which it enters a combine
  lowLatencyPartial,     ///< a peer's partial sum
  lowLatencyEntry,       ///< a peer to enter a combine
  lowLatencyOutput,      ///< a row of a peer's expert, in a combine
  lowLatencyShape,       ///< not a wait: a peer's call differs (expected, seen = hashes)
  lowLatencyReduce,      ///< not a wait: a peer's combine is another (expected, seen = its hello)
  lowLatencyRepeats,     ///< not a wait: more rows for a peer than fit (expected, seen = rows)
  lowLatencyExpertRows,  ///< not a wait: more than fit for expert `peer` (expected, seen = rows)

  railCounts = 64,  ///< the token counts of a rank of another node
  railWindows,      ///< a rail to say where its node takes rows
  railRoom,         ///< a rail to forward what was sent before
  railRows,         ///< tokens of a rank of another node
  railSums,         ///< another node's sums
  railSumRoom,      ///< a rank of another node to take the sums that were sent before
  railProtocol,     ///< not a wait: a slot is not the expected one (expected, seen = headers)
};

/// What every collective kernel knows.
struct GroupArgs {
  /// [ranks] base of every rank's heap, as mapped here; null for ranks of other nodes, which
  /// kernels leave out wherever memory is concerned.
  char* const* heaps = nullptr;
  MemoryPlan plan;
  int ranks = 1;
  int rank = 0;
  WaitControl wait;
};

/// One end of the way between a rank and its rail in another node.
struct RailFlow {
  std::int32_t peer;  ///< rank at the other end
  std::int32_t node;  ///< its node
  std::int32_t ring;  ///< number of the flow at the peer
};

/// How this rank reaches other nodes. Arrays are device memory.
struct RailArgs {
  const PortChannelHandle* channels = nullptr;  ///< [ranks]; null: there is only one node
  const std::uint64_t* words = nullptr;         ///< this rank's counters
  PortWords wordLayout;
  const RailFlow* out = nullptr;  ///< flows that this rank feeds, one per other node, ascending
  const RailFlow* in = nullptr;   ///< flows for which this rank is the rail
  int outs = 0, ins = 0;
  const std::int32_t* nodeRanks = nullptr;  ///< ranks, ordered by node
  const std::int32_t* nodeFirst = nullptr;  ///< [nodes + 1] into nodeRanks
  int node = 0, nodes = 1;
  RailPlan plan;
};

/// Experts' hosts. With null arrays, expert e lives on rank e / perRank as its e % perRank-th.
struct ExpertArgs {
  int experts = 0;
  int perRank = 1;
  int localExperts = 0;                   ///< of this rank
  const std::int32_t* rankOf = nullptr;   ///< [experts]
  const std::int32_t* indexOf = nullptr;  ///< [experts] index on that rank
  const std::int32_t* listed = nullptr;   ///< [experts] experts ordered by (rank, index)
  const std::int32_t* firstOf = nullptr;  ///< [ranks + 1] into `listed`
};

struct LayoutArgs {
  const std::int64_t* topkIdx = nullptr;  ///< [tokens, topk]
  int tokens = 0;
  int topk = 0;
  int ranks = 1;
  RailArgs rails;
  ExpertArgs experts;
  std::int32_t* tokensPerRank = nullptr;    ///< [ranks], zeroed before
  std::int32_t* tokensPerExpert = nullptr;  ///< [experts], zeroed before
  std::int32_t* tokensPerNode = nullptr;    ///< [nodes], zeroed before; with several nodes
  std::uint8_t* isTokenInRank = nullptr;    ///< [tokens, ranks]
  std::int64_t* invalidExpert = nullptr;    ///< LocalWords::invalidExpert
};

/// Notify's answer for the host, in pinned memory. `sequence` is released last.
struct NotifyResult {
  std::uint32_t sequence;
  std::int32_t badRank;   ///< rank whose call is refused, -1 = none
  std::uint32_t badWhat;  ///< WaitWhat::shapeMismatch or invalidExpert
  std::int32_t recvRows;
  std::uint64_t badExpected;
  std::uint64_t badSeen;
  std::int32_t maxTokens;     ///< largest token count of any rank
  std::int32_t maxRecvRows;   ///< largest receive count of any rank
  std::int32_t perExpert[1];  ///< [local experts], as received
};

struct NotifyArgs {
  GroupArgs group;
  RailArgs rails;
  ExpertArgs experts;
  const std::uint8_t* isTokenInRank = nullptr;    ///< [tokens, ranks]
  const std::int32_t* tokensPerExpert = nullptr;  ///< [experts]
  const std::int64_t* topkIdx = nullptr;          ///< optional, checked for range
  int tokens = 0;
  int topk = 0;
  std::uint64_t signature = 0;            ///< of (hidden, dtype, topk, experts, ...)
  std::int32_t* position = nullptr;       ///< out [tokens, ranks]: index among my rows there, -1
  std::int32_t* sendCount = nullptr;      ///< out [ranks]
  std::int32_t* sendStart = nullptr;      ///< out [ranks]: row of my first token at that rank
  std::int32_t* rankOffset = nullptr;     ///< out [ranks + 1]: my rows by source rank
  std::int32_t* recvPerExpert = nullptr;  ///< out [local experts]
  std::int32_t* railTokens = nullptr;     ///< out [in-flows]: tokens of each source
  NotifyResult* result = nullptr;         ///< pinned
  std::uint32_t sequence = 0;
  /// False: nobody reads `result` in time, so what is refused becomes a failure of the group.
  bool hostWaits = true;
};

/// Where this rank's received rows go in this launch.
struct RecvWindow {
  std::uint64_t heapOffset = 0;
  std::int64_t rowBegin = 0;
  std::int64_t rows = 0;  ///< capacity from rowBegin on
};

struct DispatchArgs {
  GroupArgs group;
  ExpertArgs experts;
  const char* x = nullptr;  ///< [tokens, rowBytes]
  std::uint32_t rowBytes = 0;
  std::uint32_t partBytes = 0;  ///< bulk copies move at most this; a multiple of 16
  const char* scales = nullptr;
  int scaleCount = 0;                                       ///< 4-byte scales per row
  std::int64_t scaleTokenStride = 0, scaleBlockStride = 0;  ///< in scales
  const std::int64_t* topkIdx = nullptr;
  const float* topkWeights = nullptr;
  int topk = 0;
  int tokens = 0;
  const std::int32_t* position = nullptr;
  const std::int32_t* sendStart = nullptr;
  const std::int32_t* rankOffset = nullptr;  ///< for the tail of worst-case outputs
  RecvWindow window;
  std::uint64_t signature = 0;
  bool bulk = true;  ///< rows are 16-byte multiples at 16-byte addresses
  /// Worst case: rows of the outputs. recvTopkIdx of unused rows becomes -1; more rows is an error.
  std::int64_t rowLimit = 0;
};

struct CombineArgs {
  GroupArgs group;
  const char* y = nullptr;  ///< [rows, rowBytes] experts' output
  std::uint32_t rowBytes = 0;
  std::uint32_t partBytes = 0;
  bool staged = false;             ///< y is not in the heap
  std::uint64_t heapOffset = 0;    ///< of y (in place) or of the staging area
  const float* weights = nullptr;  ///< [rows, topk], optional
  int topk = 0;
  const char* bias0 = nullptr;
  const char* bias1 = nullptr;
  int tokenBegin = 0, tokenEnd = 0;  ///< this wave, of every rank
  int tokens = 0;                    ///< mine
  const std::int32_t* position = nullptr;
  const std::int32_t* sendStart = nullptr;
  const std::int32_t* rankOffset = nullptr;
  const std::int32_t* sourceTokens = nullptr;  ///< [rows]; needed when there are several waves
  CombineStaging staging;
  std::uint64_t stagingOffset = 0;  ///< heap offset of the staging area (weights, staged rows)
  std::uint64_t signature = 0;
  char* out = nullptr;          ///< [tokens, rowBytes]
  float* outWeights = nullptr;  ///< [tokens, topk]
};

/// A plain copy of rows to the places where dispatch puts them: the roofline of the benchmark.
struct CopyRowsArgs {
  GroupArgs group;
  const char* x = nullptr;
  std::uint32_t rowBytes = 0;
  int tokens = 0;
  const std::int32_t* position = nullptr;
  const std::int32_t* sendStart = nullptr;
  std::uint64_t heapOffset = 0;  ///< of the rows at every receiver
  bool pull = false;             ///< read rows from there into x instead (combine's roofline)
};

/// Kernels of the intranode family for one platform.
struct IntranodeKernels {
  /// Loads every kernel and raises its limits, so that nothing is loaded beside a spinning peer.
  void (*prepare)();
  /// Largest part of a row that a bulk copy moves, from the shared memory that a kernel may have.
  std::uint32_t (*dispatchPartBytes)(std::uint32_t rowBytes);
  std::uint32_t (*combinePartBytes)(std::uint32_t rowBytes, bool staged);
  /// `stream` is the platform's native stream.
  void (*layout)(const LayoutArgs&, void* stream);
  void (*notify)(const NotifyArgs&, int blocks, void* stream);
  void (*dispatch)(const DispatchArgs&, int blocks, void* stream);
  void (*stageWeights)(const CombineArgs&, int blocks, void* stream);
  void (*combine)(const CombineArgs&, int blocks, void* stream);
  void (*copyRows)(const CopyRowsArgs&, int blocks, void* stream);
};

namespace cpu {
const IntranodeKernels& intranodeKernels();
}
namespace cuda {
const IntranodeKernels& intranodeKernels();
}

}  // namespace mscclpp::ep
