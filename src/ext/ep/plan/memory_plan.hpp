#pragma once

#include <cstddef>
#include <cstdint>

/// The one layout of the symmetric heap: host and kernels compute every offset from these types.
/// nvcc compiles the constexpr functions for the device too (--expt-relaxed-constexpr).
namespace mscclpp::ep {

/// Words that different GPUs write stay this far apart.
inline constexpr std::size_t kLineBytes = 128;
/// Tensors in the heap start at multiples of this.
inline constexpr std::size_t kTensorAlign = 256;
/// Rows per flag when a combine stages rows; one release per chunk (field measurement: 8).
inline constexpr int kChunkRows = 8;
/// Chunk flags per pair of ranks: bounds the tokens of one combine wave.
inline constexpr int kMaxChunks = 4096;

constexpr std::size_t alignUp(std::size_t n, std::size_t to) {
  return (n + to - 1) / to * to;
}
constexpr std::size_t ceilDiv(std::size_t n, std::size_t by) {
  return (n + by - 1) / by;
}

/// What a rank tells a peer when its kernel starts: where the peer finds or puts rows. Written by
/// the peer's payload first, `epoch` last with a release; valid until the writer's next kernel,
/// which cannot start before the reader has finished this one.
struct alignas(kLineBytes) EntryPacket {
  std::uint32_t epoch;
  std::uint32_t staged;   ///< combine: rows come chunk by chunk, flags in `chunks`
  std::uint64_t base;     ///< heap offset of row `rowBegin`
  std::uint64_t weights;  ///< combine: heap offset of the weights of row `weightsBegin`
  std::int64_t rowBegin;  ///< first row of this window
  std::int64_t weightsBegin;
  std::int64_t rows;        ///< rows of this window; the receive layout's capacity
  std::uint64_t signature;  ///< of the call's shape: unequal calls are refused, not mixed
};
static_assert(sizeof(EntryPacket) == kLineBytes);

struct alignas(kLineBytes) Flag {
  std::uint32_t epoch;
};

/// What one peer writes into this rank's heap.
struct PeerBox {
  EntryPacket entry;
  Flag counts;  ///< the peer's row of the counts table is complete
  Flag done;    ///< the peer's kernel has finished writing to, or reading from, this rank
};

/// Words only this rank's own kernels touch.
struct alignas(kLineBytes) LocalWords {
  std::uint32_t epoch;         ///< of the last finished kernel
  std::uint32_t blocksDone;    ///< and kGaveUp for every wait that failed
  std::uint32_t ticket;        ///< next chunk of work
  std::uint32_t scanned;       ///< notify: ranks counted
  std::int64_t invalidExpert;  ///< a topk index out of range, 0 = none (0 itself never is)
  std::uint32_t broken;        ///< a kernel has given up: the next ones tell peers nothing
  std::uint64_t notifies;      ///< finished ones
};

/// Head of a row of the counts table: what a source rank tells a receiver, followed by
/// `ranks` token counts (i32) and the receiver's experts' counts (i32).
struct CountsHeader {
  std::uint64_t signature;
  std::int64_t invalidExpert;
  std::int32_t numTokens;
  std::int32_t pad;
};

struct MemoryPlan {
  int ranks = 1;
  int maxExpertsPerRank = 0;
  std::uint64_t stagingBytes = 0;
  std::uint64_t poolBytes = 0;
  std::uint64_t lowLatencyBytes = 0;  ///< of the region that LowLatencyPlan lays out
  std::uint64_t railBytes = 0;        ///< of the region that RailPlan lays out
  /// What leaves through port channels is gathered here, laid out as the region's areas.
  std::uint64_t lowLatencyOutboxBytes = 0;

