// CPU ranks of one host: the peer's memory is mapped, so an operation is done when it is posted.
#include <cstring>

#include <mscclpp/errors.hpp>

#include "core/transport/peer_process.hpp"
#include "core/transport/transports.hpp"

namespace mscclpp::transport {

namespace {

class ShmMemory final : public LocalMemory {
 public:
  using LocalMemory::LocalMemory;
  std::vector<std::byte> describe() const override { return memory().serialize(); }
};

class MappedMemory final : public RemoteMemory {
 public:
  explicit MappedMemory(RegisteredMemory memory)
      : RemoteMemory(memory.size(), false), memory_(std::move(memory)) {}
  char* data() const { return memory_.data(); }

 private:
  RegisteredMemory memory_;
};

char* addressIn(const RemoteMemory* memory, uint64_t offset) {
  return static_cast<const MappedMemory*>(memory)->data() + offset;
}

class ShmConnection final : public Connection {
 public:
  ShmConnection(std::shared_ptr<Endpoint> endpoint, int peer)
      : Connection(Transport::shm, peer),
        endpoint_(std::move(endpoint)),
        process_(endpoint_->options().rank) {}

  ConnectionCapabilities capabilities() const noexcept override {
    return {.oneSidedWrites = true, .oneSidedAtomics = true};
  }
  std::string describe() const override {
    return fmt::format("rank {} to rank {}: shm, mapped memory", endpoint_->options().rank, peer());
  }
  std::vector<std::byte> address() const override {
    const PeerProcess::Address own = process_.address();
    std::vector<std::byte> bytes(sizeof(own));
    std::memcpy(bytes.data(), &own, sizeof(own));
    return bytes;
  }
  void connect(std::span<const std::byte> theirs) override {
    PeerProcess::Address address;
    check(theirs.size() == sizeof(address), ErrorCode::invalidArgument,
          "shm: an address has {} bytes, not {}: did the peer open another transport?",
          sizeof(address), theirs.size());
    std::memcpy(&address, theirs.data(), sizeof(address));
    process_.connect(address);
  }
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) override {
    return std::make_shared<MappedMemory>(
        RegisteredMemory::deserialize(endpoint_->device(), description));
  }

  bool canPost() const override { return true; }
  uint64_t completed() const noexcept override { return failed() ? completed_ : posted(); }
  bool progress() override {
    const std::string death = failed() ? std::string() : process_.death();
    if (!death.empty()) {
      completed_ = posted();
      fail(death);
    }
    return false;
  }
  void close() noexcept override { process_.sayGoodbye(); }

 private:
  void doWrite(const Write& write) override {
    std::memmove(addressIn(write.remote, write.remoteOffset),
                 write.local->memory().data() + write.localOffset, write.bytes);
  }
  void doAdd(const Add& add) override {
    auto* counter = reinterpret_cast<int64_t*>(addressIn(add.remote, add.offset));
    __atomic_fetch_add(counter, add.value, __ATOMIC_ACQ_REL);
  }

  std::shared_ptr<Endpoint> endpoint_;
  PeerProcess process_;
  uint64_t completed_ = 0;
};

class ShmEndpoint final : public Endpoint, public std::enable_shared_from_this<ShmEndpoint> {
 public:
  ShmEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options)
      : Endpoint(Transport::shm, std::move(device), options) {}

  std::string describe() const override { return "shm on " + device()->describe(); }
  std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) override {
    check(static_cast<bool>(memory), ErrorCode::invalidArgument, "shm: the memory is empty");
    return std::make_shared<ShmMemory>(std::move(memory));
  }
  std::shared_ptr<Connection> open(int peer) override {
    return std::make_shared<ShmConnection>(shared_from_this(), peer);
  }
};

}  // namespace

std::shared_ptr<Endpoint> makeShmEndpoint(std::shared_ptr<Device> device,
                                          const EndpointOptions& options) {
  check(device->platform() == Platform::cpu, ErrorCode::unsupported,
        "transport shm carries CPU memory only, not {}: use cuda_ipc between GPUs of one host",
        device->describe());
  return std::make_shared<ShmEndpoint>(std::move(device), options);
}

}  // namespace mscclpp::transport
