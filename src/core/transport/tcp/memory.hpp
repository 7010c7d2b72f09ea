// Memories of a tcp endpoint, and those of peers.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <mscclpp/connection.hpp>

namespace mscclpp::transport::tcp {

class Memory;

/// The memories of an endpoint that peers may write to, by the number that peers know. Thread safe.
class MemoryTable {
 public:
  MemoryTable();
  /// Random: tells this endpoint's memories from those of any other.
  uint64_t endpoint() const noexcept { return endpoint_; }
  std::shared_ptr<Memory> add(const std::shared_ptr<MemoryTable>& self, RegisteredMemory memory,
                              bool staged);
  /// Null when there is none, or it is gone.
  std::shared_ptr<Memory> find(uint64_t id);
  void remove(uint64_t id) noexcept;

 private:
  uint64_t endpoint_;
  std::atomic<uint64_t> next_ = 1;
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::weak_ptr<Memory>> memories_;
};

class Memory final : public LocalMemory, public std::enable_shared_from_this<Memory> {
 public:
  Memory(std::shared_ptr<MemoryTable> table, uint64_t id, RegisteredMemory memory, bool staged)
      : LocalMemory(std::move(memory)), table_(std::move(table)), id_(id), staged_(staged) {}
  ~Memory() override { table_->remove(id_); }

  std::vector<std::byte> describe() const override;
  uint64_t id() const noexcept { return id_; }
  /// Whether the socket calls cannot address it: its data goes through pinned memory.
  bool staged() const noexcept { return staged_; }
  char* at(uint64_t offset) const noexcept { return memory().data() + offset; }

 private:
  std::shared_ptr<MemoryTable> table_;
  uint64_t id_;
  bool staged_;
};

class PeerMemory final : public RemoteMemory {
 public:
  /// @throws Error invalidArgument unless `description` is of the peer's endpoint `endpoint`.
  static std::shared_ptr<PeerMemory> read(std::span<const std::byte> description, int peer,
                                          uint64_t endpoint);
  PeerMemory(uint64_t id, size_t bytes, bool onDevice) : RemoteMemory(bytes, onDevice), id_(id) {}
  uint64_t id() const noexcept { return id_; }

 private:
  uint64_t id_;
};

/// Random bytes from the kernel. @throws SystemError.
void fillRandom(void* bytes, size_t count);

}  // namespace mscclpp::transport::tcp
