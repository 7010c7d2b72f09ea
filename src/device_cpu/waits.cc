#include <chrono>

#include "device_cpu/runtime.hpp"

/// Waits that poll, and how a kernel thread fails.
namespace mscclpp::device::inline cpu::detail {

uint64_t nanoseconds() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

void beginPolling(Polling& polling) {
  currentFiber()->polling = &polling;
}

void pausePolling() {
  Worker* worker = currentWorker();
  pollAgain(worker, worker->current);
}

void endPolling() {
  Worker* worker = currentWorker();
  worker->current->polling = nullptr;
  ++worker->activity;
}

void failFiber(const char* what, const void* address, const Site& site) {
  Worker* worker = currentWorker();
  Fiber* fiber = worker->current;
  // The report needs more stack than a kernel thread has: the worker writes it.
  worker->pending = {what, address, site, fiber};
  for (;;) jump(*fiber, worker->main, nullptr);
}

void failKernel(const char* what, const void* address, const Site& site) {
  failFiber(what, address, site);
}

}  // namespace mscclpp::device::inline cpu::detail
