#include <sys/prctl.h>

#include <algorithm>
#include <thread>

#include "device_cpu/runtime.hpp"

/// Configuration, and start and stop of workers.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

void backgroundThread(Worker* worker) {
  prctl(PR_SET_NAME, "mscclpp-simt");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // 1 us: the default of 50 would be added to every short sleep
  runInBackground(worker);
  Runtime& rt = runtime();
  WordLock lock(rt.lock);
  ++rt.workersStopped;
  rt.idleSignal.raise();
}

void addStats(RuntimeStats& sum, const RuntimeStats& part) {
  sum.grids += part.grids;
  sum.switches += part.switches;
  sum.polls += part.polls;
  sum.collectives += part.collectives;
  sum.bulkCopies += part.bulkCopies;
}

}  // namespace

Runtime& runtime() {
  // Never destroyed: workers may outlive static objects.
  static Runtime* instance = [] {
    auto* made = new Runtime;
    made->config = RuntimeConfig::fromEnvironment();
    return made;
  }();
  return *instance;
}

void ensureWorkers() {
  Runtime& rt = runtime();
  if (rt.workersRunning) return;
  rt.workersRunning = true;
  rt.stopping.store(false);
  rt.workersStopped = 0;
  rt.workerCount = rt.config.chaos ? 1 : rt.config.workers;
  for (int i = 0; i < rt.workerCount; ++i) {
    rt.workers[i] = new Worker(i);
    resetWorker(rt.workers[i], rt.config);
  }
  for (int i = 0; i < rt.workerCount; ++i) {
    std::thread(backgroundThread, rt.workers[i]).detach();
  }
}

void waitUntilIdle() {
  Runtime& rt = runtime();
  for (;;) {
    const uint32_t seen = rt.idleSignal.read();
    {
      WordLock lock(rt.lock);
      if (rt.busyStreams == 0 && !rt.failing.load()) return;
    }
    rt.idleSignal.wait(seen);
  }
}

void stopWorkers() {
  Runtime& rt = runtime();
  {
    WordLock lock(rt.lock);
    if (!rt.workersRunning) return;
    rt.stopping.store(true);
    for (int i = 0; i < rt.workerCount; ++i) rt.workers[i]->signal.raise();
  }
  for (;;) {
    const uint32_t seen = rt.idleSignal.read();
    {
      WordLock lock(rt.lock);
      if (rt.workersStopped == rt.workerCount) break;
    }
    rt.idleSignal.wait(seen);
  }
  WordLock lock(rt.lock);
  for (int i = 0; i < rt.workerCount; ++i) {
    addStats(rt.retired, rt.workers[i]->stats);
    delete rt.workers[i];
    rt.workers[i] = nullptr;
  }
  rt.workerCount = 0;
  rt.workersRunning = false;
}

void dropAllBlocks() {
  Runtime& rt = runtime();
  WordLock lock(rt.lock);
  for (StreamState* stream = rt.firstStream; stream != nullptr; stream = stream->nextStream) {
    dropBlocks(stream);
  }
}

}  // namespace detail

void configure(const RuntimeConfig& config) {
  if (config.workers < 1 || config.workers > detail::kMaxWorkers) {
    fail(ErrorCode::invalidArgument, "RuntimeConfig::workers is {}, allowed are 1 to {}",
         config.workers, detail::kMaxWorkers);
  }
  if (config.stackBytes < 8192) {
    fail(ErrorCode::invalidArgument, "RuntimeConfig::stackBytes is {}, at least 8192 are needed",
         config.stackBytes);
  }
  shutdown();
  detail::Runtime& rt = detail::runtime();
  detail::WordLock lock(rt.lock);
  rt.config = config;
}

RuntimeConfig currentConfig() {
  detail::Runtime& rt = detail::runtime();
  detail::WordLock lock(rt.lock);
  return rt.config;
}

void shutdown() {
  detail::Runtime& rt = detail::runtime();
  {
    detail::WordLock lock(rt.lock);
    if (rt.manual) fail(ErrorCode::invalidState, "a Manual object lives: destroy it first");
  }
  detail::waitUntilIdle();
  detail::stopWorkers();
  detail::dropAllBlocks();
}

RuntimeStats runtimeStats() {
  detail::Runtime& rt = detail::runtime();
  detail::WordLock lock(rt.lock);
  RuntimeStats sum = rt.retired;
  for (int i = 0; i < rt.workerCount; ++i) detail::addStats(sum, rt.workers[i]->stats);
  return sum;
}

}  // namespace cpu
}  // namespace mscclpp::device
