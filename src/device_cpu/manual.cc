#include "device_cpu/runtime.hpp"

/// Manual mode: one worker, on the thread that calls runAll().
namespace mscclpp::device {
inline namespace cpu {
namespace {

RuntimeConfig backgroundConfig;  // put back by ~Manual

}  // namespace

Manual::Manual(const RuntimeConfig& config) {
  const RuntimeConfig before = currentConfig();
  configure(config);
  detail::Runtime& rt = detail::runtime();
  detail::WordLock lock(rt.lock);
  backgroundConfig = before;
  rt.manual = true;
  rt.workerCount = 1;
  rt.workers[0] = new detail::Worker(0);
  detail::resetWorker(rt.workers[0], rt.config);
}

Manual::~Manual() {
  detail::Runtime& rt = detail::runtime();
  {
    detail::WordLock lock(rt.lock);
    for (auto* stream = rt.firstStream; stream != nullptr; stream = stream->nextStream) {
      detail::dropOperations(stream, "dropped: the Manual object was destroyed");
    }
  }
  detail::dropAllBlocks();
  detail::WordLock lock(rt.lock);
  rt.retired.switches += rt.workers[0]->stats.switches;
  delete rt.workers[0];
  rt.workers[0] = nullptr;
  rt.workerCount = 0;
  rt.manual = false;
  rt.config = backgroundConfig;
}

bool Manual::runAll() {
  detail::Runtime& rt = detail::runtime();
  failure_.clear();
  const bool sound = detail::runManually(rt.workers[0]);
  if (!sound) failure_ = rt.failure.c_str();
  detail::WordLock lock(rt.lock);
  for (auto* stream = rt.firstStream; stream != nullptr; stream = stream->nextStream) {
    detail::raceAcquire(stream->sync);
  }
  return sound;
}

}  // namespace cpu
}  // namespace mscclpp::device
