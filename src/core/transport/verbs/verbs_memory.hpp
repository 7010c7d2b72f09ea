// Memory that a NIC may read and write.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include <mscclpp/connection.hpp>

#include "core/transport/verbs/nic.hpp"

namespace mscclpp::transport::verbs {

/// Registers host memory for local use and for writes, reads and atomics of peers. Never with
/// relaxed ordering: a counter must not overtake the data before it.
/// @throws Error unsupported, outOfMemory with a hint at the limit of locked memory.
Handle<ibv_mr> registerHost(Nic& nic, void* memory, size_t bytes);

class VerbsMemory final : public LocalMemory {
 public:
  VerbsMemory(std::shared_ptr<Nic> nic, RegisteredMemory memory);

  std::vector<std::byte> describe() const override;
  uint32_t localKey() const noexcept { return region_->lkey; }
  uint32_t remoteKey() const noexcept { return region_->rkey; }

 private:
  std::shared_ptr<Nic> nic_;
  Handle<ibv_mr> region_;
};

class VerbsRemoteMemory final : public RemoteMemory {
 public:
  /// @throws Error invalidArgument when `description` is not one of VerbsMemory.
  static std::shared_ptr<VerbsRemoteMemory> make(std::span<const std::byte> description);
  VerbsRemoteMemory(uint64_t address, uint32_t key, uint64_t bytes, bool onDevice)
      : RemoteMemory(bytes, onDevice), address_(address), key_(key) {}

  uint64_t address() const noexcept { return address_; }
  uint32_t key() const noexcept { return key_; }

 private:
  uint64_t address_;
  uint32_t key_;
};

/// The memories of an endpoint by their remote keys: where a peer without atomics of its NIC may
/// ask this side to add. Thread safe.
class MemoryTable {
 public:
  void add(const std::shared_ptr<VerbsMemory>& memory);
  /// Adds to the counter at `address` in the memory with that key. @throws Error invalidArgument
  /// when that is no counter of a living host memory.
  void applyAdd(uint32_t key, uint64_t address, int64_t value);

 private:
  std::mutex mutex_;
  std::map<uint32_t, std::weak_ptr<VerbsMemory>> memories_;
};

}  // namespace mscclpp::transport::verbs
