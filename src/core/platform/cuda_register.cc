#include "core/platform/cuda_register.hpp"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

#include <mscclpp/errors.hpp>

#include "core/platform/cuda_check.hpp"

namespace mscclpp::detail {

namespace {

/// Ranks that are threads share mappings, and CUDA registers memory once, for all devices.
struct Registrations {
  std::mutex mutex;
  std::map<void*, int> users;
};
Registrations& registrations() {
  static Registrations* const instance = new Registrations;
  return *instance;
}

void enter(const Device& device, void* host, size_t bytes) {
  cudaTry(
      cudaHostRegister(host, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
      fmt::format("cudaHostRegister of {} bytes (is the limit of locked memory, ulimit -l, high "
                  "enough?)",
                  bytes));
  void* mapped = nullptr;
  cudaTry(cudaHostGetDevicePointer(&mapped, host, 0), "cudaHostGetDevicePointer");
  if (mapped == host) return;
  cudaLog(cudaHostUnregister(host), "cudaHostUnregister");
  fail(ErrorCode::unsupported,
       "cuda device {} sees registered host memory at another address than the host",
       device.index());
}

}  // namespace

std::shared_ptr<void> cudaRegisterHost(std::shared_ptr<Device> device, std::shared_ptr<void> memory,
                                       size_t bytes) {
  void* const host = memory.get();
  const std::lock_guard lock(registrations().mutex);
  if (!registrations().users.contains(host)) {
    const CurrentDevice current(device->index());
    const RelaxedCapture relaxed;
    enter(*device, host, bytes);
  }
  ++registrations().users[host];
  return {host, [device = std::move(device), owner = std::move(memory)](void* pointer) {
            const std::lock_guard unregistering(registrations().mutex);
            if (--registrations().users[pointer] != 0) return;
            registrations().users.erase(pointer);
            runNoThrow("unregistering host memory", [&] {
              const CurrentDevice current(device->index());
              const RelaxedCapture relaxed;
              cudaLog(cudaHostUnregister(pointer), "cudaHostUnregister");
            });
          }};
}

}  // namespace mscclpp::detail
