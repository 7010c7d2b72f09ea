#pragma once

#include <mscclpp/device/device.hpp>

namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

using namespace mscclpp::device;

/// Reports something other than a wait that makes this call useless. The first report is kept.
__device__ inline void reportFailure(const WaitControl& wait, WaitPoint point,
                                     std::uint64_t expected, std::uint64_t seen) {
  std::uint32_t none = kFailureNone;
  if (!compareExchangeAcqRel(&wait.record->state, none, kFailureClaimed)) return;
  wait.record->what = point.what;
  wait.record->rank = wait.rank;
  wait.record->peer = point.peer;
  wait.record->block = blockIndex();
  wait.record->thread = threadIndex();
  wait.record->expected = expected;
  wait.record->seen = seen;
  storeRelease(&wait.record->state, kFailurePublished);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
