#include <utility>

#include <mscclpp/errors.hpp>

#include "core/transport/copy_streams.hpp"
#include "core/transport/cuda_ipc/cuda_ipc_connection.hpp"
#include "core/transport/transports.hpp"

namespace mscclpp::transport {

namespace {

class CudaIpcEndpoint final : public Endpoint,
                              public std::enable_shared_from_this<CudaIpcEndpoint> {
 public:
  CudaIpcEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options)
      : Endpoint(Transport::cudaIpc, std::move(device), options),
        streams_(Endpoint::device(), options.rank, options.copyStreams),
        numbers_(std::make_shared<NumberTable>(Endpoint::device())) {}

  std::string describe() const override { return "cuda_ipc on " + device()->describe(); }
  std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) override {
    check(static_cast<bool>(memory), ErrorCode::invalidArgument, "cuda_ipc: the memory is empty");
    return std::make_shared<IpcMemory>(std::move(memory));
  }
  std::shared_ptr<Connection> open(int peer) override {
    return std::make_shared<CudaIpcConnection>(shared_from_this(), streams_.next(), numbers_, peer);
  }

 private:
  CopyStreams streams_;
  std::shared_ptr<const NumberTable> numbers_;
};

}  // namespace

std::shared_ptr<Endpoint> makeCudaIpcEndpoint(std::shared_ptr<Device> device,
                                              const EndpointOptions& options) {
  check(device->platform() == Platform::cuda, ErrorCode::unsupported,
        "transport cuda_ipc carries GPU memory, not that of {}: use shm between CPU ranks",
        device->describe());
  return std::make_shared<CudaIpcEndpoint>(std::move(device), options);
}

}  // namespace mscclpp::transport
