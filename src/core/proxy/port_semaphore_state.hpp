// What is behind a PortSemaphore.
#pragma once

#include <memory>
#include <vector>

#include <mscclpp/port_channel.hpp>

namespace mscclpp {

struct PortSemaphore::State {
  PortSemaphoreHandle handle{};
  Connection::SignalTarget target;  ///< the peer's words; used by the peer's proxy thread only
  /// What the pointers above point into.
  std::vector<std::shared_ptr<const void>> owners;
};

}  // namespace mscclpp
