#pragma once

#include <cstdint>

#include <mscclpp/device/cpu/atomic.hpp>
#include <mscclpp/device/cpu/copy.hpp>
#include <mscclpp/device/cpu/simt.hpp>
#include <mscclpp/failure.hpp>

/// CPU half of <mscclpp/device/wait.hpp>.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

inline constexpr uint32_t kPollsPerTimeCheck = 16;

struct WaitValues {
  uint64_t expected;
  uint64_t seen;
  uint64_t waitedNs;
};

/// Claims the record and fills it in; does nothing when somebody was first.
inline void recordFailure(const WaitControl& control, WaitPoint point, WaitValues values,
                          const Site& site) {
  FailureRecord* record = control.record;
  if (record == nullptr) return;
  uint32_t expected = kFailureNone;
  if (!__atomic_compare_exchange_n(&record->state, &expected, kFailureClaimed, false,
                                   __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    return;
  }
  const ThreadPosition where = position();
  record->what = point.what;
  record->rank = control.rank;
  record->peer = point.peer;
  record->block = where.block;
  record->thread = where.thread;
  record->line = site.line();
  record->expected = values.expected;
  record->seen = values.seen;
  record->waitedNs = values.waitedNs;
  __atomic_store_n(&record->state, kFailurePublished, __ATOMIC_RELEASE);
}

inline bool recordTaken(const WaitControl& control) {
  return control.record != nullptr &&
         __atomic_load_n(&control.record->state, __ATOMIC_RELAXED) != kFailureNone;
}

/// Polls until poll() is true. False after the limit, with `waitedNs` != 0, or when something
/// failed before, with `waitedNs` == 0.
template <class Poll>
bool pollUntil(const WaitControl& control, Poll poll, Polling& polling, uint64_t& waitedNs) {
  if (poll()) return true;
  const uint64_t start = nanoseconds();
  beginPolling(polling);
  for (uint32_t polls = 1;; ++polls) {
    waitedNs = 0;
    if (recordTaken(control)) break;
    if (control.limitNs != 0 && polls % kPollsPerTimeCheck == 0) {
      const uint64_t waited = nanoseconds() - start;
      if (waited > control.limitNs) {
        waitedNs = waited;
        break;
      }
    }
    pausePolling();
    if (poll()) {
      endPolling();
      return true;
    }
  }
  endPolling();
  return false;
}

}  // namespace detail

inline bool failed(const WaitControl& control) {
  return detail::recordTaken(control);
}

inline bool waitReached(const WaitControl& control, const uint32_t* flag, uint32_t epoch,
                        WaitPoint point, Site site = Site::current()) {
  detail::beforeAtomicUpdate();  // a place to be preempted
  detail::Polling polling{flag, true, epoch, 0, point.what, point.peer, site};
  uint64_t waitedNs = 0;
  const auto poll = [&] {
    polling.seen = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    return static_cast<int32_t>(polling.seen - epoch) >= 0;
  };
  if (detail::pollUntil(control, poll, polling, waitedNs)) return true;
  if (waitedNs != 0) detail::recordFailure(control, point, {epoch, polling.seen, waitedNs}, site);
  return false;
}

template <class Predicate>
bool waitUntil(const WaitControl& control, Predicate predicate, WaitPoint point,
               const void* address, Site site = Site::current()) {
  detail::Polling polling{address, false, 0, 0, point.what, point.peer, site};
  uint64_t waitedNs = 0;
  if (detail::pollUntil(control, predicate, polling, waitedNs)) return true;
  if (waitedNs != 0) detail::recordFailure(control, point, {0, 0, waitedNs}, site);
  return false;
}

/// Reports something other than a wait that makes this call useless. The first report is kept.
inline void reportFailure(const WaitControl& control, WaitPoint point, uint64_t expected,
                          uint64_t seen, Site site = Site::current()) {
  detail::recordFailure(control, point, {expected, seen, 0}, site);
}

/// Inside a block, so four times the limit: whoever arrives on the mbarrier may itself have to run
/// into the limit first. Expiry is an internal error: recorded, then the launch ends.
inline void waitParity(const WaitControl& control, Mbarrier* barrier, unsigned parity,
                       WaitPoint point, Site site = Site::current()) {
  uint64_t waitedNs = 0;
  const detail::MbarrierWait wait{4 * control.limitNs, point.what, point.peer};
  if (detail::mbarrierWait(barrier, parity, wait, site, waitedNs)) return;
  detail::recordFailure(control, point, {parity, 1 - parity, waitedNs}, site);
  detail::failKernel("waitParity: the limit passed", barrier, site);
}

}  // namespace cpu
}  // namespace mscclpp::device
