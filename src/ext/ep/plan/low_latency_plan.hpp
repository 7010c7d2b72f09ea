#pragma once

#include <cstddef>
#include <cstdint>

#include <mscclpp/device/line_types.hpp>

#include "logfmt.hpp"
#include "memory_plan.hpp"

/// The low-latency region of the symmetric heap. It is made of lines (device/line.hpp) only, at
/// places that the region's size alone decides: whatever shapes later calls have, an epoch is never
/// looked for where another call's payload may lie. Nothing is cleaned between calls.
namespace mscclpp::ep {

/// Both directions have their own epochs, areas and counters.
enum class LowLatencyKind : std::uint32_t { dispatch, combine };
inline constexpr int kLowLatencyKinds = 2;

/// What all blocks of one kernel add to an epoch counter together.
inline constexpr std::uint64_t kEpochStep = std::uint64_t{1} << 20;

/// Words of this rank's own kernels. A counter holds (calls finished) * kEpochStep; every block
/// adds its share when it ends, so that all blocks of a call read the same epoch, with any grid.
/// Receive halves are counted by the parity of their epoch: two calls may be under way, and the
/// later one may be received first.
struct alignas(kLineBytes) LowLatencyWords {
  std::uint64_t sent[kLowLatencyKinds];
  std::uint64_t received[kLowLatencyKinds][2];
  /// Peers behind port channels: blocks that have written their rows, counted as above, and the
  /// last epochs whose end those peers were told.
  std::uint64_t written[kLowLatencyKinds];
  std::uint64_t toldPorts[kLowLatencyKinds][2];
  std::uint32_t broken;  ///< a wait has failed: later kernels tell peers nothing
};
/// What arrives behind a port channel. One signal each, per call.
enum class PortMessage : std::uint32_t { ids, weights, partial };
inline constexpr int kPortMessages = 3;
/// The last epoch of this parity among the first `calls` of them.
constexpr std::uint64_t epochOfCalls(std::uint64_t calls, unsigned parity) {
  return 2 * calls - parity;
}
constexpr std::uint64_t callsUntil(std::uint64_t epoch, unsigned parity) {
  return (epoch + parity) / 2;
}
/// What a peer writes here, and what this rank has decided about it.
struct alignas(kLineBytes) LowLatencyPeer {
  /// By the peer's receive halves: the last epoch of this parity that it has finished (low bits).
  /// By this rank's block 0 when the peer is behind a port channel.
  std::uint32_t finished[kLowLatencyKinds][2];
  std::uint64_t verdict;  ///< 2 * epoch + (its ids did not come in time); see settleSources()
  std::uint32_t masked;   ///< this rank does without the peer
  /// A peer behind a port channel: how often each of its messages has come. Block 0 looks at the
  /// channel, which may be host memory, for all.
  std::uint64_t arrived[kPortMessages];
  std::uint64_t lost[kPortMessages];  ///< block 0 has given up waiting for that one
};

constexpr std::size_t linesFor(std::size_t units) {
  return ceilDiv(units, device::kLineUnits);
}
/// Expert ids travel as 16 bits, 8 to a unit.
inline constexpr int kIdsPerUnit = 8;
inline constexpr int kIdsPerLine = kIdsPerUnit * device::kLineUnits;
inline constexpr std::uint16_t kNoExpert = 0xFFFF;
inline constexpr int kMaxLowLatencyExperts = kNoExpert;
inline constexpr int kMaxLowLatencyTokens = 4096;
inline constexpr int kMaxLowLatencyTopk = 32;
inline constexpr int kMaxLowLatencyHidden = 131072;
inline constexpr int kWeightsPerLine = 4 * device::kLineUnits;

/// Rows of a source's first tokens that go to one rank: one per token that selects an expert there,
/// and one per selection.
struct RowCount {
  static constexpr int kTokenBits = 13;
  std::uint32_t packed = 0;

  static constexpr RowCount ofToken(int selections) {
    return {(selections > 0 ? 1u : 0u) | static_cast<std::uint32_t>(selections) << kTokenBits};
  }
  constexpr int tokens() const { return static_cast<int>(packed & ((1u << kTokenBits) - 1)); }
  constexpr int selections() const { return static_cast<int>(packed >> kTokenBits); }
};
static_assert(kMaxLowLatencyTokens < 1 << RowCount::kTokenBits);
static_assert(std::uint64_t{kMaxLowLatencyTokens} * kMaxLowLatencyTopk <
              std::uint64_t{1} << (32 - RowCount::kTokenBits));

/// What a dispatch notes about ranks behind port channels, for the combine: per source a RowCount
/// of its first 0, 1, .. tokens, and at last how many of all its selections ranks below this one
/// own; then the same of what goes from here to each rank, for the tokens that go there.
struct RowTable {
  int ranks = 1, maxTokens = 0;

