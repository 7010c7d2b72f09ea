#pragma once

#include "device/primitive_kernels.cuh"

/// Kernels that test lines (line.hpp) and what the low-latency kernels use beside them.
namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

inline constexpr int kLineRounds = 25;
inline constexpr int kLinesInTurn = 6;  ///< two warps: the second one has two lines less

struct LineArgs {
  char* there;  ///< [2][kLinesInTurn] lines, by parity of the round
  char* back;
  uint32_t* wrong;   ///< units that are not what was sent
  uint32_t* second;  ///< [kLineRounds] the tail's second word, as seen by itself
  LineWrites writes;
  WaitControl control;
};

__device__ inline char* lineOf(char* lines, uint64_t epoch) {
  const unsigned line = threadIndex() / kLineLanes;
  const unsigned inside = line < kLinesInTurn ? line : 0;
  return lines + ((epoch & 1) * kLinesInTurn + inside) * kLineSize;
}
__device__ inline Vec16 lineUnit(uint64_t epoch, uint32_t plus) {
  const auto base = static_cast<uint32_t>(epoch) * 1000 + threadIndex() * 4 + plus;
  return {{base, base + 1, base + 2, base + 3}};
}
/// Block 0 sends, block 1 adds one to every word and sends back. The lines are used in turn and
/// never cleaned.
__device__ inline void linePingPong(const LineArgs& args) {
  const bool active = threadIndex() / kLineLanes < kLinesInTurn;
  const bool tail = laneId() % kLineLanes == kLineUnits;
  for (uint64_t epoch = 1; epoch <= kLineRounds; ++epoch) {
    char* const there = lineOf(args.there, epoch);
    char* const back = lineOf(args.back, epoch);
    if (blockIndex() == 0) {
      pushLine(there, lineUnit(epoch, 0), epoch, active, args.writes);
    }
    char* const mine = blockIndex() == 0 ? back : there;
    Vec16 unit = peekLine(mine, active);
    if (!pullLine(args.control, mine, unit, epoch, active, {5, 1}, args.writes)) return;
    const Vec16 expected = lineUnit(epoch, blockIndex() == 0 ? 1 : 0);
    const bool same = unit.w[0] == expected.w[0] && unit.w[1] == expected.w[1] &&
                      (tail || (unit.w[2] == expected.w[2] && unit.w[3] == expected.w[3]));
    if (active && !same) fetchAddRelaxed(args.wrong, 1);
    if (blockIndex() == 0) {
      if (threadIndex() == 0) args.second[epoch - 1] = loadPermission(&lineTail(back).second);
      continue;
    }
    for (uint32_t& word : unit.w) ++word;
    pushLine(back, unit, epoch, active, args.writes);
  }
}
/// A line that never comes with this epoch.
__device__ inline void lineMissing(const LineArgs& args) {
  Vec16 unit = peekLine(args.there, true);
  args.second[threadIndex()] =
      pullLine(args.control, args.there, unit, 9, true, {6, 4}, args.writes) ? 1 : 0;
}

__device__ inline void warpFolds(const OutArgs& args) {
  uint32_t* out = args.out + globalThread() * 4;
  const unsigned lane = laneId();
  out[0] = sumWarp(lane * 5);
  out[1] = orWarp(lane == 3 || lane == 17 ? 1u << lane : 0u);
  out[2] = minHalves(lane << 16 | 7, 4u << 16 | lane);
  const float four[4] = {1.0f, -2.0f, 448.0f, static_cast<float>(lane)};
  out[3] = narrowE4m3(four);
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
