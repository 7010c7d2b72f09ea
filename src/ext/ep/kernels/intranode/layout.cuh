#pragma once

#include "group.cuh"

/// get_dispatch_layout: counts per rank and expert, and which rank gets which token.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's own counts, in shared memory: [experts], [ranks], [nodes].
struct LayoutHistogram {
  static constexpr std::size_t bytes(const LayoutArgs& a) {
    return static_cast<std::size_t>(a.experts.experts + a.ranks + a.rails.nodes) * 4;
  }
};

/// A token counts once for a node, whatever ranks it picks there.
__device__ inline void countNodes(const LayoutArgs& a, const std::uint8_t* inRank,
                                  std::int32_t* perNode) {
  for (int n = 0; n < a.rails.nodes; ++n) {
    int taken = 0;
    for (int i = a.rails.nodeFirst[n]; i < a.rails.nodeFirst[n + 1]; ++i) {
      taken |= inRank[a.rails.nodeRanks[i]];
    }
    if (taken != 0) fetchAddLocalRelaxed(&perNode[n], 1);
  }
}

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
  if (a.rails.nodes > 1) countNodes(a, inRank, perRank + a.ranks);
}

__device__ inline void layoutKernel(const LayoutArgs& a) {
  const int experts = a.experts.experts, bins = experts + a.ranks + a.rails.nodes;
  auto* histogram = reinterpret_cast<std::int32_t*>(sharedBytes(0, LayoutHistogram::bytes(a)));
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
    const int r = i - experts;
    std::int32_t* total = r < 0         ? a.tokensPerExpert + i
                          : r < a.ranks ? a.tokensPerRank + r
                                        : a.tokensPerNode + (r - a.ranks);
    fetchAddLocalRelaxed(total, histogram[i]);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