  constexpr std::int64_t width() const { return maxTokens + 2; }
  constexpr std::int64_t from(int source, int tokens) const { return source * width() + tokens; }
  constexpr std::int64_t to(int rank, int tokens) const { return from(ranks + rank, tokens); }
  constexpr std::int64_t baseFrom(int source) const { return from(source, maxTokens + 1); }
  constexpr std::int64_t baseTo(int rank) const { return to(rank, maxTokens + 1); }
};

/// Units of a row: bf16 values, or e4m3 values and then their scales, 4 to a unit.
constexpr int bf16Units(int hidden) {
  return hidden / 8;
}
constexpr int e4m3ValueUnits(int hidden) {
  return (hidden + 15) / 16;
}
constexpr int scaleBlocks(int hidden) {
  return (hidden + 127) / 128;
}
constexpr int e4m3Units(int hidden) {
  return e4m3ValueUnits(hidden) + (scaleBlocks(hidden) + 3) / 4;
}

/// Offsets inside a dispatch area: per source a block of its ids and its rows. The first line of
/// the ids is used by sources behind port channels only: their block arrives as one message, with
/// the rows close together. Made on the host: a kernel only multiplies and adds.
struct DispatchArea {
  int ranks = 1;
  int maxTokens = 0;
  int topk = 0;
  int rowUnits = 0;
  int idLines = 1;  ///< of a source, at least one: its tail tells how many tokens there are
  std::uint32_t rowBytes = 0;
  std::uint64_t blockBytes = 0;  ///< of a source

  static constexpr DispatchArea make(int ranks, int maxTokens, int topk, int rowUnits) {
    DispatchArea area{ranks, maxTokens, topk, rowUnits};
    const std::size_t ids = static_cast<std::size_t>(maxTokens) * static_cast<std::size_t>(topk);
    area.idLines = ids > 0 ? static_cast<int>(ceilDiv(ids, kIdsPerLine)) : 1;
    area.rowBytes = static_cast<std::uint32_t>(linesFor(static_cast<std::size_t>(rowUnits)) *
                                               device::kLineSize);
    area.blockBytes = static_cast<std::uint64_t>(area.idLines) * device::kLineSize +
                      static_cast<std::uint64_t>(maxTokens) * area.rowBytes;
    return area;
  }
  constexpr std::size_t block(int source) const {
    return static_cast<std::size_t>(source) * static_cast<std::size_t>(blockBytes);
  }
  /// Line 0, the hello, lies in the region's head instead when the source has this memory mapped.
  constexpr std::size_t ids(int source, int line) const {
    return block(source) + static_cast<std::uint32_t>(line) * device::kLineSize;
  }
  /// `place`: the token, or behind port channels its place among those that go to this rank.
  constexpr std::size_t row(int source, int place) const {
    return ids(source, idLines) +
           static_cast<std::size_t>(static_cast<std::uint32_t>(place)) * rowBytes;
  }
  constexpr std::size_t total() const { return block(ranks); }
};

/// Offsets inside a combine area: per home, the weights of its tokens; per expert rank, its partial
/// sums of this rank's tokens; and this rank's own partial sums.
struct CombineArea {
  int ranks = 1;
  int maxTokens = 0;
  int topk = 0;
  int rowUnits = 0;     ///< of bf16
  int weightLines = 1;  ///< of a token
  std::uint32_t rowBytes = 0;
  std::uint64_t partialAt = 0, ownAt = 0;

