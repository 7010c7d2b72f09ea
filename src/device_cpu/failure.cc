#include "device_cpu/runtime.hpp"

/// What happens after a kernel failed: every worker lets go of its blocks (their threads are never
/// resumed: kernels own nothing), then the streams' work is dropped and the runtime can be used
/// again.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

// Runtime::lock is held and no worker runs anything.
void dropEverything() {
  Runtime& rt = runtime();
  for (StreamState* stream = rt.firstStream; stream != nullptr; stream = stream->nextStream) {
    if (stream->first == nullptr) continue;
    if (!rt.manual) stream->failure = rt.failure;
    dropOperations(stream, rt.failure);
    dropBlocks(stream);
  }
  rt.failing.store(false, std::memory_order_release);
  rt.recovered.raise();
}

// What unfinished threads did is over: whoever waits for their stream comes after it.
void releaseUnfinished(const Worker* worker) {
  if (!kRaceDetector) return;
  void* caller = raceCurrent();
  for (const Block* block = worker->firstRunning; block != nullptr; block = block->nextRunning) {
    for (unsigned i = 0; i < block->threads; ++i) {
      raceSwitch(block->fibers[i].race);
      raceRelease(block->grid->stream->sync);
    }
    for (void* context : block->raceCopies) {
      if (context == nullptr) continue;
      raceSwitch(context);
      raceRelease(block->grid->stream->sync);
    }
  }
  raceSwitch(caller);
}

void clearInbox(Worker* worker) {
  WordLock lock(worker->inboxLock);
  worker->inboxFull.store(false);
  worker->firstStarting = worker->lastStarting = nullptr;
  worker->firstAdvance = worker->lastAdvance = nullptr;
}

}  // namespace

void raiseRuntimeFailure(const std::string& report) {
  RaceQuiet quiet;
  Runtime& rt = runtime();
  WordLock lock(rt.lock);
  if (rt.failing.load()) return;
  rt.failure = report.c_str();
  rt.abandoned = 0;
  rt.failing.store(true);
  for (int i = 0; i < rt.workerCount; ++i) rt.workers[i]->signal.raise();
}

void abandonWork(Worker* worker) {
  releaseUnfinished(worker);
  RaceQuiet quiet;
  Runtime& rt = runtime();
  const std::string table = waitTable(worker);
  abandonCopies(worker);
  worker->queue.clear();
  worker->current = nullptr;
  worker->visiting = nullptr;
  worker->pending = PendingFailure{};
  worker->suspect = nullptr;
  worker->firstTimed = nullptr;
  worker->firstRunning = nullptr;
  worker->readyCount = worker->pollingCount = worker->polledCount = 0;

  const uint32_t seen = rt.recovered.read();
  {
    WordLock lock(rt.lock);
    rt.failure += table.c_str();
    if (++rt.abandoned == static_cast<unsigned>(rt.workerCount)) {
      for (int i = 0; i < rt.workerCount; ++i) clearInbox(rt.workers[i]);
      dropEverything();
      return;
    }
  }
  while (rt.failing.load(std::memory_order_acquire) && rt.recovered.read() == seen) {
    rt.recovered.wait(seen);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
