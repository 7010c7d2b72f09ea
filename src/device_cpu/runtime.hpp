#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "device_cpu/state.hpp"

/// What the files of the runtime call of each other.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

inline constexpr int kMaxWorkers = 16;

struct Runtime {
  uint32_t lock = 0;  // streams, events, failures, start and stop; never held while kernels run
  RuntimeConfig config;
  Worker* workers[kMaxWorkers] = {};
  int workerCount = 0;  // of workers[]
  bool workersRunning = false;
  bool manual = false;
  StreamState* firstStream = nullptr;
  unsigned busyStreams = 0;  // streams with operations left
  Signal idleSignal;         // raised when busyStreams becomes 0, and when workers stop
  std::atomic<bool> stopping{false};
  int workersStopped = 0;

  std::atomic<bool> failing{false};
  ArenaString failure;     // the last report
  unsigned abandoned = 0;  // workers that let go of their blocks
  Signal recovered;
  RuntimeStats retired;  // of workers that ended
};
Runtime& runtime();

// --- scheduler.cc
/// The worker of the calling OS thread; null on threads that are none.
Worker* currentWorker();
void setCurrentWorker(Worker* worker);
/// The running kernel thread; the caller must be one.
Fiber* currentFiber();
uint64_t randomNumber(Worker* worker);
void resetWorker(Worker* worker, const RuntimeConfig& config);
/// Blocked -> Ready.
void wake(Fiber* fiber);
/// The current thread sleeps until wake(); `wait` and `site` are for reports.
void block(Worker* worker, Fiber* fiber, WaitKind wait, const Site& site);
/// The current thread lets others run and stays ready.
void giveWay(Worker* worker, Fiber* fiber);
/// The current thread gives way until the next round of polling.
void pollAgain(Worker* worker, Fiber* fiber);
/// The current thread ended.
void leaveFinished(Worker* worker, Fiber* fiber);
/// Runs until all streams are idle (true) or something failed (false).
bool runManually(Worker* worker);
/// Body of a background worker.
void runInBackground(Worker* worker);
/// Ready for its first visit.
void enqueueWarp(Worker* worker, Warp* warp);

// --- block.cc
void startBlock(Worker* worker, Block* block);
void finishThread(Worker* worker, Fiber* fiber);
/// All threads returned. False when something was wrong.
bool endBlock(Worker* worker, Block* block);
/// The block of this stream with this index, with room for the launch.
Block* obtainBlock(StreamState* stream, unsigned index, const LaunchShape& shape);
void dropBlock(Block* block);
/// Frees the kept blocks of a stream that has nothing running.
void dropBlocks(StreamState* stream);

// --- bulk.cc
/// Does the parts of copies that are due. Returns whether it did anything.
void runDueCopies(Worker* worker);
/// Finishes the copies of a block whose threads have returned; false when one still used its shared
/// memory.
bool drainCopies(Worker* worker, Block* block);
void abandonCopies(Worker* worker);

// --- mbarrier.cc
void mbarrierCompleteBytes(Block* block, void* barrier, uint32_t bytes);
bool mbarrierReady(const void* barrier);

// --- waits.cc
void checkDeadlines(Worker* worker);
void removeTimed(Worker* worker, Fiber* fiber);
[[noreturn]] void failFiber(const char* what, const void* address, const Site& site);

// --- report.cc
std::string describeThread(const Fiber* fiber);
std::string describeAddress(const Block* block, const void* address);
std::string describeSite(const Site& site);
std::string kernelName(const Grid* grid);
/// Table of who waits for what, over all blocks of the worker.
std::string waitTable(const Worker* worker);
std::string failureHeading(const PendingFailure& failure);

// --- failure.cc
/// Starts to fail everything that runs; the first report wins. The caller then returns to its
/// scheduler.
void raiseRuntimeFailure(const std::string& report);
/// The worker lets go of its blocks; the last worker drops the streams' work. Returns when that is
/// done.
void abandonWork(Worker* worker);

// --- streams.cc
/// Appends to the stream. Throws DeviceError when the stream has failed; takes `op` in any case.
void enqueue(StreamState* stream, std::unique_ptr<StreamOp> op);
/// Starts the stream's next operations, as far as they go. On the stream's home worker.
void advanceStream(Worker* worker, StreamState* stream);
/// The last block of the grid ended.
void finishGrid(Grid* grid);
/// Frees the stream's operations and completes their events as failed. Runtime::lock is held.
void dropOperations(StreamState* stream, const ArenaString& why);
void addStream(StreamState* stream);
void removeStream(StreamState* stream);

// --- workers.cc
/// Starts the workers of background mode if they do not run. Runtime::lock is held.
void ensureWorkers();
/// Ends them; nothing may be enqueued. Runtime::lock is not held.
void stopWorkers();
void waitUntilIdle();
void dropAllBlocks();

// --- watchdog.cc
/// Makes sure that the watchdog looks at the workers while they run.
void wakeWatchdog();

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
