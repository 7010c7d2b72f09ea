#include "core/transport/verbs/verbs_memory.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::verbs {

namespace {

struct Description {
  uint32_t magic;
  uint32_t key;
  uint64_t address;
  uint64_t bytes;
  uint64_t onDevice;
};
constexpr uint32_t kMagic = 0x314d5256;  // "VRM1"

int accessOf(const Nic& nic) {
  return IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
         (nic.atomics() ? IBV_ACCESS_REMOTE_ATOMIC : 0);
}

std::string lockedLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "unknown";
  if (limit.rlim_cur == RLIM_INFINITY) return "unlimited";
  return fmt::format("{} bytes", limit.rlim_cur);
}

[[noreturn]] void failRegistration(int error, const Nic& nic, const void* memory, size_t bytes) {
  if (error != ENOMEM) {
    throw SystemError(
        error, fmt::format("verbs: registering {} bytes at {} with {}", bytes, memory, nic.name()));
  }
  fail(ErrorCode::outOfMemory,
       "verbs: registering {} bytes at {} with {}: ENOMEM. The limit of locked memory is {} "
       "(ulimit -l; in a container --ulimit memlock=-1); if that is high enough, the NIC's tables "
       "are full or the IOMMU cannot map so much",
       bytes, memory, nic.name(), lockedLimit());
}

void checkSize(const Nic& nic, size_t bytes) {
  check(bytes <= nic.limits().max_mr_size, ErrorCode::unsupported,
        "verbs: a memory of {} bytes: {} registers at most {} at once: use several memories", bytes,
        nic.name(), nic.limits().max_mr_size);
}

/// Through a dma-buf where the driver exports one, else by address: that works with nvidia_peermem.
Handle<ibv_mr> registerDevice(Nic& nic, const RegisteredMemory& memory) {
  const Device& device = *memory.device();
  std::string reason = "this libibverbs is older than 34";
  if (library().regDmaBufMr != nullptr) {
    try {
      const DmaBuf buffer = device.exportDmaBuf(memory.data(), memory.size());
      ibv_mr* const region = library().regDmaBufMr(nic.pd(), buffer.offset, memory.size(),
                                                   reinterpret_cast<uint64_t>(memory.data()),
                                                   buffer.descriptor, accessOf(nic));
      const int error = errno;
      ::close(buffer.descriptor);
      if (region != nullptr) return {region, library().deregMr};
      reason = std::strerror(error);
    } catch (const Error& error) {
      reason = error.what();
    }
  }
  ibv_mr* const region = library().regMr(nic.pd(), memory.data(), memory.size(), accessOf(nic));
  if (region == nullptr) {
    fail(ErrorCode::unsupported,
         "verbs: {} cannot register {} bytes of GPU memory of {}: dma-buf: {}; nvidia_peermem: {}. "
         "Load nvidia_peermem, or use a driver and kernel that export dma-bufs, or the transport "
         "tcp",
         nic.name(), memory.size(), device.describe(), reason, std::strerror(errno));
  }
  return {region, library().deregMr};
}

Handle<ibv_mr> registerAny(Nic& nic, const RegisteredMemory& memory) {
  check(static_cast<bool>(memory), ErrorCode::invalidArgument, "verbs: the memory is empty");
  if (memory.device()->platform() == Platform::cpu) {
    return registerHost(nic, memory.data(), memory.size());
  }
  checkSize(nic, memory.size());
  return registerDevice(nic, memory);
}

}  // namespace

Handle<ibv_mr> registerHost(Nic& nic, void* memory, size_t bytes) {
  checkSize(nic, bytes);
  ibv_mr* const region = library().regMr(nic.pd(), memory, bytes, accessOf(nic));
  if (region == nullptr) failRegistration(errno, nic, memory, bytes);
  return {region, library().deregMr};
}

VerbsMemory::VerbsMemory(std::shared_ptr<Nic> nic, RegisteredMemory memory)
    : LocalMemory(std::move(memory)),
      nic_(std::move(nic)),
      region_(registerAny(*nic_, this->memory())) {}

std::vector<std::byte> VerbsMemory::describe() const {
  const Description description{.magic = kMagic,
                                .key = remoteKey(),
                                .address = reinterpret_cast<uint64_t>(memory().data()),
                                .bytes = size(),
                                .onDevice = onDevice() ? 1U : 0U};
  std::vector<std::byte> bytes(sizeof(description));
  std::memcpy(bytes.data(), &description, sizeof(description));
  return bytes;
}

std::shared_ptr<VerbsRemoteMemory> VerbsRemoteMemory::make(std::span<const std::byte> bytes) {
  Description description{};
  if (bytes.size() == sizeof(description)) {
    std::memcpy(&description, bytes.data(), sizeof(description));
  }
  check(description.magic == kMagic, ErrorCode::invalidArgument,
        "verbs: {} bytes are no description of a memory of this transport: did the peer register "
        "it with another one?",
        bytes.size());
  return std::make_shared<VerbsRemoteMemory>(description.address, description.key,
                                             description.bytes, description.onDevice != 0);
}

void MemoryTable::add(const std::shared_ptr<VerbsMemory>& memory) {
  const std::lock_guard lock(mutex_);
  std::erase_if(memories_, [](const auto& entry) { return entry.second.expired(); });
  memories_[memory->remoteKey()] = memory;
}

void MemoryTable::applyAdd(uint32_t key, uint64_t address, int64_t value) {
  const std::lock_guard lock(mutex_);
  const auto found = memories_.find(key);
  const auto memory = found == memories_.end() ? nullptr : found->second.lock();
  const auto base = memory ? reinterpret_cast<uint64_t>(memory->memory().data()) : 0;
  check(memory && !memory->onDevice() && address % 8 == 0 && address >= base &&
            memory->size() >= 8 && address - base <= memory->size() - 8,
        ErrorCode::invalidArgument,
        "it asked for an add at address {:#x} of the memory with key {:#x}, where no counter is",
        address, key);
  __atomic_fetch_add(reinterpret_cast<int64_t*>(address), value, __ATOMIC_ACQ_REL);
}

}  // namespace mscclpp::transport::verbs
