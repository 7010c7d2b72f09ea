#include <chrono>

#include "device_cpu/runtime.hpp"

/// Preemption at atomics, waits that poll, and how a kernel thread fails.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

namespace {

constexpr unsigned kCallsPerTurn = 256;  // a thread that waits for nothing gives way after so many

void mayYield(Worker* worker, Fiber* fiber) {
  const int percent = runtime().config.preemptPercent;
  if ((percent != 0 && static_cast<int>(randomNumber(worker) % 100) < percent) ||
      ++fiber->sinceYield > kCallsPerTurn) {
    giveWay(worker, fiber);
  }
}

}  // namespace

void beforeAtomicUpdate() {
  Worker* worker = currentWorker();
  if (worker == nullptr) return;  // a host thread
  Fiber* fiber = worker->current;
  if (fiber == nullptr || fiber->polling != nullptr) return;
  fiber->lastLoad = nullptr;
  if (fiber->handPolled) {
    fiber->handPolled = false;
    ++worker->activity;
  }
  mayYield(worker, fiber);
}

void beforeAtomicLoad(const void* address) {
  Worker* worker = currentWorker();
  if (worker == nullptr) return;
  Fiber* fiber = worker->current;
  if (fiber == nullptr || fiber->polling != nullptr) return;
  const bool same = fiber->lastLoad == address;
  // Inside a hand-written loop only the polls below give way: being preempted would look like
  // progress.
  if (!(same && fiber->handPolled)) mayYield(worker, fiber);
  fiber->sameLoads = same ? static_cast<uint16_t>(fiber->sameLoads + 1) : uint16_t{0};
  fiber->lastLoad = address;
  if (fiber->sameLoads < kCallsPerTurn) return;
  // A hand-written loop on one address: let the others run as a wait primitive would.
  fiber->sameLoads = 0;
  fiber->handPolled = true;
  fiber->handPolling = Polling{};
  fiber->handPolling.address = address;
  fiber->polling = &fiber->handPolling;
  pollAgain(worker, fiber);
  fiber->polling = nullptr;
}
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

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
