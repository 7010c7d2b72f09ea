#include <algorithm>
#include <limits>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/low_latency.hpp>
#include <mscclpp/format.hpp>

#include "plan/low_latency_plan.hpp"

namespace mscclpp::ep {
namespace {

struct Parts {
  std::size_t head, dispatch, combine;
  /// At least a line: no Buffer is made with less.
  std::size_t area() const { return std::max({dispatch, combine, device::kLineSize}); }
  std::size_t total(int ranks) const { return LowLatencyPlan::bytesFor(ranks, area()); }
};

void checkSizes(int maxTokens, int hidden, int ranks, int experts,
                const LowLatencySizeOptions& options) {
  constexpr auto kBad = ErrorCode::invalidArgument;
  check(maxTokens >= 0 && maxTokens <= kMaxLowLatencyTokens, kBad,
        "num_max_dispatch_tokens_per_rank = {} must be in 0 .. {}", maxTokens,
        kMaxLowLatencyTokens);
  check(hidden >= 8 && hidden <= kMaxLowLatencyHidden && hidden % 8 == 0, kBad,
        "hidden = {} must be a multiple of 8 in 8 .. {}", hidden, kMaxLowLatencyHidden);
  check(ranks >= 1, kBad, "num_ranks = {} must be at least 1", ranks);
  check(experts >= 1 && experts <= kMaxLowLatencyExperts, kBad,
        "num_experts = {} must be in 1 .. {}", experts, kMaxLowLatencyExperts);
  check(options.topk >= 1 && options.topk <= kMaxLowLatencyTopk, kBad,
        "num_topk = {} must be in 1 .. {}", options.topk, kMaxLowLatencyTopk);
}

SourceArea sourceArea(int maxTokens, int hidden, int ranks, int experts,
                      const LowLatencySizeOptions& options) {
  return SourceArea::make(ranks, maxTokens, options.topk, bf16Units(hidden),
                          options.spansNodes ? mostOnOneRank(options.topk, experts, ranks) : 0);
}

Parts partsOf(int maxTokens, int hidden, int ranks, int experts,
              const LowLatencySizeOptions& options) {
  checkSizes(maxTokens, hidden, ranks, experts, options);
  const int units = std::max(bf16Units(hidden), e4m3Units(hidden));
  return {LowLatencyPlan{ranks, 0}.head(),
          DispatchArea::make(ranks, maxTokens, options.topk, units).total(),
          options.reduce == LowLatencyReduce::source
              ? sourceArea(maxTokens, hidden, ranks, experts, options).total()
              : CombineArea::make(ranks, maxTokens, options.topk, bf16Units(hidden)).total()};
}

std::string describeCombine(int maxTokens, int hidden, int ranks, int experts,
                            const LowLatencySizeOptions& options) {
  if (options.reduce == LowLatencyReduce::rank) {
    const auto area = CombineArea::make(ranks, maxTokens, options.topk, bf16Units(hidden));
    return fmt::format(
        "{} ranks x {} tokens x ({} bytes of weights + a row of {}) + {} of own sums; the ids and "
        "weights are those of top-k {}",
        ranks, maxTokens, area.weightLines * static_cast<int>(device::kLineSize), area.rowBytes,
        area.total() - area.ownSum(0), options.topk);
  }
  const SourceArea area = sourceArea(maxTokens, hidden, ranks, experts, options);
  std::string text =
      fmt::format("{} tokens x top-k {} x a row of {}", maxTokens, options.topk, area.rowBytes);
  if (options.spansNodes) {
    text = fmt::format(
        "the larger of 2 x {} (from the own node; from others) and an outbox of {} ranks x {} rows",
        text, ranks, area.outboxRows);
  }
  return text;
}

}  // namespace

std::size_t lowLatencySizeHint(int maxTokens, int hidden, int ranks, int experts,
                               const LowLatencySizeOptions& options) {
  return partsOf(maxTokens, hidden, ranks, experts, options).total(ranks);
}

std::string describeLowLatencySize(int maxTokens, int hidden, int ranks, int experts,
                                   const LowLatencySizeOptions& options) {
  const Parts parts = partsOf(maxTokens, hidden, ranks, experts, options);
  const auto dispatch = DispatchArea::make(ranks, maxTokens, options.topk, bf16Units(hidden));
  return fmt::format(
      "{} bytes = head {} + 4 areas (dispatch and combine, odd and even calls) of {}; a dispatch "
      "area: {} ranks x ({} bytes of ids + {} rows of {}); a combine area: {}",
      parts.total(ranks), parts.head, parts.area(), ranks, dispatch.ids(1, 1), maxTokens,
      dispatch.rowBytes, describeCombine(maxTokens, hidden, ranks, experts, options));
}

}  // namespace mscclpp::ep
