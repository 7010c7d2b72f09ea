#include "low_latency_traffic.hpp"

#include <vector>

#include "plan/low_latency_plan.hpp"
#include "reference_low_latency.hpp"

namespace mscclpp::ep {
namespace {

/// Selections of a rank's tokens, by the rank that hosts the expert.
std::vector<int> selectionsByRank(const reference::Layout& layout,
                                  const reference::Placement& placement) {
  std::vector<int> selections(layout.tokensPerRank.size());
  for (std::size_t e = 0; e < layout.tokensPerExpert.size(); ++e) {
    selections[static_cast<std::size_t>(placement.rankOf[e])] += layout.tokensPerExpert[e];
  }
  return selections;
}

void divide(LowLatencyTraffic& total, double by) {
  for (double* value : {&total.memoryBytes, &total.puts, &total.signals, &total.putBytes,
                        &total.adds, &total.rows, &total.rowBytes}) {
    *value /= by;
  }
}

}  // namespace

LowLatencyRoundTrip lowLatencyTraffic(const LowLatencyShape& shape) {
  const reference::Placement placement = reference::lowLatencyPlacement(shape.experts, shape.ranks);
  const DispatchArea out =
      DispatchArea::make(shape.ranks, shape.tokens, shape.topk,
                         shape.fp8 ? e4m3Units(shape.hidden) : bf16Units(shape.hidden));
  const CombineArea back = CombineArea::make(shape.ranks, shape.tokens, shape.topk,
                                             bf16Units(shape.hidden), shape.logfmt);
  const double idBytes = static_cast<double>(out.row(0, 0) - out.block(0));
  const double weightBytes = static_cast<double>(back.weights(0, 1) - back.weights(0, 0));
  const double bf16Row = 2.0 * shape.hidden;
  const double sentRow = shape.fp8 ? shape.hidden + 4.0 * scaleBlocks(shape.hidden) : bf16Row;
  LowLatencyRoundTrip total;
  for (int source = 0; source < shape.ranks; ++source) {
    const reference::Layout layout = reference::layout(
        reference::makeRouting(
            {reference::Pattern::uniform, shape.tokens, shape.topk, source, shape.seed}, placement),
        placement);
    const std::vector<int> selections = selectionsByRank(layout, placement);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      if (rank == source) continue;
      const auto at = static_cast<std::size_t>(rank);
      const double rows = layout.tokensPerRank[at];
      const double there = idBytes + rows * out.rowBytes;
      // Inside a node all weights go to all ranks, between nodes those of the tokens that have
      // rows.
      const bool near = rank / shape.ranksPerNode == source / shape.ranksPerNode;
      const double home = shape.source
                              ? 1.0 * selections[at] * back.rowBytes
                              : (near ? shape.tokens : rows) * weightBytes + rows * back.rowBytes;
      if (near) {
        total.dispatch.memoryBytes += there;
        total.combine.memoryBytes += home;
        continue;
      }
      total.dispatch.puts += 1;
      total.combine.puts += shape.source ? 1 : 2;  // rows, or weights and sums
      total.combine.signals += shape.source ? 1 : 0;
      total.dispatch.putBytes += there;
      total.combine.putBytes += home;
      for (LowLatencyTraffic* one : {&total.dispatch, &total.combine}) {
        one->adds += 1;
        one->rows += selections[at];
      }
      total.dispatch.rowBytes += selections[at] * sentRow;
      total.combine.rowBytes += selections[at] * bf16Row;
    }
  }
  divide(total.dispatch, shape.ranks);
  divide(total.combine, shape.ranks);
  return total;
}

}  // namespace mscclpp::ep
