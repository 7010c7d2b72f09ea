#pragma once

#include <cstddef>
#include <cstdint>

#include "../port_words.hpp"
#include "memory_plan.hpp"

/// What high-throughput calls between nodes keep in the symmetric heap, for host and kernels.
///
/// A rank reaches every other node by one of its ranks, its "rail" there. The pair is a flow. In a
/// dispatch a flow has one ring of slots at either end, which all warps fill and empty together. In
/// a combine it has lanes, which share out the tokens and never wait for each other; a lane has a
/// ring of its own, a part of the flow's. docs/internode.md explains it all.
namespace mscclpp::ep {

/// Tokens that go to a lane together; lanes take turns.
inline constexpr int kLaneTokens = 8;
static_assert(kLaneTokens == kChunkRows, "waves of a combine begin at multiples of both");

/// The tokens of one lane, ascending: the i-th of them.
struct LaneTokens {
  int lane = 0;
  int lanes = 1;

  constexpr std::int64_t at(std::int64_t i) const {
    return (i / kLaneTokens * lanes + lane) * kLaneTokens + i % kLaneTokens;
  }
  /// No token before the one with this index is at or behind `token`.
  constexpr std::int64_t firstFrom(std::int64_t token) const {
    return token / kLaneTokens / lanes * kLaneTokens;
  }
  /// Most tokens of a lane when there are `tokens` in all.
  static constexpr std::int64_t most(std::int64_t tokens, int lanes) {
    const std::int64_t turn = std::int64_t{kLaneTokens} * lanes;
    return (tokens + turn - 1) / turn * kLaneTokens;
  }
};

/// Rings at the ends of flows. A dispatch goes from a rank to its rail, a combine comes back.
enum class RailArea : int { dispatchSend, dispatchReceive, combineSend, combineReceive };
inline constexpr int kRailAreas = 4;

// How far rings are, in slots since the Buffer was made: what arrived and what went are compared
// with it, so that no counter is ever reset. Only this rank's kernels touch it. A launch begins
// with empty rings, at slot 0.

/// A lane's sending end.
struct RailProgress {
  std::uint64_t slots;   ///< that went through
  std::uint64_t index;   ///< of them in this launch
  std::uint64_t cursor;  ///< next token, as an index into the lane's
  std::uint64_t closed;  ///< launches that are finished
};

/// A lane's receiving end, where warps take turns of kLaneTokens tokens. All but `slots` are 0 when
/// a launch begins.
struct alignas(kLineBytes) HomeProgress {
  static constexpr int kRuns = 4;  ///< a run is half a ring, or a slot
  std::uint64_t slots;             ///< that went through in earlier launches
  std::uint64_t next;              ///< turns that know their slots, and slots that these have
  std::uint64_t total;             ///< as below
  std::uint32_t done[kRuns];       ///< as below
};

/// Runs of slots that a ring of a dispatch has at most: a run is put, or given back, as a whole.
inline constexpr int kRailRuns = 256;

/// An end of a dispatch's ring, which many warps fill or empty. All but `slots` and `closed` are 0
/// when a launch begins.
struct alignas(kLineBytes) RunProgress {
  std::uint64_t slots;   ///< that went through in earlier launches
  std::uint64_t next;    ///< sending: the first slot that no warp has taken; see RailSender
  std::uint64_t total;   ///< slots of this launch with the end mark; 0: not known yet
  std::uint64_t closed;  ///< receiving: the last launch whose end mark was seen
  std::uint32_t turns;   ///< sending: groups of tokens that warps have taken
  std::uint32_t done[kRailRuns];  ///< slots of a run that are finished; see RunMarks
};

/// What RunProgress::next and HomeProgress::next count in one word: slots, and turns above them.
struct SlotsAndTurns {
  static constexpr int kSlotBits = 40;
  std::uint64_t word = 0;

