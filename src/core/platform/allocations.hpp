// The exportable allocations of this process, and who this process is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include <mscclpp/platform.hpp>

namespace mscclpp::detail {

/// What distinguishes this process from any other, also from one that gets its pid later.
struct ProcessToken {
  int32_t pid;
  uint64_t random;
  bool operator==(const ProcessToken&) const = default;
};
ProcessToken processToken();

/// One allocateExportable().
struct Allocation {
  std::weak_ptr<void> memory;
  Platform platform = Platform::cpu;
  int deviceIndex = 0;
  char* base = nullptr;
  size_t bytes = 0;     ///< as asked for
  int descriptor = -1;  ///< CPU: of the shared memory
  uint64_t inode = 0;   ///< CPU: of the shared memory
};

void addAllocation(const Allocation& allocation);
void removeAllocation(const void* base) noexcept;
/// The allocation that holds [memory, memory + bytes). @throws Error invalidArgument when none
/// does.
Allocation findAllocation(const Device& device, const void* memory, size_t bytes);

/// A handle with everything filled in but the platform's own part.
MemoryHandle makeHandle(const Device& device, const Allocation& allocation, const void* memory,
                        size_t bytes);
/// Refuses handles of another version, platform or host. `device` imports.
void checkHandle(const Device& device, const MemoryHandle& handle);
/// For a handle of this process: the memory, sharing its ownership; null for another process.
/// @throws Error invalidState when it has been freed.
std::shared_ptr<void> findOwn(const MemoryHandle& handle, int* deviceIndex = nullptr);
/// "process 123 of host x".
std::string exporterOf(const MemoryHandle& handle);

constexpr size_t roundUp(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace mscclpp::detail
