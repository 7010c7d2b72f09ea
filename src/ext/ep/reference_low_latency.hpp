#pragma once

#include <cstdint>
#include <vector>

#include "reference.hpp"

/// The low-latency calls in one process; see reference.hpp.
namespace mscclpp::ep::reference {

/// Rank r hosts experts r * ceil(experts / ranks) and following.
Placement lowLatencyPlacement(int experts, int ranks);

/// What a low-latency dispatch gives one rank, without the rows themselves. A local expert has
/// ranks * maxTokens rows.
struct LowLatencyReceived {
  int localExperts = 0, ranks = 0, maxTokens = 0, topk = 0;
  std::vector<std::int32_t> count;        ///< [local experts]
  std::vector<std::int64_t> layoutRange;  ///< [local experts, ranks] begin << 32 | rows
  std::vector<std::int32_t> slots;        ///< [ranks, maxTokens, topk], -1 = not here
  std::vector<Source> sourceOf;           ///< [local experts, ranks * maxTokens], rank -1 = unused

  int slotOf(int rank, int token, int k) const;
};
LowLatencyReceived lowLatencyDispatch(const std::vector<Routing>& all, const Placement& placement,
                                      int maxTokens, int receiver);

/// A bf16 row as e4m3 values and a scale per 128 of them.
struct QuantisedRow {
  std::vector<std::uint8_t> values;
  std::vector<float> scales;
};
QuantisedRow quantise(const std::uint16_t* row, int hidden, bool roundScale);
/// Scales as UE8M0, four to a word.
std::vector<std::int32_t> packScales(const std::vector<float>& scales);

/// bf16 [tokens, hidden] of rank `home`: its own experts' rows times their weights in fp32 (fused
/// multiply-add, in the order of k), then every other rank's sum, rounded to bf16, in ascending
/// order of the ranks. `y`: per rank bf16 [local experts * ranks * maxTokens, hidden].
std::vector<std::uint16_t> lowLatencyCombine(const std::vector<LowLatencyReceived>& received,
                                             const std::vector<std::vector<std::uint16_t>>& y,
                                             const Routing& routing, const Placement& placement,
                                             int home, int hidden);
/// The same with use_logfmt: the other ranks' sums travel as plan/logfmt.hpp says.
std::vector<std::uint16_t> lowLatencyCombineLogfmt(const std::vector<LowLatencyReceived>& received,
                                                   const std::vector<std::vector<std::uint16_t>>& y,
                                                   const Routing& routing,
                                                   const Placement& placement, int home,
                                                   int hidden);
/// A row as it comes out at the other end.
std::vector<float> asLogfmt(const std::vector<float>& row);
/// The same, reduced at home: all rows times their weights in fp32 (fused multiply-add, in the
/// order of k), rounded once.
std::vector<std::uint16_t> lowLatencyCombineAtSource(
    const std::vector<LowLatencyReceived>& received,
    const std::vector<std::vector<std::uint16_t>>& y, const Routing& routing,
    const Placement& placement, int home, int hidden);

}  // namespace mscclpp::ep::reference
