#pragma once

#include <cstdint>

#include <mscclpp/device/line_types.hpp>
#include <mscclpp/failure.hpp>
#include <mscclpp/port_channel_handle.hpp>

#include "../plan/low_latency_plan.hpp"
#include "../port_words.hpp"

/// The low-latency kernels as the host calls them: Args structs and launchers, the same for both
/// platforms. Pointers are device pointers.
namespace mscclpp::ep {

/// Which half of a call a kernel does.
enum class LowLatencyPhase : std::uint32_t { send = 1, receive = 2, whole = 3 };

constexpr bool sends(LowLatencyPhase phase) {
  return phase != LowLatencyPhase::receive;
}
constexpr bool receives(LowLatencyPhase phase) {
  return phase != LowLatencyPhase::send;
}

/// The first word of a dispatch's hello: tokens below, a hash of the call's shape above.
inline constexpr int kHelloTokenBits = 13;
static_assert(kMaxLowLatencyTokens < 1 << kHelloTokenBits);

/// The first word of a combine's hello: where the call is reduced, and how sums travel.
inline constexpr std::uint32_t kReducedAtRanks = 0, kReducedAtSource = 1, kReducedAsLogfmt = 2;

/// Regions of this many ranks are found without a load.
inline constexpr int kInlineRanks = 64;
/// Top-k up to which the fast kernels are used.
inline constexpr int kFastTopk = 8;

/// Moments of a call whose peers are behind port channels, in nanoseconds of the device's clock.
/// Only those of the messages that it has are written.
struct LowLatencyTimes {
  std::uint64_t entered;                 ///< block 0 may begin
  std::uint64_t written[kPortMessages];  ///< all of a message; its triggers are pushed next
  std::uint64_t arrived[kPortMessages];  ///< block 0 has seen the last peer's
  std::uint64_t left;                    ///< the last block is done
};

/// Peers on other nodes: those whose heap is not mapped.
struct LowLatencyPorts {
  const PortChannelHandle* channels[kLowLatencyKinds] = {};  ///< [ranks] each; null: no such peers
  std::uint64_t outboxOffset = 0;                            ///< in a heap
  std::uint64_t firstEpoch = 0;          ///< of the Buffer: signals are counted from there
  const std::uint64_t* words = nullptr;  ///< this rank's counters, as PortWords says
  LowLatencyTimes* times = nullptr;      ///< optional, written
};

struct LowLatencyGroup {
  char* region = nullptr;          ///< this rank's
  char* const* heaps = nullptr;    ///< [ranks] all heaps
  std::uint64_t regionOffset = 0;  ///< in a heap
  LowLatencyPlan plan;
  int ranks = 1;
  int rank = 0;
  WaitControl wait;
  device::LineWrites writes = device::LineWrites::whole;
  bool alone = false;   ///< no other rank on this GPU: kernels may start early
  bool shrink = false;  ///< a peer that is late is masked, not an error
  LowLatencyPhase phase = LowLatencyPhase::whole;
  /// Receive halves: calls that this rank has sent after the one that is received.
  std::uint64_t laterSends = 0;
  std::uint64_t share = 0;  ///< of kEpochStep, by every block but the first; set by the launcher
  char* regions[kInlineRanks] = {};  ///< of the first ranks, as mapped here
  LowLatencyPorts ports;
};

struct LowLatencyDispatchArgs {
  DispatchArea area;
  const char* x = nullptr;                ///< bf16 [tokens, hidden]
  const std::int64_t* topkIdx = nullptr;  ///< [tokens, topk]
  int tokens = 0;
  int hidden = 0;
  int experts = 0;
  int expertsPerRank = 1;
  std::uint32_t ownerMagic = 0;  ///< ceil(2^32 / expertsPerRank); see ownerOf()
  std::uint32_t shapeHash = 0;   ///< of what all ranks must pass alike; kHelloHashBits of it count
  bool roundScale = false;       ///< scales are powers of two
  bool packedScales = false;     ///< scales leave as UE8M0, 4 to an i32
  int rounds = 0;                ///< items of each rank that a block places; set by the launcher
  bool idsInShared = true;       ///< all ranks' ids fit; set by the launcher
  char* recvX = nullptr;         ///< [local experts, ranks * maxTokens, hidden]
  /// f32 [local experts, blocks, ranks * maxTokens], or i32 [local experts, ceil(blocks / 4), ...].
  void* recvScales = nullptr;
  std::int32_t* recvCount = nullptr;     ///< [local experts]
  std::int32_t* sourceInfo = nullptr;    ///< [local experts, ranks * maxTokens] the source's token
  std::int64_t* layoutRange = nullptr;   ///< [local experts, ranks] begin << 32 | count
  std::int32_t* slots = nullptr;         ///< [ranks, maxTokens, topk] row of recvX, -1 = not here
  std::int32_t* sourceTokens = nullptr;  ///< [ranks]
  std::int32_t* rowTable = nullptr;      ///< see RowTable
  std::int32_t* expertTotals = nullptr;  ///< optional [local experts], added to
  std::int64_t* waitTotals = nullptr;    ///< optional [ranks] nanoseconds, added to
  LowLatencyGroup group;                 ///< last: its end is seldom read
};

template <class Area>
struct LowLatencyCombineArgsOf {
  Area area;
  const char* y = nullptr;                ///< bf16, rows as recvX
  const std::int64_t* topkIdx = nullptr;  ///< [tokens, topk]
  const float* weights = nullptr;         ///< [tokens, topk]
  int tokens = 0;
  int hidden = 0;
  int experts = 0;
  int expertsPerRank = 1;
  std::uint32_t ownerMagic = 0;
  const std::int32_t* slots = nullptr;         ///< of the dispatch
  const std::int32_t* sourceTokens = nullptr;  ///< of the dispatch
  char* out = nullptr;                         ///< bf16 [tokens, hidden]
  std::int64_t* waitTotals = nullptr;          ///< optional [ranks] nanoseconds, added to
  bool logfmt = false;  ///< peers' sums travel as plan/logfmt.hpp says; so does the area
  const std::int32_t* rowTable = nullptr;  ///< of the dispatch
  LowLatencyGroup group;                   ///< last: its end is seldom read
};
/// Reduced by the experts' ranks, or at the tokens' home.
using LowLatencyCombineArgs = LowLatencyCombineArgsOf<CombineArea>;
using LowLatencySourceArgs = LowLatencyCombineArgsOf<SourceArea>;

struct LowLatencyKernels {
  /// Loads every kernel, so that nothing is loaded beside a spinning peer.
  void (*prepare)();
  /// Launch at most `blocks` blocks: as many as there is work for.
  void (*dispatch)(LowLatencyDispatchArgs, bool e4m3, int blocks, void* stream);
  void (*combine)(LowLatencyCombineArgs, int blocks, void* stream);
  void (*combineAtSource)(LowLatencySourceArgs, int blocks, void* stream);
};

namespace cpu {
const LowLatencyKernels& lowLatencyKernels();
}
namespace cuda {
const LowLatencyKernels& lowLatencyKernels();
}

}  // namespace mscclpp::ep