  static constexpr std::uint64_t of(std::uint64_t slots, std::uint64_t turns) {
    return slots + (turns << kSlotBits);
  }
  constexpr std::uint64_t slots() const { return word & ((std::uint64_t{1} << kSlotBits) - 1); }
  constexpr std::uint64_t turns() const { return word >> kSlotBits; }
};

/// Words that only this rank's own kernels touch.
struct alignas(kLineBytes) RailWords {
  std::uint64_t dispatches;  ///< finished launches
  std::uint64_t combines;
  std::uint32_t warpsDone;  ///< of the launch
  std::uint32_t ownTurns;   ///< of a dispatch: groups of own tokens that warps have taken
  std::uint32_t homeTurns;  ///< of a combine: groups of own tokens that warps have taken
};

/// What a rank of a rail's node takes in this launch of a dispatch: the rail tells its sources.
struct RailWindow {
  std::int64_t rowBegin;
  std::int64_t rows;
};

enum class SlotKind : std::uint32_t { row = 1, end = 2 };

/// First bytes of a slot.
struct SlotHeader {
  std::uint32_t epoch;  ///< of the call: a slot of another call is noticed
  SlotKind kind;
  std::int32_t token;  ///< of the source
  std::uint32_t pad;
  std::uint64_t signature;  ///< of the call's shape, as in EntryPacket
};
static_assert(sizeof(SlotHeader) == 24);

/// A token on its way to a node: header, its final row at every rank of that node (i32, -1 = none),
/// and what the receivers get.
struct DispatchSlot {
  std::uint32_t members = 1;  ///< ranks of the destination's node
  std::uint64_t rowBytes = 0;
  std::uint64_t scaleBytes = 0;
  std::uint64_t topk = 0;

  static constexpr std::size_t rows() { return sizeof(SlotHeader); }
  constexpr std::size_t x() const { return alignUp(rows() + std::size_t{members} * 4, 16); }
  constexpr std::size_t scales() const { return x() + alignUp(rowBytes, 16); }
  constexpr std::size_t topkIdx() const { return scales() + alignUp(scaleBytes, 16); }
  constexpr std::size_t topkWeights() const { return topkIdx() + topk * 8; }
  constexpr std::size_t bytes() const { return alignUp(topkWeights() + topk * 4, kLineBytes); }
};

/// A node's sum on its way home: header, bf16 row, weights.
struct SumSlot {
  std::uint64_t rowBytes = 0;
  std::uint64_t topk = 0;

  static constexpr std::size_t x() { return alignUp(sizeof(SlotHeader), 16); }
  constexpr std::size_t weights() const { return x() + alignUp(rowBytes, 16); }
  constexpr std::size_t bytes() const { return alignUp(weights() + topk * 4, kLineBytes); }
};

struct RailPlan {
  int ranks = 1;
  int members = 1;  ///< most ranks of a node
  int rings = 0;    ///< most flows, in or out, of any rank
  int lanes = 1;
  int maxExpertsPerRank = 0;
  std::uint64_t ringBytes = 0;  ///< of a lane's ring, a multiple of kLineBytes

