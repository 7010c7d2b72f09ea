#pragma once

#include <cstdint>

#include <mscclpp/device/cuda/wait.hpp>
#include <mscclpp/device/line_types.hpp>

/// CUDA half of <mscclpp/device/line.hpp>.
namespace mscclpp::device {
inline namespace cuda {
namespace detail {

// 128-bit scalar accesses are single-copy atomic in the PTX memory model.
__device__ __forceinline__ void storeUnit(void* address, Vec16 v) {
  const uint64_t low = v.w[0] | static_cast<uint64_t>(v.w[1]) << 32;
  const uint64_t high = v.w[2] | static_cast<uint64_t>(v.w[3]) << 32;
  asm volatile(
      "{.reg .b128 t; mov.b128 t, {%1, %2}; st.relaxed.sys.global.b128 [%0], t;}" ::"l"(address),
      "l"(low), "l"(high)
      : "memory");
}
__device__ __forceinline__ Vec16 loadUnit(const void* address) {
  uint64_t low, high;
  asm volatile("{.reg .b128 t; ld.relaxed.sys.global.b128 t, [%2]; mov.b128 {%0, %1}, t;}"
               : "=l"(low), "=l"(high)
               : "l"(address)
               : "memory");
  return Vec16{{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)}};
}
__device__ __forceinline__ uint64_t epochOf(Vec16 tail) {
  return tail.w[2] | static_cast<uint64_t>(tail.w[3]) << 32;
}
__device__ __forceinline__ bool isTailLane() {
  return laneId() % kLineLanes == kLineUnits;
}
__device__ __forceinline__ void* unitAddress(void* line) {
  return static_cast<char*>(line) + laneId() % kLineLanes * sizeof(Vec16);
}
__device__ __forceinline__ const void* unitAddress(const void* line) {
  return static_cast<const char*>(line) + laneId() % kLineLanes * sizeof(Vec16);
}

/// The record lies in host memory: a warp looks there only once it has waited this long, and then
/// as often. All warps of a GPU that look at once would keep it busy for milliseconds.
inline constexpr uint64_t kLineRecordNs = 1'000'000;

/// After kPollsPerTimeCheck polls. `start` and `nextLook` belong to one wait. True: give up.
__device__ __forceinline__ bool linePollsEnd(const WaitControl& control, uint64_t& start,
                                             uint64_t& nextLook, uint64_t& waitedNs) {
  const uint64_t now = nanoseconds();
  if (start == 0) {
    start = now;
    nextLook = kLineRecordNs;
  }
  waitedNs = now - start;
  if (all(waitedNs < nextLook)) return false;
  nextLook += kLineRecordNs;
  if (any(laneId() == 0 && failed(control))) {
    waitedNs = 0;
    return true;
  }
  return any(control.limitNs != 0 && waitedNs > control.limitNs);
}

/// The slow half of pullLine: everything after the first look. The clock is not read before many
/// polls have failed: that takes longer than a poll.
__device__ __forceinline__ bool pollLine(const WaitControl& control, const void* line, Vec16& unit,
                                         uint64_t epoch, bool active, WaitPoint point) {
  uint64_t start = 0, nextLook = 0, waitedNs = 0;
  for (uint32_t polls = 1;; ++polls) {
    if (active) unit = loadUnit(unitAddress(line));
    const bool here = !active || !isTailLane() || epochOf(unit) == epoch;
    if (all(here)) return true;
    if (polls % kPollsPerTimeCheck != 0) continue;
    if (!linePollsEnd(control, start, nextLook, waitedNs)) continue;
    if (!here && waitedNs != 0) {
      recordFailure(control.record, control.rank, point, {epoch, epochOf(unit), waitedNs});
    }
    return false;
  }
}

}  // namespace detail

/// Writes this lane's unit of `line`; the tail lane's words 2 and 3 become the epoch.
__device__ __forceinline__ void pushLine(void* line, Vec16 unit, uint64_t epoch, bool active,
                                         LineWrites writes, Site = Site::current()) {
  const bool tail = detail::isTailLane();
  if (tail) {
    unit.w[2] = static_cast<uint32_t>(epoch);
    unit.w[3] = static_cast<uint32_t>(epoch >> 32);
  }
  if (writes == LineWrites::whole) {
    if (active) detail::storeUnit(detail::unitAddress(line), unit);
    return;
  }
  if (active && !tail) detail::storeUnit(detail::unitAddress(line), unit);
  syncWarp();
  if (!active || !tail) return;
  auto* const words = static_cast<uint64_t*>(detail::unitAddress(line));
  storeRelaxed(words, unit.w[0] | static_cast<uint64_t>(unit.w[1]) << 32);
  storeRelease(words + 1, epoch);
}

/// What lies in `line` now: a load that pullLine() need not make again. All zero if not active.
__device__ __forceinline__ Vec16 peekLine(const void* line, bool active) {
  return active ? detail::loadUnit(detail::unitAddress(line)) : Vec16{};
}

/// Waits until `line` has come with `epoch` and leaves this lane's unit of it in `unit`, which must
/// be what peekLine() returned. False when it did not come within the limit (recorded), or when
/// something failed before.
__device__ __forceinline__ bool pullLine(const WaitControl& control, const void* line, Vec16& unit,
                                         uint64_t epoch, bool active, WaitPoint point,
                                         LineWrites writes, Site = Site::current()) {
  const bool there = !active || !detail::isTailLane() || detail::epochOf(unit) == epoch;
  if (writes == LineWrites::whole) {
    return all(there) || detail::pollLine(control, line, unit, epoch, active, point);
  }
  if (!detail::pollLine(control, line, unit, epoch, active && detail::isTailLane(), point)) {
    return false;
  }
  // The acquire that goes with the tail's release, then the units.
  if (active && detail::isTailLane()) {
    loadAcquire(static_cast<const uint64_t*>(detail::unitAddress(line)) + 1);
  }
  syncWarp();
  if (active && !detail::isTailLane()) unit = detail::loadUnit(detail::unitAddress(line));
  return true;
}

/// A word that says that memory may be written again. Stores are never ahead of the branch that
/// they depend on, so the load need not be an acquire, which would hold up all later loads.
__device__ __forceinline__ uint32_t loadPermission(const uint32_t* word) {
  return loadRelaxed(word);
}

/// For looking at `second`.
__device__ __forceinline__ const LineTail& lineTail(const void* line) {
  return *reinterpret_cast<const LineTail*>(static_cast<const char*>(line) +
                                            kLineUnits * sizeof(Vec16));
}

/// A unit of a line that is known to have come.
__device__ __forceinline__ Vec16 loadLineUnit(const void* line, int unit) {
  return detail::loadUnit(static_cast<const char*>(line) + unit * sizeof(Vec16));
}

}  // namespace cuda
}  // namespace mscclpp::device
