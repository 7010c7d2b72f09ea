// Kernel side of PortChannel, on both platforms.
#pragma once

#include <cstdint>

#include <mscclpp/fifo_device.hpp>
#include <mscclpp/port_channel_handle.hpp>

namespace mscclpp {
inline namespace MSCCLPP_PLATFORM_NS {

/// Asks the proxy to move data to the peer. Any number of threads may call put, signal, atomicAdd
/// and flush at the same time; wait and poll belong to one thread at a time.
///
/// Order: what a channel (or another one of the same FIFO and peer) pushed before a signal or an
/// atomicAdd is at the peer before that is seen there; puts among themselves have no order. Data
/// that other threads wrote must reach the pushing thread first: a syncBlock() or syncWarp() does
/// it.
///
/// Offsets and sizes are in bytes and of any alignment, counters at multiples of 8. They are
/// checked on the host; what lies outside its memory breaks the connection, and every wait reports
/// it.
///
/// Calls return false once a wait of `control` has failed: on this rank, or raised by the proxy.
///
/// Every thread makes its own object. A thread that alone pushes to the channel's FIFO may claim
/// it: `channel.fifo.claim()`, in the end `channel.fifo.release()`.
struct PortChannelDevice {
  PortChannelHandle handle;
  FifoDevice fifo;

  __device__ explicit PortChannelDevice(const PortChannelHandle& from)
      : handle(from), fifo(from.fifo) {}

  /// Goes on with another channel of the same FIFO; a claim stays.
  __device__ void select(const PortChannelHandle& other) { handle = other; }

  /// Writes `bytes` of the own memory into the peer's. The source must stay as it is until a flush,
  /// or until the peer has told that it came.
  __device__ bool put(const WaitControl& control, uint64_t remoteOffset, uint64_t localOffset,
                      uint64_t bytes, device::Site site = device::Site::current()) {
    return putAs(TriggerKind::put, control, {remoteOffset, localOffset, bytes}, site);
  }
  /// put() and signal() with one trigger.
  __device__ bool putWithSignal(const WaitControl& control, uint64_t remoteOffset,
                                uint64_t localOffset, uint64_t bytes,
                                device::Site site = device::Site::current()) {
    return putAs(TriggerKind::putWithSignal, control, {remoteOffset, localOffset, bytes}, site);
  }
  /// Raises the peer's semaphore by one.
  __device__ bool signal(const WaitControl& control, device::Site site = device::Site::current()) {
    return push(control, {.kind = TriggerKind::signal}, TriggerOrder::release, site) !=
           FifoDevice::kNowhere;
  }
  /// Adds `value` to the 64-bit counter at `offset` of the peer's counter memory.
  __device__ bool atomicAdd(const WaitControl& control, uint64_t offset, int64_t value,
                            device::Site site = device::Site::current()) {
    return push(control, {.kind = TriggerKind::atomicAdd, .remoteOffset = offset, .value = value},
                TriggerOrder::release, site) != FifoDevice::kNowhere;
  }
  struct Counting {
    uint64_t offset;
    int64_t value;
  };
  /// put() and then atomicAdd(). The proxy takes both in order: one release is enough.
  __device__ bool putThenAdd(const WaitControl& control, uint64_t remoteOffset,
                             uint64_t localOffset, uint64_t bytes, Counting add,
                             device::Site site = device::Site::current()) {
    return put(control, remoteOffset, localOffset, bytes, site) &&
           push(control,
                {.kind = TriggerKind::atomicAdd, .remoteOffset = add.offset, .value = add.value},
                TriggerOrder::relaxed, site) != FifoDevice::kNowhere;
  }
  /// Waits until everything that was pushed to this channel before is in the peer's memory; its
  /// sources may then be overwritten. Other channels go on meanwhile.
  __device__ bool flush(const WaitControl& control, device::Site site = device::Site::current()) {
    const uint64_t position =
        push(control, {.kind = TriggerKind::flush}, TriggerOrder::relaxed, site);
    if (position == FifoDevice::kNowhere) return false;
    const uint64_t* flushed = handle.flushed;
    return device::waitUntil(
        control, [=] { return device::loadAcquire(flushed) > position; }, {kWaitFlush, handle.peer},
        flushed, site);
  }

  /// Whether the next signal of the peer has come; if so, it is consumed. Never blocks.
  __device__ bool poll() {
    const uint64_t next = *handle.semaphore.expected + 1;
    if (inbound() < next) return false;
    *handle.semaphore.expected = next;
    return true;
  }
  /// Signals that have come from the peer in all, consumed or not: for readers, any number of them,
  /// who count for themselves. Never blocks; an acquire.
  __device__ uint64_t signals() const { return inbound(); }
  /// Waits for the next signal of the peer and consumes it. After a failure the signal counts as
  /// consumed all the same.
  __device__ bool wait(const WaitControl& control, WaitPoint point,
                       device::Site site = device::Site::current()) {
    const uint64_t next = *handle.semaphore.expected + 1;
    *handle.semaphore.expected = next;
    return device::waitUntil(
        control, [this, next] { return inbound() >= next; }, point, handle.semaphore.inboundHost,
        site);
  }

 private:
  /// One put above this size is several triggers.
  static constexpr uint64_t kPieceBytes = uint64_t{1} << 31;
  static_assert(kPieceBytes <= Trigger::kMaxBytes);

  struct Range {
    uint64_t remoteOffset;
    uint64_t localOffset;
    uint64_t bytes;
  };

  __device__ uint64_t push(const WaitControl& control, TriggerFields fields, TriggerOrder order,
                           device::Site site) {
    fields.channel = handle.channel;
    return fifo.push(control, Trigger::encode(fields), order, handle.peer, site);
  }

  __device__ bool putAs(TriggerKind last, const WaitControl& control, Range range,
                        device::Site site) {
    while (range.bytes > kPieceBytes) {
      if (!pushPut(TriggerKind::put, control, {range.remoteOffset, range.localOffset, kPieceBytes},
                   site)) {
        return false;
      }
      range = {range.remoteOffset + kPieceBytes, range.localOffset + kPieceBytes,
               range.bytes - kPieceBytes};
    }
    return pushPut(last, control, range, site);
  }
  __device__ bool pushPut(TriggerKind kind, const WaitControl& control, const Range& range,
                          device::Site site) {
    return push(control,
                {.kind = kind,
                 .remoteOffset = range.remoteOffset,
                 .localOffset = range.localOffset,
                 .bytes = range.bytes},
                TriggerOrder::release, site) != FifoDevice::kNowhere;
  }

  __device__ uint64_t inbound() const {
    const uint64_t host = device::loadAcquire(handle.semaphore.inboundHost);
    if (handle.semaphore.inboundDevice == nullptr) return host;
    return host + device::loadAcquire(handle.semaphore.inboundDevice);
  }
};

}  // namespace MSCCLPP_PLATFORM_NS
}  // namespace mscclpp
