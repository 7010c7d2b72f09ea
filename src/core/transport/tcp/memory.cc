#include "core/transport/tcp/memory.hpp"

#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include <mscclpp/errors.hpp>

#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

void fillRandom(void* bytes, size_t count) {
  if (::getrandom(bytes, count, 0) != static_cast<ssize_t>(count)) {
    throw SystemError(errno, "tcp: cannot get random bytes");
  }
}

MemoryTable::MemoryTable() {
  fillRandom(&endpoint_, sizeof(endpoint_));
}

std::shared_ptr<Memory> MemoryTable::add(const std::shared_ptr<MemoryTable>& self,
                                         RegisteredMemory memory, bool staged) {
  const uint64_t id = next_++;  // never used again: a stale number finds nothing
  auto result = std::make_shared<Memory>(self, id, std::move(memory), staged);
  const std::lock_guard lock(mutex_);
  memories_.emplace(id, result);
  return result;
}

std::shared_ptr<Memory> MemoryTable::find(uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = memories_.find(id);
  return found == memories_.end() ? nullptr : found->second.lock();
}

void MemoryTable::remove(uint64_t id) noexcept {
  const std::lock_guard lock(mutex_);
  memories_.erase(id);
}

std::vector<std::byte> Memory::describe() const {
  const MemoryDescription description{.version = kVersion,
                                      .onDevice = onDevice() ? 1U : 0U,
                                      .endpoint = table_->endpoint(),
                                      .id = id_,
                                      .bytes = size()};
  std::vector<std::byte> bytes(sizeof(description));
  std::memcpy(bytes.data(), &description, sizeof(description));
  return bytes;
}

std::shared_ptr<PeerMemory> PeerMemory::read(std::span<const std::byte> description, int peer,
                                             uint64_t endpoint) {
  MemoryDescription content{};
  check(description.size() == sizeof(content), ErrorCode::invalidArgument,
        "tcp: {} bytes describe no memory of rank {}: LocalMemory::describe() of tcp gives {}",
        description.size(), peer, sizeof(content));
  std::memcpy(&content, description.data(), sizeof(content));
  check(content.version == kVersion, ErrorCode::invalidArgument,
        "tcp: these bytes describe no memory of rank {} (version {:#x}, this library has {:#x}): "
        "do both ranks run the same version?",
        peer, content.version, kVersion);
  check(content.endpoint == endpoint, ErrorCode::invalidArgument,
        "tcp: the memory of {} bytes belongs to another endpoint than the one of rank {} that this "
        "connection leads to",
        content.bytes, peer);
  return std::make_shared<PeerMemory>(content.id, content.bytes, content.onDevice != 0);
}

}  // namespace mscclpp::transport::tcp
