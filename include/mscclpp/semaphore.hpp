// A counting semaphore between two ranks, in memory that both map.
#pragma once

#include <memory>
#include <vector>

#include <mscclpp/memory_channel_handle.hpp>
#include <mscclpp/registered_memory.hpp>

namespace mscclpp {

/// One direction each way between two ranks. Each side holds an inbound counter that only the peer
/// writes, and, for itself only, how often it has signalled and how many signals it has waited for.
/// All are 64 bits and never reset. A shared handle; one signaller and one waiter per side at a
/// time.
class MemorySemaphore {
 public:
  /// Bytes of exportable memory that one semaphore needs on each side.
  static constexpr size_t kStateBytes = 256;

  MemorySemaphore() = default;
  /// `localState` and `remoteState` are kStateBytes of zeroed exportable memory of this rank and of
  /// the peer, at offset `localOffset` and `remoteOffset`.
  MemorySemaphore(RegisteredMemory localState, size_t localOffset, RegisteredMemory remoteState,
                  size_t remoteOffset);

  /// Collective over the group: a semaphore to every rank (the entry of the own rank signals
  /// itself). Works with any Bootstrap.
  static std::vector<MemorySemaphore> createAll(Bootstrap& bootstrap,
                                                std::shared_ptr<Device> device);
  /// Both ranks of a pair call it with each other as `peer` and the same `tag`. Needs send and
  /// recv.
  static MemorySemaphore connect(Bootstrap& bootstrap, std::shared_ptr<Device> device, int peer,
                                 int tag = 0);

  /// Plain struct for kernels; valid as long as this object or a copy of it lives.
  MemorySemaphoreHandle deviceHandle() const;

 private:
  RegisteredMemory local_;
  RegisteredMemory remote_;
  size_t localOffset_ = 0;
  size_t remoteOffset_ = 0;
};

}  // namespace mscclpp
