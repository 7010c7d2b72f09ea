#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <mscclpp/device/cpu/launch.hpp>
#include <mscclpp/errors.hpp>

/// Host side of the CPU platform: streams, events, and the runtime that executes kernels on them.
///
/// Background mode (the default): worker threads start with the first launch and run whatever is
/// enqueued, on all streams at once. Manual mode (tests): while a Manual object lives, kernels run
/// only inside its runAll(), on the calling thread, in an order that the seed decides.
namespace mscclpp::device {
inline namespace cpu {

/// A kernel failed: a deadlock, a failed check, a wrong use of a primitive. what() is the report.
class DeviceError : public Error {
 public:
  explicit DeviceError(const std::string& report) : Error(ErrorCode::internal, report) {}
};

/// Beside each member: the variable MSCCLPP_SIMT_... that RuntimeConfig::fromEnvironment() reads.
struct RuntimeConfig {
  /// WORKERS. OS threads of background mode, 1 to 16; a block stays on one.
  int workers = 1;
  /// SEED. Of every random choice.
  uint64_t seed = 1;
  /// CHAOS. Random order, freezes of warps, blocks and ranks; takes one worker.
  bool chaos = false;
  /// PREEMPT. Chance to switch threads at an atomic.
  int preemptPercent = 0;
  /// STACK. Per kernel thread; sanitizer builds take 8 times that.
  size_t stackBytes = 32 * 1024;
  /// BULK_DELAY. Scheduler steps that a bulk copy may be late; 0 = done at once.
  int bulkMaxDelay = 0;
  /// CHECK_PROXY. Bulk stores see shared memory as of the last fenceProxyAsyncShared().
  bool checkProxy = false;
  /// CLOSED. Nobody else raises flags: "no progress" is a deadlock at once (with one worker).
  bool closed = false;
  /// FREEZE. Chaos: longest freeze of a block, in scheduler steps; of a rank four times that.
  int freezeSteps = 4000;
  /// WATCHDOG. Seconds after which a thread that calls no primitive ends the process; 0 = off.
  int watchdogSeconds = 30;
  /// CONTEXTS. ThreadSanitizer builds: above this many threads, two contexts per warp (lane 0, the
  /// others), not one per lane; one, where that is still too much.
  int raceContexts = 256;

  /// The defaults above with the variables MSCCLPP_SIMT_... applied.
  static RuntimeConfig fromEnvironment();
  /// For tests: closed, late bulk copies, proxy checked; with `chaos`, random order and preemption.
  static RuntimeConfig testing(uint64_t seed = 1, bool chaos = false);
};

/// Sets the configuration of background mode. Waits until all streams are idle and stops the
/// workers.
/// @throws Error invalidState while a Manual object lives, invalidArgument for impossible values.
void configure(const RuntimeConfig& config);
/// The configuration in force.
RuntimeConfig currentConfig();
/// Waits until all streams are idle, then ends the workers. The next launch starts them again.
void shutdown();

namespace detail {
class EventRecord;
struct StreamState;
}  // namespace detail

/// Work in order. Thread safe. Made by createStream(), ended by destroyStream().
class Stream {
 public:
  /// The rank that reports name and that chaos freezes as a whole.
  int rank() const;
  /// Runs `action` on a worker after all work enqueued before, before all work enqueued later. It
  /// may not wait for other work of this runtime. An exception that leaves it fails the stream.
  void enqueueHost(std::function<void()> action);
  /// Blocks until everything enqueued is done.
  /// @throws DeviceError with the report when the stream has failed; again at every call until
  /// clearFailure(). In manual mode it throws invalidState when there is unfinished work.
  void synchronize();
  /// True when everything enqueued is done (or dropped by a failure). Does not block.
  bool idle() const;
  /// Empty while the stream is sound, else the report.
  std::string failure() const;
  /// Makes a failed stream usable again. Its unfinished work was dropped when it failed.
  void clearFailure();

  detail::StreamState& state() { return *state_; }

 private:
  friend Stream* createStream(int rank);
  friend void destroyStream(Stream* stream);
  explicit Stream(std::unique_ptr<detail::StreamState> state);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  std::unique_ptr<detail::StreamState> state_;
};

/// Never null. The stream belongs to the caller.
Stream* createStream(int rank = 0);
/// Waits for the stream's work (manual mode: drops it), then frees the stream. Never throws.
void destroyStream(Stream* stream);

/// A point in a stream. Thread safe. May be destroyed while streams still wait for it.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  /// Captures the work enqueued on `stream` so far; replaces what was captured before.
  void record(Stream& stream);
  /// Work enqueued on `stream` later waits for the captured work. Does nothing before record().
  void streamWait(Stream& stream);
  /// True when the captured work is done or nothing was captured. @throws DeviceError when it
  /// failed.
  bool query() const;
  /// Blocks until query() is true. @throws DeviceError when the work failed.
  void synchronize() const;
  /// steady_clock nanoseconds at completion; 0 before.
  uint64_t timestampNs() const;

 private:
  std::shared_ptr<detail::EventRecord> current() const;
  mutable std::shared_ptr<detail::EventRecord> record_;
  mutable uint32_t lock_ = 0;
};

/// Counters since the start of the process.
struct RuntimeStats {
  uint64_t grids = 0;
  uint64_t switches = 0;     ///< fiber switches
  uint64_t polls = 0;        ///< polls of flags that were not reached yet
  uint64_t collectives = 0;  ///< warp collectives, counted per lane
  uint64_t bulkCopies = 0;
};
RuntimeStats runtimeStats();

/// Manual mode, for tests. Waits until background work is done; at most one at a time.
class Manual {
 public:
  explicit Manual(const RuntimeConfig& config = RuntimeConfig::testing());
  ~Manual();
  Manual(const Manual&) = delete;
  Manual& operator=(const Manual&) = delete;

  /// Runs everything that is enqueued, on the calling thread, until nothing is left (true) or
  /// something failed (false: the rest was dropped, lastFailure() has the report, and the streams
  /// are usable again).
  bool runAll();
  const std::string& lastFailure() const { return failure_; }

 private:
  std::string failure_;
};

}  // namespace cpu
}  // namespace mscclpp::device
