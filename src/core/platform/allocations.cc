#include "core/platform/allocations.hpp"

#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <string_view>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp::detail {

namespace {

constexpr uint32_t kHandleVersion = 1;

/// Never destroyed: allocations may be freed by destructors of static objects.
struct Table {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> byBase;
};
Table& table() {
  static Table* const instance = new Table;
  return *instance;
}

uintptr_t addressOf(const void* memory) {
  return reinterpret_cast<uintptr_t>(memory);
}

/// The allocation that holds all of the range, or nullptr. The table is locked.
const Allocation* lookUp(const Table& allocations, uintptr_t begin, size_t bytes) {
  auto next = allocations.byBase.upper_bound(begin);
  if (next == allocations.byBase.begin()) return nullptr;
  const Allocation& found = std::prev(next)->second;
  const uintptr_t offset = begin - addressOf(found.base);
  return offset <= found.bytes && bytes <= found.bytes - offset ? &found : nullptr;
}

template <size_t N>
void copyText(char (&to)[N], std::string_view from) {
  check(from.size() < N, ErrorCode::internal, "'{}' does not fit into {} bytes", from, N);
  std::memcpy(to, from.data(), from.size());
}

}  // namespace

ProcessToken processToken() {
  struct State {
    std::mutex mutex;
    ProcessToken token{};
  };
  static State* const state = new State;
  const std::lock_guard lock(state->mutex);
  if (state->token.pid != getpid()) {  // first call, or first after a fork
    uint64_t random = 0;
    if (getrandom(&random, sizeof(random), 0) != sizeof(random)) {
      throw SystemError(errno, "cannot get random bytes");
    }
    state->token = {getpid(), random};
  }
  return state->token;
}

void addAllocation(const Allocation& allocation) {
  const std::lock_guard lock(table().mutex);
  table().byBase[addressOf(allocation.base)] = allocation;
}

void removeAllocation(const void* base) noexcept {
  const std::lock_guard lock(table().mutex);
  table().byBase.erase(addressOf(base));
}

Allocation findAllocation(const Device& device, const void* memory, size_t bytes) {
  const std::lock_guard lock(table().mutex);
  const Allocation* found = lookUp(table(), addressOf(memory), bytes);
  check(found != nullptr && found->platform == device.platform() &&
            found->deviceIndex == device.index(),
        ErrorCode::invalidArgument,
        "{} bytes at {} are not within one allocateExportable() of {} device {}: only such memory "
        "can "
        "be exported",
        bytes, memory, toString(device.platform()), device.index());
  return *found;
}

MemoryHandle makeHandle(const Device& device, const Allocation& allocation, const void* memory,
                        size_t bytes) {
  const ProcessToken self = processToken();
  MemoryHandle handle{};
  handle.version = kHandleVersion;
  handle.platform = static_cast<uint32_t>(device.platform());
  handle.bytes = bytes;
  handle.offset = addressOf(memory) - addressOf(allocation.base);
  handle.allocationBytes = allocation.bytes;
  handle.pointer = addressOf(memory);
  handle.processRandom = self.random;
  handle.pid = self.pid;
  handle.inode = allocation.inode;
  handle.descriptor = allocation.descriptor;
  copyText(handle.hostId, hostId());
  copyText(handle.deviceId, device.platform() == Platform::cpu ? "cpu" : device.id());
  return handle;
}

void checkHandle(const Device& device, const MemoryHandle& handle) {
  check(handle.version == kHandleVersion && handle.offset <= handle.allocationBytes &&
            handle.bytes <= handle.allocationBytes - handle.offset,
        ErrorCode::invalidArgument, "these bytes are no memory handle of this version");
  check(handle.platform == static_cast<uint32_t>(device.platform()), ErrorCode::unsupported,
        "memory of platform {} cannot be mapped for platform {}: all ranks of a group use the same",
        toString(static_cast<Platform>(handle.platform)), toString(device.platform()));
  const std::string_view host(handle.hostId, strnlen(handle.hostId, sizeof(handle.hostId)));
  check(
      host == hostId(), ErrorCode::unsupported,
      "memory of host '{}' cannot be mapped on host '{}': memory channels work within a host only "
      "(if these are one host, give both processes the same MSCCLPP_HOST_ID)",
      host, hostId());
}

std::shared_ptr<void> findOwn(const MemoryHandle& handle, int* deviceIndex) {
  if (processToken() != ProcessToken{handle.pid, handle.processRandom}) return nullptr;
  const std::lock_guard lock(table().mutex);
  const Allocation* found = lookUp(table(), handle.pointer, handle.bytes);
  const std::shared_ptr<void> owner = found == nullptr ? nullptr : found->memory.lock();
  check(
      owner != nullptr, ErrorCode::invalidState,
      "the exported memory ({} bytes) of this process has been freed: keep it until all ranks have "
      "imported it",
      handle.bytes);
  if (deviceIndex != nullptr) *deviceIndex = found->deviceIndex;
  return {owner, reinterpret_cast<void*>(handle.pointer)};
}

std::string exporterOf(const MemoryHandle& handle) {
  return fmt::format(
      "process {} of host '{}'", handle.pid,
      std::string_view(handle.hostId, strnlen(handle.hostId, sizeof(handle.hostId))));
}

}  // namespace mscclpp::detail
