#include "low_latency_traffic.hpp"

#include <algorithm>
#include <vector>

#include "plan/low_latency_plan.hpp"
#include "reference_low_latency.hpp"

namespace mscclpp::ep {
namespace {

/// Tokens and selections of one rank that go to each rank.
struct Destinations {
  std::vector<int> tokens, selections;
};

Destinations destinationsOf(const reference::Routing& routing,
                            const reference::Placement& placement, int ranks) {
  const auto size = static_cast<std::size_t>(ranks);
  Destinations to{std::vector<int>(size), std::vector<int>(size)};
  std::vector<int> lastToken(size, -1);
  for (std::size_t i = 0; i < routing.topkIdx.size(); ++i) {
    if (routing.topkIdx[i] < 0) continue;
    const int token = static_cast<int>(i) / routing.topk;
    const auto rank =
        static_cast<std::size_t>(placement.rankOf[static_cast<std::size_t>(routing.topkIdx[i])]);
    ++to.selections[rank];
    if (lastToken[rank] != token) ++to.tokens[rank];
    lastToken[rank] = token;
  }
  return to;
}

void divide(LowLatencyTraffic& total, double by) {
  for (double* value : {&total.memoryBytes, &total.puts, &total.putBytes, &total.adds, &total.rows,
                        &total.rowBytes}) {
    *value /= by;
  }
}

}  // namespace

LowLatencyRoundTrip lowLatencyTraffic(const LowLatencyShape& shape) {
  const reference::Placement placement = reference::lowLatencyPlacement(shape.experts, shape.ranks);
  const DispatchArea out =
      DispatchArea::make(shape.ranks, shape.tokens, shape.topk,
                         shape.fp8 ? e4m3Units(shape.hidden) : bf16Units(shape.hidden));
  const CombineArea back =
      CombineArea::make(shape.ranks, shape.tokens, shape.topk, bf16Units(shape.hidden));
  const double idBytes = static_cast<double>(out.row(0, 0) - out.block(0));
  const double weightBytes =
      static_cast<double>(back.weights(0, shape.tokens) - back.weights(0, 0));
  const double bf16Row = 2.0 * shape.hidden;
  const double sentRow = shape.fp8 ? shape.hidden + 4.0 * scaleBlocks(shape.hidden) : bf16Row;
  LowLatencyRoundTrip total;
  for (int source = 0; source < shape.ranks; ++source) {
    const Destinations to = destinationsOf(
        reference::makeRouting(
            {reference::Pattern::uniform, shape.tokens, shape.topk, source, shape.seed}, placement),
        placement, shape.ranks);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      if (rank == source) continue;
      const auto at = static_cast<std::size_t>(rank);
      const double there = idBytes + static_cast<double>(to.tokens[at]) * out.rowBytes;
      const double home = weightBytes + static_cast<double>(to.tokens[at]) * back.rowBytes;
      if (rank / shape.ranksPerNode == source / shape.ranksPerNode) {
        total.dispatch.memoryBytes += there;
        total.combine.memoryBytes += home;
        continue;
      }
      total.dispatch.puts += 1;
      total.combine.puts += 2;  // weights; sums
      total.dispatch.putBytes += there;
      total.combine.putBytes += home;
      for (LowLatencyTraffic* one : {&total.dispatch, &total.combine}) {
        one->adds += 1;
        one->rows += to.selections[at];
      }
      total.dispatch.rowBytes += to.selections[at] * sentRow;
      total.combine.rowBytes += to.selections[at] * bf16Row;
    }
  }
  divide(total.dispatch, shape.ranks);
  divide(total.combine, shape.ranks);
  return total;
}

}  // namespace mscclpp::ep
