// Kernel side of MemoryChannel and MemorySemaphore, on both platforms.
#pragma once

#include <cstdint>

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/wait.hpp>
#include <mscclpp/failure.hpp>
#include <mscclpp/memory_channel_handle.hpp>

namespace mscclpp {
inline namespace MSCCLPP_PLATFORM_NS {

/// A counting semaphore with one signaller and one waiter per side. signal, wait and poll are
/// called by one thread at a time; a syncBlock() (or syncWarp()) carries the order to and from
/// other threads.
struct MemorySemaphoreDevice {
  MemorySemaphoreHandle handle;

  __device__ explicit MemorySemaphoreDevice(const MemorySemaphoreHandle& from) : handle(from) {}

  /// Raises the peer's counter by one. What this thread wrote or saw before is visible to who sees
  /// it.
  __device__ void signal() {
    const uint64_t count = *handle.outbound + 1;
    *handle.outbound = count;
    device::storeRelease(handle.remoteInbound, count);
  }

  /// Whether the next signal has come; if so, it is consumed. Never blocks.
  __device__ bool poll() {
    const uint64_t next = *handle.expected + 1;
    if (device::loadAcquire(handle.inbound) < next) return false;
    *handle.expected = next;
    return true;
  }

  /// Waits for the next signal and consumes it. False once the limit of `control` has passed or a
  /// wait of this rank has failed before; the signal then counts as consumed all the same.
  __device__ bool wait(const WaitControl& control, WaitPoint point,
                       device::Site site = device::Site::current()) {
    const uint64_t next = *handle.expected + 1;
    *handle.expected = next;
    const uint64_t* inbound = handle.inbound;
    return device::waitUntil(
        control, [=] { return device::loadAcquire(inbound) >= next; }, point, inbound, site);
  }
};

/// Loads, stores and copies between the own memory and the peer's, and signals.
struct MemoryChannelDevice {
  MemoryChannelHandle handle;

  __device__ explicit MemoryChannelDevice(const MemoryChannelHandle& from) : handle(from) {}

  /// Copies `bytes` from the own memory to the peer's. Called by `threads` threads that share the
  /// work, this one being number `thread`. Offsets in bytes, of any alignment (16 is fast). Nothing
  /// is visible to the peer before a signal() that the copies are ordered before.
  __device__ void put(uint64_t remoteOffset, uint64_t localOffset, uint64_t bytes, unsigned thread,
                      unsigned threads) {
    copyShared(handle.remote + remoteOffset, handle.local + localOffset, bytes, thread, threads);
  }

  /// Copies `bytes` from the peer's memory to the own, as put does.
  __device__ void get(uint64_t localOffset, uint64_t remoteOffset, uint64_t bytes, unsigned thread,
                      unsigned threads) {
    copyShared(handle.local + localOffset, handle.remote + remoteOffset, bytes, thread, threads);
  }

  /// One value of the peer's memory; `offset` in bytes, aligned for T.
  template <class T>
  __device__ T read(uint64_t offset) const {
    return *reinterpret_cast<const T*>(handle.remote + offset);
  }
  template <class T>
  __device__ void write(uint64_t offset, T value) {
    *reinterpret_cast<T*>(handle.remote + offset) = value;
  }

  /// As MemorySemaphoreDevice.
  __device__ void signal() { MemorySemaphoreDevice(handle.semaphore).signal(); }
  __device__ bool poll() { return MemorySemaphoreDevice(handle.semaphore).poll(); }
  __device__ bool wait(const WaitControl& control, WaitPoint point,
                       device::Site site = device::Site::current()) {
    return MemorySemaphoreDevice(handle.semaphore).wait(control, point, site);
  }

 private:
  static __device__ void copyShared(char* to, const char* from, uint64_t bytes, unsigned thread,
                                    unsigned threads) {
    uint64_t vectors = 0;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 == 0) {
      vectors = bytes / 16;
      for (uint64_t i = thread; i < vectors; i += threads) {
        device::store16(to + i * 16, device::load16(from + i * 16));
      }
    }
    for (uint64_t i = vectors * 16 + thread; i < bytes; i += threads) to[i] = from[i];
  }
};

}  // namespace MSCCLPP_PLATFORM_NS
}  // namespace mscclpp
