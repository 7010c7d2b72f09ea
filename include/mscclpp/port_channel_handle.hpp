// What a kernel needs of a port channel: plain structs, the same on the host and on both platforms.
#pragma once

#include <cstdint>
#include <type_traits>

#include <mscclpp/fifo_handle.hpp>

namespace mscclpp {

/// Device side of PortSemaphore: signals that came are the sum of both words.
struct PortSemaphoreHandle {
  const uint64_t* inboundHost;    ///< host memory; the peer, or the proxy for it, writes it
  const uint64_t* inboundDevice;  ///< GPU memory, where the transport signals there too; else null
  uint64_t* expected;             ///< device memory, private: signals waited for so far
};

/// Device side of PortChannel.
struct PortChannelHandle {
  FifoHandle fifo;
  PortSemaphoreHandle semaphore;
  const uint64_t* flushed;  ///< host memory: FIFO position after the last completed flush
  uint64_t localBytes;
  uint64_t remoteBytes;
  uint64_t counterBytes;
  uint32_t channel;  ///< number at the proxy
  int32_t peer;      ///< rank, for reports
};
static_assert(std::is_trivially_copyable_v<PortChannelHandle>);

}  // namespace mscclpp
