#include <cstdio>
#include <cstdlib>
#include <thread>

#include "device_cpu/runtime.hpp"

/// Finds kernel threads that loop without ever calling a primitive: they stop their worker, so
/// nothing else can report them.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr uint64_t kPeriodNs = 200'000'000;

Signal work;  // there may be something to watch
std::atomic<bool> started{false};
std::atomic<bool> asleep{false};

struct Seen {
  uint64_t progress = 0;
  uint64_t sinceNs = 0;
};

// Runtime::lock is held. Returns the text to die with, or nothing.
std::string look(Seen (&seen)[kMaxWorkers]) {
  Runtime& rt = runtime();
  const uint64_t now = nanoseconds();
  for (int i = 0; i < rt.workerCount; ++i) {
    const Worker* worker = rt.workers[i];
    const uint64_t progress = __atomic_load_n(&worker->step, __ATOMIC_RELAXED) +
                              __atomic_load_n(&worker->stats.switches, __ATOMIC_RELAXED);
    const Fiber* fiber = __atomic_load_n(&worker->current, __ATOMIC_RELAXED);
    if (fiber == nullptr || progress != seen[i].progress) {
      seen[i] = {progress, now};
      continue;
    }
    const auto limit = static_cast<uint64_t>(rt.config.watchdogSeconds) * 1'000'000'000u;
    if (now - seen[i].sinceNs < limit) continue;
    return "mscclpp: no primitive called for " + std::to_string(rt.config.watchdogSeconds) +
           " s by " + describeThread(fiber) +
           ": a loop without a wait primitive? (MSCCLPP_SIMT_WATCHDOG sets the seconds, 0 = off)\n";
  }
  return {};
}

void watch() {
  Runtime& rt = runtime();
  Seen seen[kMaxWorkers];
  for (;;) {
    const uint32_t count = work.read();
    bool busy = false;
    std::string verdict;
    {
      WordLock lock(rt.lock);
      busy = rt.busyStreams != 0;
      if (busy && rt.config.watchdogSeconds > 0) verdict = look(seen);
      if (!busy) asleep.store(true);
    }
    if (!verdict.empty()) {
      std::fputs(verdict.c_str(), stderr);
      std::fflush(stderr);
      std::abort();
    }
    work.wait(count, busy ? kPeriodNs : 0);
  }
}

}  // namespace

void wakeWatchdog() {
  if (runtime().config.watchdogSeconds <= 0) return;
  if (!started.exchange(true)) {
    std::thread(watch).detach();
  } else if (asleep.exchange(false)) {
    work.raise();
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