  /// `logfmt`: peers' sums travel that way, never in more lines than bf16 takes.
  static constexpr CombineArea make(int ranks, int maxTokens, int topk, int rowUnits,
                                    bool logfmt = false) {
    CombineArea area{ranks, maxTokens, topk, rowUnits};
    area.weightLines = static_cast<int>(ceilDiv(static_cast<std::size_t>(topk), kWeightsPerLine));
    const std::size_t lines = logfmt ? static_cast<std::size_t>(logfmt::rowLines(rowUnits))
                                     : linesFor(static_cast<std::size_t>(rowUnits));
    area.rowBytes = static_cast<std::uint32_t>(lines * device::kLineSize);
    area.partialAt = area.weights(ranks, 0);
    area.ownAt = area.partial(ranks, 0);
    return area;
  }
  constexpr std::size_t weights(int home, int token) const {
    return static_cast<std::size_t>(
               static_cast<std::uint32_t>((home * maxTokens + token) * weightLines)) *
           device::kLineSize;
  }
  /// `place`: as in DispatchArea::row().
  constexpr std::size_t partial(int from, int place) const {
    return static_cast<std::size_t>(partialAt) +
           static_cast<std::size_t>(static_cast<std::uint32_t>(from * maxTokens + place)) *
               rowBytes;
  }
  /// Own sums between the halves of a call: fp32, so that halves and whole calls give equal bits.
  constexpr std::size_t ownSum(int token) const {
    return static_cast<std::size_t>(ownAt) +
           static_cast<std::size_t>(static_cast<std::uint32_t>(token)) *
               static_cast<std::uint32_t>(rowUnits * 2) * sizeof(device::Vec16);
  }
  constexpr std::size_t total() const { return alignUp(ownSum(maxTokens), device::kLineSize); }
};

/// Selections of different experts that a token may have on one rank.
constexpr int mostOnOneRank(int topk, int experts, int ranks) {
  const int local = (experts + ranks - 1) / ranks;
  return topk < local ? topk : local;
}

/// Offsets inside a combine area whose calls are reduced at the tokens' home: a row per selection
/// of this rank's tokens. Those of peers whose memory is mapped, and own ones between the halves of
/// a call, lie at the selection's number; those from behind port channels in a part of their own,
/// close together per peer. The outbox of the same size has a row for every selection that a peer
/// behind a port channel may have here.
struct SourceArea {
  int ranks = 1;
  int maxTokens = 0;
  int topk = 0;
  int rowUnits = 0;
  int outboxRows = 0;  ///< of a peer; 0: no peer is behind a port channel
  std::uint32_t rowBytes = 0;
  std::uint64_t portsAt = 0;

  /// `perToken`: selections that a token may have on one rank when the group spans nodes, else 0.
  static constexpr SourceArea make(int ranks, int maxTokens, int topk, int rowUnits, int perToken) {
    SourceArea area{ranks, maxTokens, topk, rowUnits, maxTokens * perToken};
    area.rowBytes = static_cast<std::uint32_t>(linesFor(static_cast<std::size_t>(rowUnits)) *
                                               device::kLineSize);
    area.portsAt = area.row(maxTokens, 0);
    return area;
  }
  constexpr std::size_t row(int token, int k) const {
    return static_cast<std::size_t>(static_cast<std::uint32_t>(token * topk + k)) * rowBytes;
  }
  /// `place`: selections of this rank's tokens that lower ranks own, and earlier ones of the peer.
  constexpr std::size_t portRow(int place) const {
    return static_cast<std::size_t>(portsAt) + row(0, place);
  }
  /// In the outbox: the `place`-th selection of a peer's tokens that this rank owns.
  constexpr std::size_t outboxRow(int peer, int place) const {
    return (static_cast<std::size_t>(peer) * static_cast<std::size_t>(outboxRows) +
            static_cast<std::size_t>(place)) *
           rowBytes;
  }
  constexpr std::size_t received() const {
    return static_cast<std::size_t>(portsAt) * (outboxRows > 0 ? 2 : 1);
  }
  constexpr std::size_t total() const {
    const std::size_t outbox = outboxRow(ranks, 0);
    return outbox > received() ? outbox : received();
  }
};

/// The region: words, peers' words, hellos, then four areas of equal size: (dispatch, combine) x
/// (even, odd epochs). A hello is a peer's first line of a call: its tail tells how many tokens it
/// has (dispatch), and which epoch of the other parity it has finished.
struct LowLatencyPlan {
  int ranks = 1;
  std::uint64_t bytes = 0;  ///< of the region; 0 = there is none

  constexpr std::size_t words() const { return 0; }
  constexpr std::size_t peer(int rank) const {
    return sizeof(LowLatencyWords) + static_cast<std::size_t>(rank) * sizeof(LowLatencyPeer);
  }
  constexpr std::size_t hello(LowLatencyKind kind, std::uint64_t epoch, int from) const {
    return peer(ranks) +
           ((2 * static_cast<std::size_t>(kind) + static_cast<std::size_t>(epoch & 1)) *
                static_cast<std::size_t>(ranks) +
            static_cast<std::size_t>(from)) *
               device::kLineSize;
  }
  constexpr std::size_t head() const {
    return peer(ranks) + 4 * static_cast<std::size_t>(ranks) * device::kLineSize;
  }
  constexpr std::size_t areaBytes() const {
    return bytes > head() ? (static_cast<std::size_t>(bytes) - head()) / 4 / device::kLineSize *
                                device::kLineSize
                          : 0;
  }
  constexpr std::size_t area(LowLatencyKind kind, std::uint64_t epoch) const {
    return head() +
           (2 * static_cast<std::size_t>(kind) + static_cast<std::size_t>(epoch & 1)) * areaBytes();
  }
  /// Bytes of a region whose areas hold `most` bytes.
  static constexpr std::size_t bytesFor(int ranks, std::size_t most) {
    return LowLatencyPlan{ranks, 0}.head() + 4 * alignUp(most, device::kLineSize);
  }
};

}  // namespace mscclpp::ep
