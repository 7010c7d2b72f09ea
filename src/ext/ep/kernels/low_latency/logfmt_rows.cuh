#pragma once

#include "../../plan/logfmt.hpp"
#include "group.cuh"

/// Rows of logarithmic values on their way between registers and lines. A thread holds a unit of
/// eight values as in bf16, but not what lies in a unit of an encoded line: codes go through shared
/// memory.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// What a block of threads moves at a time: blocks of the format, 64 threads each, and their lines.
inline constexpr int kLogfmtThreads = logfmt::kBlockUnits / kLineUnits * kLineLanes;
inline constexpr int kLogfmtBlocks = kLowLatencyThreads / kLogfmtThreads;
inline constexpr int kLogfmtLines = kLogfmtBlocks * logfmt::kBlockLines;
static_assert(kLowLatencyThreads % kLogfmtThreads == 0);

/// A pass of an encoded row in shared memory.
struct LogfmtPass {
  Vec16 units[kLogfmtLines * kLineUnits];  ///< payloads of the lines
  std::uint32_t tails[kLogfmtLines * 2];   ///< what their tails carry: scales
  /// The number of the row of which some warp has no part: nobody may use it.
  std::uint32_t incomplete;
};

/// This thread's part in a pass of a row of `rowUnits` units.
template <class Path>
struct LogfmtRow {
  RowUnits<Path> row;

  // ---- values: a thread has a unit -------------------------------------------------------------

  __device__ __forceinline__ static int blockOf() {
    return static_cast<int>(threadIndex()) / kLogfmtThreads;
  }
  /// The group, of the block: a line of bf16.
  __device__ __forceinline__ static int groupOf() {
    return static_cast<int>(threadIndex()) % kLogfmtThreads / kLineLanes;
  }
  __device__ __forceinline__ int unitsOf(int pass, int block) const {
    return logfmt::unitsOfBlock(row.units, pass * kLogfmtBlocks + block);
  }
  /// Where this thread's codes are: their low bytes, and the upper bits.
  struct Codes {
    std::uint32_t* low;
    std::uint16_t* high;
    std::uint32_t* scale;
  };
  __device__ __forceinline__ Codes codesOf(LogfmtPass& to, int pass) const {
    const int unit = groupOf() * kLineUnits + static_cast<int>(laneId()) % kLineLanes;
    auto* const bytes =
        reinterpret_cast<char*>(&to.units[blockOf() * logfmt::kBlockLines * kLineUnits]);
    return {
        reinterpret_cast<std::uint32_t*>(bytes + logfmt::lowAt(unit)),
        reinterpret_cast<std::uint16_t*>(bytes + logfmt::highAt(unitsOf(pass, blockOf()), unit)),
        &to.tails[blockOf() * logfmt::kBlockLines * 2 + groupOf()]};
  }

  /// All lanes of a warp.
  __device__ __forceinline__ void encode(LogfmtPass& to, const float (&value)[8], int pass) const {
    logfmt::Extremes extremes;
    if (row.hasUnit(pass)) {
#pragma unroll
      for (int i = 0; i < 8; ++i) extremes.include(floatToBits(value[i]));
    }
#pragma unroll
    for (int distance = 1; distance < kLineLanes; distance *= 2) {
      extremes.include(logfmt::Extremes{shuffleXor(extremes.least, distance),
                                        shuffleXor(extremes.most, distance)});
    }
    if (!row.hasLine(pass)) return;
    const std::uint32_t scale = logfmt::scaleOf(extremes);
    const Codes codes = codesOf(to, pass);
    if (laneId() % kLineLanes == kLineUnits) *codes.scale = scale;
    if (!row.hasUnit(pass)) return;
    const auto encoder = logfmt::Encoder::make(scale);
    logfmt::CodeUnit unit;
#pragma unroll
    for (int i = 0; i < 8; ++i) unit.set(i, encoder.code(floatToBits(value[i])));
    codes.low[0] = unit.low[0];
    codes.low[1] = unit.low[1];
    *codes.high = static_cast<std::uint16_t>(unit.high);
  }
  __device__ __forceinline__ void addDecoded(float (&sum)[8], LogfmtPass& from, int pass) const {
    if (!row.hasUnit(pass)) return;
    const Codes codes = codesOf(from, pass);
    const auto decoder = logfmt::Decoder::make(*codes.scale);
    const logfmt::CodeUnit unit{{codes.low[0], codes.low[1]}, *codes.high};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += bitsToFloat(decoder.valueBits(unit.at(i)));
  }

  // ---- lines: eight threads have one -----------------------------------------------------------

  __device__ __forceinline__ static int lineOf() {
    return static_cast<int>(threadIndex()) / kLineLanes;
  }
  __device__ __forceinline__ bool hasLine(int pass) const {
    const int block = lineOf() / logfmt::kBlockLines;
    if (block >= kLogfmtBlocks) return false;
    const int units = unitsOf(pass, block);
    return units > 0 && lineOf() % logfmt::kBlockLines < logfmt::blockLines(units);
  }
  /// In the row.
  __device__ __forceinline__ static std::size_t offsetOf(int pass) {
    return static_cast<std::size_t>(pass * kLogfmtLines + lineOf()) * kLineSize;
  }
  __device__ __forceinline__ Vec16 lineUnit(const LogfmtPass& from, int pass) const {
    if (!hasLine(pass)) return {};
    const int lane = static_cast<int>(laneId()) % kLineLanes;
    if (lane < kLineUnits) return from.units[lineOf() * kLineUnits + lane];
    return {{from.tails[2 * lineOf()], from.tails[2 * lineOf() + 1], 0, 0}};
  }
  __device__ __forceinline__ void keepLineUnit(LogfmtPass& to, const Vec16& unit, int pass) const {
    if (!hasLine(pass)) return;
    const int lane = static_cast<int>(laneId()) % kLineLanes;
    if (lane < kLineUnits) {
      to.units[lineOf() * kLineUnits + lane] = unit;
    } else {
      to.tails[2 * lineOf()] = unit.w[0];
      to.tails[2 * lineOf() + 1] = unit.w[1];
    }
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
