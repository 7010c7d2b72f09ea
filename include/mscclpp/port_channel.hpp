// A channel to any peer: kernels push requests, a CPU proxy carries them out on a Connection.
#pragma once

#include <memory>
#include <vector>

#include <mscclpp/connection.hpp>
#include <mscclpp/port_channel_handle.hpp>
#include <mscclpp/proxy.hpp>

namespace mscclpp {

/// Host memory that other ranks can map and that kernels of `device` address with the same pointer,
/// zeroed: where counters live that CPUs add to. Blocks.
RegisteredMemory allocateHostMemory(const std::shared_ptr<Device>& device, size_t bytes);

/// Counts the signals of one peer, one direction each way. A shared handle.
class PortSemaphore {
 public:
  PortSemaphore() = default;

  /// Collective over the group: a semaphore to every rank that `connections` has, by rank; other
  /// entries are empty. Every rank must be connected to somebody.
  /// Every channel of a peer may share one, or have its own from another call.
  static std::vector<PortSemaphore> createAll(
      Bootstrap& bootstrap, Endpoint& endpoint,
      const std::vector<std::shared_ptr<Connection>>& connections);

  explicit operator bool() const noexcept { return state_ != nullptr; }
  /// Valid as long as this object or a copy of it lives.
  PortSemaphoreHandle deviceHandle() const;

 private:
  friend class ProxyService;
  struct State;
  std::shared_ptr<State> state_;
};

/// What a channel is made of.
struct PortChannelSpec {
  std::shared_ptr<Connection> connection;
  PortSemaphore semaphore;                 ///< may be empty: then signal and wait must not be used
  std::shared_ptr<LocalMemory> local;      ///< source of put
  std::shared_ptr<RemoteMemory> remote;    ///< destination of put
  std::shared_ptr<RemoteMemory> counters;  ///< target of atomicAdd; may be null
  /// Channels of a peer with the same number share a FIFO. Blocks that push a lot should have their
  /// own: they then never wait for each other.
  int fifo = 0;
};

/// Made by ProxyService::createChannel; a shared handle that keeps memories and connection alive.
class PortChannel {
 public:
  PortChannel() = default;
  /// Plain struct for a kernel's Args; wrap it in PortChannelDevice there. Valid as long as the
  /// service lives.
  PortChannelHandle deviceHandle() const;

 private:
  friend class ProxyService;
  PortChannelHandle handle_{};
  std::shared_ptr<const PortChannelSpec> spec_;
};

}  // namespace mscclpp
