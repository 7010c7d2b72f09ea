#pragma once

#include <cstdint>

/// What a bounded device wait needs to know and what it leaves behind when it gives up.
/// Plain data: host code, CUDA kernels and CPU kernels share these types.
namespace mscclpp {

/// Values of FailureRecord::state. It only ever grows until the host calls clearFailure().
inline constexpr uint32_t kFailureNone = 0;       ///< nothing failed
inline constexpr uint32_t kFailureClaimed = 1;    ///< somebody is filling the record in
inline constexpr uint32_t kFailurePublished = 2;  ///< the other members can be read

/// The first wait that failed, one record per rank. The owner allocates it in memory that host and
/// device can both reach (pinned host memory on CUDA) and keeps it alive while kernels run.
struct alignas(64) FailureRecord {
  uint32_t state =
      kFailureNone;     ///< kFailure...; claimed by compare-exchange, published by release
  uint32_t what = 0;    ///< WaitPoint::what: an enumerator of the kernel's own
  int32_t rank = 0;     ///< WaitControl::rank: who waited
  int32_t peer = 0;     ///< WaitPoint::peer: for whom (-1 = nobody in particular)
  uint32_t block = 0;   ///< block index of the waiting thread
  uint32_t thread = 0;  ///< index of the waiting thread in its block
  uint32_t line = 0;    ///< source line of the wait; 0 when the platform does not know it
  uint32_t reserved = 0;
  uint64_t expected = 0;  ///< value waited for (waitReached: the epoch)
  uint64_t seen = 0;      ///< last value seen
  uint64_t waitedNs = 0;  ///< how long, nanoseconds
};

/// How long waits may take and where they report. Part of every kernel's Args.
struct WaitControl {
  FailureRecord* record = nullptr;  ///< may be null: waits then fail without a report
  uint64_t limitNs = 0;             ///< nanoseconds; 0 = no limit
  int32_t rank = 0;                 ///< written to the record
};

/// Values of WaitPoint::what that belong to this library; callers' own are below.
inline constexpr uint32_t kWaitReserved = 0xFFFF0000;
inline constexpr uint32_t kWaitFifoRoom = kWaitReserved + 1;     ///< a free slot for a trigger
inline constexpr uint32_t kWaitFlush = kWaitReserved + 2;        ///< a flush of a port channel
inline constexpr uint32_t kWaitProxyFailed = kWaitReserved + 3;  ///< none: a proxy raised it

/// Names one wait for the report.
struct WaitPoint {
  uint32_t what = 0;  ///< an enumerator of the caller's; the host maps it to text
  int32_t peer = -1;  ///< rank waited for, -1 = nobody in particular
};

/// Host: true when the record is complete. Does not block.
inline bool failurePublished(const FailureRecord& record) {
  return __atomic_load_n(&record.state, __ATOMIC_ACQUIRE) == kFailurePublished;
}

/// Host: fails every present and future device wait that uses this record, for example because a
/// proxy died. Returns false when the record was taken already (the first failure is kept).
inline bool raiseFailure(FailureRecord& record, WaitPoint point, int32_t rank) {
  uint32_t expected = kFailureNone;
  if (!__atomic_compare_exchange_n(&record.state, &expected, kFailureClaimed, false,
                                   __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    return false;
  }
  record.what = point.what;
  record.rank = rank;
  record.peer = point.peer;
  __atomic_store_n(&record.state, kFailurePublished, __ATOMIC_RELEASE);
  return true;
}

/// Host: forgets a failure. Only when no kernel that uses the record is running.
inline void clearFailure(FailureRecord& record) {
  __atomic_store_n(&record.state, kFailureNone, __ATOMIC_RELEASE);
}

}  // namespace mscclpp
