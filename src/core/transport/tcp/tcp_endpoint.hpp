// A rank's end of the transport tcp.
#pragma once

#include <memory>

#include <mscclpp/connection.hpp>

#include "core/transport/copy_streams.hpp"
#include "core/transport/tcp/memory.hpp"
#include "core/transport/tcp/staging.hpp"

namespace mscclpp::transport::tcp {

/// Which memory goes through pinned staging.
enum class StagingUse {
  deviceMemory,
  always  ///< all memory, so that this path runs on machines without a GPU: for tests
};

class TcpEndpoint final : public Endpoint, public std::enable_shared_from_this<TcpEndpoint> {
 public:
  TcpEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options, StagingUse staging);

  std::string describe() const override;
  std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) override;
  std::shared_ptr<Connection> open(int peer) override;

  const std::shared_ptr<MemoryTable>& memories() const noexcept { return memories_; }
  /// For one direction of a connection; null when no memory of this endpoint needs it.
  std::unique_ptr<Staging> makeStaging();

 private:
  std::shared_ptr<MemoryTable> memories_;
  StagingUse staging_;
  std::unique_ptr<CopyStreams> streams_;  ///< null when no memory is staged
};

}  // namespace mscclpp::transport::tcp