  constexpr std::size_t localWords() const { return 0; }
  constexpr std::size_t peerBox(int peer) const {
    return sizeof(LocalWords) + static_cast<std::size_t>(peer) * sizeof(PeerBox);
  }
  static constexpr std::size_t countsRowBytes(int ranks, int maxExpertsPerRank) {
    return alignUp(
        sizeof(CountsHeader) +
            (static_cast<std::size_t>(ranks) + static_cast<std::size_t>(maxExpertsPerRank)) * 4,
        kLineBytes);
  }
  constexpr std::size_t countsRowBytes() const { return countsRowBytes(ranks, maxExpertsPerRank); }
  /// Two tables, used in turn: a rank may be one notify ahead of a reader, never two.
  constexpr std::size_t countsRow(unsigned parity, int source) const {
    return peerBox(ranks) +
           (static_cast<std::size_t>(parity & 1u) * static_cast<std::size_t>(ranks) +
            static_cast<std::size_t>(source)) *
               countsRowBytes();
  }
  constexpr std::size_t chunkFlags(int source) const {
    return countsRow(0, 0) + 2 * static_cast<std::size_t>(ranks) * countsRowBytes() +
           static_cast<std::size_t>(source) * kMaxChunks * 4;
  }
  constexpr std::size_t staging() const { return alignUp(chunkFlags(ranks), kTensorAlign); }
  constexpr std::size_t pool() const {
    return alignUp(staging() + static_cast<std::size_t>(stagingBytes), kTensorAlign);
  }
  constexpr std::size_t poolEnd() const { return pool() + static_cast<std::size_t>(poolBytes); }
  constexpr std::size_t lowLatency() const { return alignUp(poolEnd(), kTensorAlign); }
  constexpr std::size_t lowLatencyOutbox() const {
    return alignUp(lowLatency() + static_cast<std::size_t>(lowLatencyBytes), kTensorAlign);
  }
  constexpr std::size_t rails() const {
    return alignUp(lowLatencyOutbox() + static_cast<std::size_t>(lowLatencyOutboxBytes),
                   kTensorAlign);
  }
  constexpr std::size_t total() const { return rails() + static_cast<std::size_t>(railBytes); }
};

/// Where the parts of received rows lie, relative to the window's base. `rows` is the capacity.
struct RecvLayout {
  std::uint64_t rows = 0;
  std::uint64_t rowBytes = 0;
  std::uint64_t scaleBytes = 0;  ///< per row; 0 = no scales
  std::uint64_t topk = 0;        ///< 0 = no indices and weights

  constexpr std::size_t x() const { return 0; }
  constexpr std::size_t scales() const { return alignUp(rows * rowBytes, kTensorAlign); }
  constexpr std::size_t topkIdx() const {
    return scales() + alignUp(rows * scaleBytes, kTensorAlign);
  }
  constexpr std::size_t topkWeights() const {
    return topkIdx() + alignUp(rows * topk * 8, kTensorAlign);
  }
  constexpr std::size_t sourceTokens() const {
    return topkWeights() + alignUp(rows * topk * 4, kTensorAlign);
  }
  constexpr std::size_t total() const { return sourceTokens() + alignUp(rows * 4, kTensorAlign); }
  constexpr std::uint64_t bytesPerRow() const { return rowBytes + scaleBytes + topk * 12 + 4; }
  /// Rows of the largest window that fits into `bytes`.
  static constexpr std::uint64_t rowsThatFit(std::uint64_t bytes, RecvLayout shape) {
    const std::uint64_t padding = 5 * kTensorAlign;
    return bytes > padding ? (bytes - padding) / shape.bytesPerRow() : 0;
  }
};

/// Staged rows of a combine: for every destination a run of `tokens` rows, then their weights.
struct CombineStaging {
  std::uint64_t tokens = 0;  ///< per destination and wave
  std::uint64_t destinations = 0;
  std::uint64_t rowBytes = 0;
  std::uint64_t topk = 0;

  constexpr std::size_t rows(std::uint64_t destination) const {
    return destination * tokens * rowBytes;
  }
  constexpr std::size_t weights(std::uint64_t destination) const {
    return alignUp(destinations * tokens * rowBytes, kTensorAlign) +
           destination * alignUp(tokens * topk * 4, 16);
  }
  constexpr std::size_t total() const { return weights(destinations); }
  /// Tokens per wave that fit into `bytes`, a multiple of kChunkRows; 0 = not even one chunk.
  static constexpr std::uint64_t tokensThatFit(std::uint64_t bytes, CombineStaging shape) {
    const std::uint64_t perToken = (shape.rowBytes + shape.topk * 4) * shape.destinations;
    const std::uint64_t padding = kTensorAlign + 16 * shape.destinations;
    const std::uint64_t limit = static_cast<std::uint64_t>(kMaxChunks) * kChunkRows;
    if (shape.destinations == 0) return limit;
    const std::uint64_t fit = bytes > padding ? (bytes - padding) / perToken : 0;
    return (fit < limit ? fit : limit) / kChunkRows * kChunkRows;
  }
};

}  // namespace mscclpp::ep
