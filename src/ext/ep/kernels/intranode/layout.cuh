#pragma once

#include "group.cuh"

/// get_dispatch_layout: counts per rank and expert, and which rank gets which token.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's own counts, in shared memory: [experts] then [ranks].
struct LayoutHistogram {
  static constexpr std::size_t bytes(int experts, int ranks) {
    return static_cast<std::size_t>(experts + ranks) * 4;
  }
};

__device__ inline void countToken(const LayoutArgs& a, int token, std::int32_t* perExpert,
                                  std::int32_t* perRank) {
  std::uint8_t* inRank = a.isTokenInRank + static_cast<std::size_t>(token) * a.ranks;
  for (int r = 0; r < a.ranks; ++r) inRank[r] = 0;
  for (int k = 0; k < a.topk; ++k) {
    const std::int64_t expert = a.topkIdx[static_cast<std::size_t>(token) * a.topk + k];
    if (expert == -1) continue;
    if (!isExpert(a.experts, expert)) {
      reportInvalidExpert(a.invalidExpert, expert);
      continue;
    }
    fetchAddLocalRelaxed(&perExpert[expert], 1);
    const int r = rankOfExpert(a.experts, expert);
    if (inRank[r]) continue;  // a token crosses to a rank once, however many experts it picks there
    inRank[r] = 1;
    fetchAddLocalRelaxed(&perRank[r], 1);
  }
}

__device__ inline void layoutKernel(const LayoutArgs& a) {
  const int experts = a.experts.experts, bins = experts + a.ranks;
  auto* histogram =
      reinterpret_cast<std::int32_t*>(sharedBytes(0, LayoutHistogram::bytes(experts, a.ranks)));
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  for (int i = thread; i < bins; i += threads) histogram[i] = 0;
  syncBlock();
  for (int t = static_cast<int>(blockIndex()) * threads + thread; t < a.tokens;
       t += static_cast<int>(gridSize()) * threads) {
    countToken(a, t, histogram, histogram + experts);
  }
  syncBlock();
  for (int i = thread; i < bins; i += threads) {
    if (histogram[i] == 0) continue;
    std::int32_t* total = i < experts ? a.tokensPerExpert + i : a.tokensPerRank + (i - experts);
    fetchAddLocalRelaxed(total, histogram[i]);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
