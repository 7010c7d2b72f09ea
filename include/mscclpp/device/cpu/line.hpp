#pragma once

#include <cstdint>

#include <mscclpp/device/cpu/wait.hpp>
#include <mscclpp/device/line_types.hpp>

/// CPU half of <mscclpp/device/line.hpp>. The units are ordinary memory, so that a race detector
/// sees who touches them when; only the epoch is atomic, released last and acquired first.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

inline bool isTailLane() {
  return laneId() % kLineLanes == kLineUnits;
}
inline Vec16* unitAddress(void* line) {
  return static_cast<Vec16*>(line) + laneId() % kLineLanes;
}
inline LineTail* tailOf(void* line) {
  return reinterpret_cast<LineTail*>(static_cast<Vec16*>(line) + kLineUnits);
}
inline const LineTail* tailOf(const void* line) {
  return tailOf(const_cast<void*>(line));
}

inline bool awaitTail(const WaitControl& control, const LineTail* tail, uint64_t epoch,
                      WaitPoint point, const Site& site) {
  Polling polling{&tail->epoch, false, 0, 0, point.what, point.peer, site};
  uint64_t waitedNs = 0, seen = 0;
  const auto poll = [&] {
    seen = __atomic_load_n(&tail->epoch, __ATOMIC_ACQUIRE);
    return seen == epoch;
  };
  if (pollUntil(control, poll, polling, waitedNs)) return true;
  if (waitedNs != 0) recordFailure(control, point, {epoch, seen, waitedNs}, site);
  return false;
}

}  // namespace detail

inline void pushLine(void* line, Vec16 unit, uint64_t epoch, bool active, LineWrites /*writes*/,
                     Site site = Site::current()) {
  if (active && !detail::isTailLane()) *detail::unitAddress(line) = unit;
  syncWarp(kFullMask, site);
  if (!active || !detail::isTailLane()) return;
  LineTail* const tail = detail::tailOf(line);
  storeRelaxed(&tail->first, unit.w[0]);
  storeRelease(&tail->second, unit.w[1]);
  storeRelease(&tail->epoch, epoch);
}

/// Nothing is known before the epoch was acquired.
inline Vec16 peekLine(const void* /*line*/, bool /*active*/) {
  return {};
}

inline bool pullLine(const WaitControl& control, const void* line, Vec16& unit, uint64_t epoch,
                     bool active, WaitPoint point, LineWrites /*writes*/,
                     Site site = Site::current()) {
  const LineTail* const tail = detail::tailOf(line);
  detail::beforeAtomicUpdate();  // a place to be preempted
  const bool came =
      !active || !detail::isTailLane() || detail::awaitTail(control, tail, epoch, point, site);
  if (!all(came, kFullMask, site)) return false;
  syncWarp(kFullMask, site);  // votes order no memory
  if (!active) return true;
  unit = detail::isTailLane()
             ? Vec16{{loadRelaxed(&tail->first), loadRelaxed(&tail->second),
                      static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)}}
             : *detail::unitAddress(const_cast<void*>(line));
  return true;
}

inline uint32_t loadPermission(const uint32_t* word) {
  return loadAcquire(word);
}

/// For looking at `second`.
inline const LineTail& lineTail(const void* line) {
  return *reinterpret_cast<const LineTail*>(static_cast<const char*>(line) +
                                            kLineUnits * sizeof(Vec16));
}

inline Vec16 loadLineUnit(const void* line, int unit) {
  return static_cast<const Vec16*>(line)[unit];
}

}  // namespace cpu
}  // namespace mscclpp::device
