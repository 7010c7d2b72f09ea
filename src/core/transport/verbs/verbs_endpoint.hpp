// The transport verbs: InfiniBand and RoCE through reliable connected queue pairs.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include <mscclpp/connection.hpp>

#include "core/transport/verbs/nic.hpp"
#include "core/transport/verbs/verbs_memory.hpp"

namespace mscclpp::transport::verbs {

/// What only tests change.
struct Tuning {
  /// False: adds are made by the receiver's CPU, as with a NIC that has no atomics.
  bool hardwareAtomics = true;
  /// A read before every add, as between memories whose order the bus does not keep.
  bool fenceEveryAdd = false;
  /// After so much silence a connection makes sure that its peer still answers.
  std::chrono::nanoseconds keepAlive = std::chrono::seconds(1);
  /// Writes from this size on are spread over all queue pairs.
  uint64_t stripeBytes = uint64_t{256} << 10;
  /// Largest work request; the port may have a smaller limit.
  uint64_t largestPiece = uint64_t{1} << 30;
};

class VerbsEndpoint final : public Endpoint, public std::enable_shared_from_this<VerbsEndpoint> {
 public:
  /// @throws Error unsupported without libibverbs or a usable device.
  VerbsEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options,
                const Tuning& tuning);

  std::string describe() const override;
  std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) override;
  std::shared_ptr<Connection> open(int peer) override;

  const std::shared_ptr<Nic>& nic() const noexcept { return nic_; }
  const Tuning& tuning() const noexcept { return tuning_; }
  bool atomics() const noexcept { return tuning_.hardwareAtomics && nic_->atomics(); }
  GpuDirect gpuDirect() const noexcept { return gpuDirect_; }
  MemoryTable& memories() noexcept { return memories_; }

 private:
  Tuning tuning_;
  std::shared_ptr<Nic> nic_;
  GpuDirect gpuDirect_;
  MemoryTable memories_;
};

}  // namespace mscclpp::transport::verbs
