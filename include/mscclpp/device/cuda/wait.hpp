#pragma once

#include <cstdint>

#include <mscclpp/device/cuda/atomic.hpp>
#include <mscclpp/device/cuda/copy.hpp>
#include <mscclpp/device/cuda/simt.hpp>
#include <mscclpp/failure.hpp>

/// CUDA half of <mscclpp/device/wait.hpp>.
namespace mscclpp::device {
inline namespace cuda {
namespace detail {

// Polling stays on the flag: the clock is read every 64 polls, and by it the record, which lives in
// host memory: there looks of all waiting warps are served one after the other, a microsecond each.
inline constexpr uint32_t kPollsPerTimeCheck = 64;
inline constexpr uint64_t kRecordCheckNs = 200'000;

struct WaitValues {
  uint64_t expected;
  uint64_t seen;
  uint64_t waitedNs;
};

/// Claims a record for this GPU. Device scope: system-scope atomics on host memory behind PCIe are
/// not atomic on every machine. Should the host claim it at the same moment, one of the two is
/// lost.
__device__ __forceinline__ bool claimRecord(FailureRecord* record) {
  uint32_t found;
  asm volatile("atom.acq_rel.gpu.cas.b32 %0, [%1], %2, %3;"
               : "=r"(found)
               : "l"(&record->state), "r"(kFailureNone), "r"(kFailureClaimed)
               : "memory");
  return found == kFailureNone;
}

/// Claims the record and fills it in; does nothing when somebody was first.
__device__ __noinline__ inline void recordFailure(FailureRecord* record, int32_t rank,
                                                  WaitPoint point, WaitValues values) {
  if (record == nullptr || !claimRecord(record)) return;
  record->what = point.what;
  record->rank = rank;
  record->peer = point.peer;
  record->block = blockIndex();
  record->thread = threadIndex();
  record->line = 0;
  record->expected = values.expected;
  record->seen = values.seen;
  record->waitedNs = values.waitedNs;
  storeRelease(&record->state, kFailurePublished);
}

/// Polls until poll() is true; false after the limit (values.waitedNs is set and expired is true)
/// or when the record says that something failed.
template <class Poll>
__device__ __forceinline__ bool pollUntil(const FailureRecord* record, uint64_t limitNs, Poll poll,
                                          uint64_t& waitedNs, bool& expired) {
  expired = false;
  if (poll()) return true;
  const uint64_t start = nanoseconds();
  uint64_t nextRecordCheck = kRecordCheckNs;
  for (uint32_t polls = 1;; ++polls) {
    if (poll()) return true;
    if (polls % kPollsPerTimeCheck != 0) continue;
    waitedNs = nanoseconds() - start;
    expired = limitNs != 0 && waitedNs > limitNs;
    const bool readRecord = waitedNs >= nextRecordCheck;
    if (readRecord) nextRecordCheck = waitedNs + kRecordCheckNs;
    if ((readRecord || expired) && record != nullptr &&
        loadRelaxedSys(&record->state) != kFailureNone) {
      expired = false;
      return false;
    }
    if (expired) return false;
  }
}

}  // namespace detail

__device__ __forceinline__ bool failed(const WaitControl& control) {
  return control.record != nullptr && loadRelaxed(&control.record->state) != kFailureNone;
}

__device__ __forceinline__ bool waitReached(const WaitControl& control, const uint32_t* flag,
                                            uint32_t epoch, WaitPoint point,
                                            Site = Site::current()) {
  uint32_t seen = 0;
  uint64_t waitedNs = 0;
  bool expired = false;
  const auto poll = [&] {
    seen = loadAcquire(flag);
    return static_cast<int32_t>(seen - epoch) >= 0;
  };
  if (detail::pollUntil(control.record, control.limitNs, poll, waitedNs, expired)) return true;
  if (expired) {
    detail::recordFailure(control.record, control.rank, point, {epoch, seen, waitedNs});
  }
  return false;
}

template <class Predicate>
__device__ __forceinline__ bool waitUntil(const WaitControl& control, Predicate predicate,
                                          WaitPoint point, const void* /*address*/,
                                          Site = Site::current()) {
  uint64_t waitedNs = 0;
  bool expired = false;
  if (detail::pollUntil(control.record, control.limitNs, predicate, waitedNs, expired)) return true;
  if (expired) detail::recordFailure(control.record, control.rank, point, {0, 0, waitedNs});
  return false;
}

/// Reports something other than a wait that makes this call useless. The first report is kept.
__device__ __forceinline__ void reportFailure(const WaitControl& control, WaitPoint point,
                                              uint64_t expected, uint64_t seen,
                                              Site = Site::current()) {
  detail::recordFailure(control.record, control.rank, point, {expected, seen, 0});
}

/// Inside a block, so four times the limit: whoever arrives on the mbarrier may itself have to run
/// into the limit first. Expiry is an internal error: recorded, then the launch ends.
__device__ __forceinline__ void waitParity(const WaitControl& control, Mbarrier* barrier,
                                           unsigned parity, WaitPoint point,
                                           Site = Site::current()) {
  if (detail::tryWaitParity(barrier, parity)) return;
  const uint64_t start = nanoseconds();
  for (uint32_t polls = 1; !detail::tryWaitParity(barrier, parity); ++polls) {
    if (control.limitNs == 0 || polls % detail::kPollsPerTimeCheck != 0) continue;
    const uint64_t waitedNs = nanoseconds() - start;
    if (waitedNs > 4 * control.limitNs) {
      detail::recordFailure(control.record, control.rank, point, {parity, 1 - parity, waitedNs});
      trap();
    }
  }
}

}  // namespace cuda
}  // namespace mscclpp::device
