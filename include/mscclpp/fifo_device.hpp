// Kernel side of Fifo, on both platforms.
#pragma once

#include <cstdint>

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/wait.hpp>
#include <mscclpp/failure.hpp>
#include <mscclpp/fifo_handle.hpp>

namespace mscclpp {
inline namespace MSCCLPP_PLATFORM_NS {

/// Whether a trigger promises that what the pusher wrote and saw before is visible to the proxy.
/// The promise costs more than a microsecond on a GPU.
enum class TriggerOrder { relaxed, release };

/// Pushes triggers. Any number of threads may push at the same time; the lanes of a warp that push
/// together share the cost of the release. A thread that is the only one may claim() the FIFO: it
/// then keeps the positions in registers, which spares each push an atomic and a load.
struct FifoDevice {
  static constexpr uint64_t kNowhere = ~uint64_t{0};

  FifoHandle handle;

  __device__ explicit FifoDevice(const FifoHandle& from) : handle(from) {}

  /// From now on, and until release(), this object is the only one that pushes.
  __device__ void claim() {
    claimed_ = true;
    head_ = device::loadLocalAcquire(handle.head);
    tail_ = device::loadLocalAcquire(handle.tailCopy);
  }
  /// Others may push again, in this kernel after a barrier or in the next one.
  __device__ void release() {
    claimed_ = false;
    device::storeLocalRelease(handle.tailCopy, tail_);
    device::storeLocalRelease(handle.head, head_);
  }

  /// Waits for a free slot and stores `trigger` there. Returns its position, kNowhere once a wait
  /// of `control` has failed: a proxy that does not come is reported with `peer`.
  __device__ uint64_t push(const WaitControl& control, const Trigger& trigger, TriggerOrder order,
                           int32_t peer, device::Site site = device::Site::current()) {
    const uint64_t position =
        claimed_ ? head_++ : device::fetchAddLocalRelaxed(handle.head, uint64_t{1});
    if (!hasRoom(position) &&
        !device::waitUntil(
            control, [&] { return hasRoom(position); }, {kWaitFifoRoom, peer}, handle.tail, site)) {
      return kNowhere;
    }
    const uint64_t lap = lapBit(position, handle.depth);
    uint64_t* const slot = handle.ring + 2 * (position & (handle.depth - 1));
    if (order == TriggerOrder::release) {
      device::storeReleasePair(slot, trigger.first | lap, trigger.second | lap);
    } else {
      device::storeRelaxedPair(slot, trigger.first | lap, trigger.second | lap);
    }
    return position;
  }

 private:
  __device__ bool hasRoom(uint64_t position) {
    return claimed_ ? hasRoomAlone(position) : hasRoomAmongMany(position);
  }
  __device__ bool hasRoomAlone(uint64_t position) {
    if (position - tail_ < handle.depth) return true;
    tail_ = device::loadAcquire(handle.tail);
    return position - tail_ < handle.depth;
  }
  /// Reads of one word of host memory are served one after the other, a microsecond each: one
  /// thread reads the tail for all and leaves it in device memory.
  __device__ bool hasRoomAmongMany(uint64_t position) {
    if (position - device::loadLocalAcquire(handle.tailCopy) < handle.depth) return true;
    uint64_t unlocked = 0;
    if (device::loadRelaxed(handle.tailLock) != 0 ||
        !device::compareExchangeAcqRel(handle.tailLock, unlocked, 1)) {
      return false;
    }
    const uint64_t tail = device::loadAcquire(handle.tail);
    device::storeLocalRelease(handle.tailCopy, tail);
    device::storeLocalRelease(handle.tailLock, 0);
    return position - tail < handle.depth;
  }

  bool claimed_ = false;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;
};

}  // namespace MSCCLPP_PLATFORM_NS
}  // namespace mscclpp
