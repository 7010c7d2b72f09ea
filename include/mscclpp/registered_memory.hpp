// Memory of this rank or of a peer that kernels may address.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp {

/// A piece of exportable memory: the own one, or a peer's mapped into this process. A shared
/// handle; the memory lives until the last copy is gone.
class RegisteredMemory {
 public:
  RegisteredMemory() = default;
  /// Own memory: `memory` comes from device->allocateExportable(), or points into such (aliasing
  /// shared_ptr); `bytes` are exported from there on.
  /// @throws Error invalidArgument when it is not that.
  RegisteredMemory(std::shared_ptr<Device> device, std::shared_ptr<void> memory, size_t bytes);

  /// A handle that deserialize() takes on any rank of this host. Plain bytes, fixed size.
  std::vector<std::byte> serialize() const;
  /// Maps what serialize() described for `device`. The exporter must be alive.
  /// @throws as Device::importMemory, and Error invalidArgument for bytes that are no handle.
  static RegisteredMemory deserialize(std::shared_ptr<Device> device,
                                      std::span<const std::byte> bytes);
  static RegisteredMemory import(std::shared_ptr<Device> device, const MemoryHandle& handle);

  explicit operator bool() const noexcept { return memory_ != nullptr; }
  /// Address for kernels of device(); on the CPU platform also for the host.
  char* data() const noexcept { return static_cast<char*>(memory_.get()); }
  size_t size() const noexcept { return handle_.bytes; }
  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  const MemoryHandle& handle() const noexcept { return handle_; }

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<void> memory_;
  MemoryHandle handle_{};
};

/// Collective: every rank gives a memory (sizes may differ) and gets those of all ranks, mapped for
/// its own device; the own entry is `local` itself. When one rank cannot map one, every rank throws
/// an Error that names both.
std::vector<RegisteredMemory> exchangeMemories(Bootstrap& bootstrap, const RegisteredMemory& local);

}  // namespace mscclpp
