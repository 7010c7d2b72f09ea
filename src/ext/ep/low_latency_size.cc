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

Parts partsOf(int maxTokens, int hidden, int ranks, int experts) {
  constexpr auto kBad = ErrorCode::invalidArgument;
  check(maxTokens >= 0 && maxTokens <= kMaxLowLatencyTokens, kBad,
        "num_max_dispatch_tokens_per_rank = {} must be in 0 .. {}", maxTokens,
        kMaxLowLatencyTokens);
  check(hidden >= 8 && hidden <= kMaxLowLatencyHidden && hidden % 8 == 0, kBad,
        "hidden = {} must be a multiple of 8 in 8 .. {}", hidden, kMaxLowLatencyHidden);
  check(ranks >= 1, kBad, "num_ranks = {} must be at least 1", ranks);
  check(experts >= 1 && experts <= kMaxLowLatencyExperts, kBad,
        "num_experts = {} must be in 1 .. {}", experts, kMaxLowLatencyExperts);
  const int units = std::max(bf16Units(hidden), e4m3Units(hidden));
  return {LowLatencyPlan{ranks, 0}.head(),
          DispatchArea::make(ranks, maxTokens, kMaxLowLatencyTopk, units).total(),
          CombineArea::make(ranks, maxTokens, kMaxLowLatencyTopk, bf16Units(hidden)).total()};
}

}  // namespace

std::size_t lowLatencySizeHint(int maxTokens, int hidden, int ranks, int experts) {
  return partsOf(maxTokens, hidden, ranks, experts).total(ranks);
}

std::string describeLowLatencySize(int maxTokens, int hidden, int ranks, int experts) {
  const Parts parts = partsOf(maxTokens, hidden, ranks, experts);
  const auto dispatch = DispatchArea::make(ranks, maxTokens, kMaxLowLatencyTopk, bf16Units(hidden));
  const auto combine = CombineArea::make(ranks, maxTokens, kMaxLowLatencyTopk, bf16Units(hidden));
  return fmt::format(
      "{} bytes = head {} + 4 areas (dispatch and combine, odd and even calls) of {}; a dispatch "
      "area: {} ranks x ({} bytes of ids + {} rows of {}); a combine area: {} ranks x {} tokens x "
      "({} bytes of weights + a row of {}) + {} of own sums; the ids and weights are those of "
      "top-k "
      "{}",
      parts.total(ranks), parts.head, parts.area(), ranks, dispatch.ids(1, 1), maxTokens,
      dispatch.rowBytes, ranks, maxTokens,
      combine.weightLines * static_cast<int>(device::kLineSize), combine.rowBytes,
      combine.total() - combine.ownSum(0), kMaxLowLatencyTopk);
}

}  // namespace mscclpp::ep
