// A channel to a peer whose memory is mapped: kernels load, store and signal.
#pragma once

#include <mscclpp/memory_channel_handle.hpp>
#include <mscclpp/semaphore.hpp>

namespace mscclpp {

/// A semaphore and the memories on both of its ends. Host side: owns; device side: deviceHandle().
class MemoryChannel {
 public:
  MemoryChannel() = default;
  /// `local`: source of put and destination of get; `remote`: the peer's memory, mapped here.
  MemoryChannel(MemorySemaphore semaphore, RegisteredMemory local, RegisteredMemory remote)
      : semaphore_(std::move(semaphore)), local_(std::move(local)), remote_(std::move(remote)) {}

  const RegisteredMemory& local() const noexcept { return local_; }
  const RegisteredMemory& remote() const noexcept { return remote_; }

  /// Plain struct for a kernel's Args; wrap it in MemoryChannelDevice there. Valid as long as this
  /// object or a copy of it lives.
  MemoryChannelHandle deviceHandle() const;

 private:
  MemorySemaphore semaphore_;
  RegisteredMemory local_;
  RegisteredMemory remote_;
};

}  // namespace mscclpp
