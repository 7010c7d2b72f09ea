// CPU threads that carry out what kernels push.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <mscclpp/connection.hpp>
#include <mscclpp/failure.hpp>
#include <mscclpp/fifo.hpp>
#include <mscclpp/port_channel_handle.hpp>

namespace mscclpp {

class PortChannel;
class PortSemaphore;
struct PortChannelSpec;

struct ProxyOptions {
  int rank = 0;  ///< own rank: written to failure records
  /// Threads, 1 to 64. All channels of a peer are served by the same one (rank modulo threads).
  int threads = 1;
  int fifoDepth = Fifo::kDefaultDepth;  ///< slots, a power of two
  uint64_t fifoStart = 0;               ///< first position of every FIFO, see Fifo
  /// Pins the threads to cores near the device. Off: the operating system places them.
  bool pin = true;
  /// How long an idle thread looks without pause for new triggers before it sleeps between looks
  /// (50 us at a time). Longer costs a core, shorter costs latency after a silence.
  std::chrono::nanoseconds spin = std::chrono::milliseconds(20);
  /// Operations to a peer of which none completes for so long are logged, once until they go on.
  std::chrono::nanoseconds stallAfter = std::chrono::seconds(2);
  /// Limit of stop(): for draining. 0 = none.
  std::chrono::nanoseconds timeout = std::chrono::seconds(100);
};

/// What a proxy thread has done, for people and for tests.
struct ProxyStatistics {
  uint64_t triggers = 0;         ///< popped
  uint64_t rounds = 0;           ///< looks at all FIFOs
  uint64_t fullConnections = 0;  ///< times a trigger had to wait for its connection's queue
  uint64_t largestRun = 0;       ///< most triggers that were found at once in a FIFO
  uint64_t longestRoundNs = 0;   ///< one look at all FIFOs and connections; above 1 s it is logged
  uint64_t stalls = 0;           ///< times that operations made no progress, see stallAfter
  std::string cores;             ///< where it may run: "3" or "0-15"
};

/// One signal that a kernel pushed, by itself or behind a put; times in nanoseconds of the steady
/// clock.
struct SignalTime {
  int peer;
  int fifo;              ///< number of the channel's FIFO
  uint64_t seenNs;       ///< the proxy found the trigger
  uint64_t submittedNs;  ///< the transport had got what belongs to it
};

/// Proxy threads and their channels. Set up (addConnection, createChannel) at any time from any
/// thread.
///
/// What goes wrong on a connection or in a thread is recorded once, makes every watched
/// FailureRecord fail (so that device waits end), and is thrown by checkHealth(). The rest goes on.
class ProxyService {
 public:
  explicit ProxyService(std::shared_ptr<Device> device, const ProxyOptions& options = {});
  /// Stops the threads without draining and without telling the peers.
  ~ProxyService();
  ProxyService(const ProxyService&) = delete;
  ProxyService& operator=(const ProxyService&) = delete;

  /// Progresses `connection` from now on; createChannel does this too.
  void addConnection(const std::shared_ptr<Connection>& connection);
  /// A channel; valid as long as this service. @throws Error invalidArgument for memories above 1
  /// TiB, more than 2048 channels of a thread, counters that the transport cannot serve.
  PortChannel createChannel(const PortChannelSpec& spec);
  /// Makes waits that use `record` fail when a connection does. The record must outlive the
  /// service.
  void watch(FailureRecord& record);

  /// Starts the threads; channels may be used by kernels before, their triggers wait.
  void start();
  /// Blocks until everything that kernels pushed before is complete (not on broken connections);
  /// the threads go on. @throws TimeoutError with what is left.
  void drain();
  /// Drains and ends the threads. The connections stay open: Connection::close() is their owner's.
  /// start() may follow.
  /// The peers need this side's progress for what they have under way (tcp): when a group ends, all
  /// ranks drain(), then meet in a barrier, then stop(). @throws as drain().
  void stop();

  /// The first thing that went wrong, with the peer; empty when nothing has.
  std::string failure() const;
  /// @throws PeerError with failure(), if there is one. Does not block.
  void checkHealth() const;
  std::vector<ProxyStatistics> statistics() const;
  /// Starts to note every signal, or ends it and forgets them. For measurements: each costs the
  /// proxies a look at the clock and a lock.
  void noteSignals(bool on);
  /// What was noted since the last call, in the order of each FIFO.
  std::vector<SignalTime> takeSignals();
  const std::shared_ptr<Device>& device() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mscclpp