  constexpr std::size_t laneIn(int ring, int lane) const {
    return static_cast<std::size_t>(ring) * static_cast<std::size_t>(lanes) +
           static_cast<std::size_t>(lane);
  }
  constexpr std::size_t laneAt(RailArea area, int ring, int lane) const {
    return static_cast<std::size_t>(area) * laneIn(rings, 0) + laneIn(ring, lane);
  }
  constexpr std::size_t words() const { return 0; }
  /// RunProgress of a dispatch's ring.
  constexpr std::size_t runProgress(RailArea area, int ring) const {
    return sizeof(RailWords) + (static_cast<std::size_t>(area) * static_cast<std::size_t>(rings) +
                                static_cast<std::size_t>(ring)) *
                                   sizeof(RunProgress);
  }
  /// HomeProgress of a lane of a combine.
  constexpr std::size_t homeProgress(int ring, int lane) const {
    return runProgress(RailArea::combineSend, 0) + laneIn(ring, lane) * sizeof(HomeProgress);
  }
  /// RailProgress of a lane of a combine.
  constexpr std::size_t progress(int ring, int lane) const {
    return homeProgress(rings, 0) + laneIn(ring, lane) * sizeof(RailProgress);
  }
  /// RailWindow [members]: what the rail of out-flow `ring` has put here.
  constexpr std::size_t windows(int ring) const {
    return alignUp(progress(rings, 0), kLineBytes) +
           static_cast<std::size_t>(ring) * windowsBytes();
  }
  constexpr std::size_t windowsBytes() const {
    return alignUp(static_cast<std::size_t>(members) * sizeof(RailWindow), kLineBytes);
  }
  /// What this rank puts to its sources.
  constexpr std::size_t ownWindows() const { return windows(rings); }
  /// i32 [ranks]: first row of every source's tokens that a combine has staged.
  constexpr std::size_t stagedBegin() const { return windows(rings + 1); }
  /// u64: what was last seen of the word that `source` adds to; see RailWatch.
  constexpr std::size_t seen(int source, int word) const {
    return alignUp(stagedBegin() + static_cast<std::size_t>(ranks) * 4, kLineBytes) +
           (static_cast<std::size_t>(source) * kPortWords + static_cast<std::size_t>(word)) *
               sizeof(std::uint64_t);
  }
  /// Rows of the counts table on their way to ranks of other nodes.
  constexpr std::size_t countsRowBytes() const {
    return MemoryPlan::countsRowBytes(ranks, maxExpertsPerRank);
  }
  constexpr std::size_t counts(unsigned parity, int destination) const {
    return seen(ranks, 0) +
           (static_cast<std::size_t>(parity & 1u) * static_cast<std::size_t>(ranks) +
            static_cast<std::size_t>(destination)) *
               countsRowBytes();
  }
  constexpr std::size_t ring(RailArea area, int ring, int lane) const {
    return alignUp(counts(0, 0) + 2 * static_cast<std::size_t>(ranks) * countsRowBytes(),
                   kTensorAlign) +
           laneAt(area, ring, lane) * ringBytes;
  }
  /// Of a dispatch's ring, which begins at that of lane 0.
  constexpr std::uint64_t flowRingBytes() const {
    return ringBytes * static_cast<std::uint64_t>(lanes);
  }
  /// Everything before the rings: starts as zeros.
  constexpr std::size_t head() const { return ring(RailArea::dispatchSend, 0, 0); }
  constexpr std::size_t total() const {
    return rings == 0 ? 0 : ring(static_cast<RailArea>(kRailAreas), 0, 0);
  }
  /// The largest ring when all of them together may have `bytes`.
  static constexpr std::uint64_t ringBytesFor(std::uint64_t bytes, const RailPlan& shape) {
    const auto rings = static_cast<std::uint64_t>(kRailAreas) *
                       static_cast<std::uint64_t>(shape.rings) *
                       static_cast<std::uint64_t>(shape.lanes);
    return rings == 0 ? 0 : bytes / rings / kLineBytes * kLineBytes;
  }
};

/// Words of PortPeers that a flow uses, per source rank.
struct RailCounters {
  int lanes = 1;

  static constexpr int counts() { return 0; }   ///< notifies
  static constexpr int windows() { return 1; }  ///< dispatch launches
  /// Slots that came, and slots that the other end has emptied: of a dispatch, of a combine's lane.
  static constexpr int dispatchTail() { return 2; }
  static constexpr int dispatchCredit() { return 3; }
  constexpr int combineTail(int lane) const { return 4 + lane; }
  constexpr int combineCredit(int lane) const { return 4 + lanes + lane; }
  constexpr int words() const { return combineCredit(lanes); }
};

}  // namespace mscclpp::ep
