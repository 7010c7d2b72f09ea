// One thread of a ProxyService.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <mscclpp/port_channel.hpp>
#include <mscclpp/proxy.hpp>

namespace mscclpp::detail {

/// What the thread knows of a channel.
struct ServedChannel {
  std::shared_ptr<const PortChannelSpec> spec;  ///< keeps alive what the next four point to
  Connection* connection;
  const LocalMemory* local;
  const RemoteMemory* remote;
  const RemoteMemory* counters;
  Connection::SignalTarget* signals;  ///< null: the channel has no semaphore
  uint64_t* flushed;                  ///< host memory, read by kernels
};

/// Serves the FIFOs and connections of its peers. Set-up calls come from any thread; run() works on
/// a copy of the lists, which it renews when they have changed.
class ProxyThread {
 public:
  /// Called at most once per connection, from the thread.
  using FailureHandler = std::function<void(int peer, const std::string& why)>;

  ProxyThread(std::shared_ptr<Device> device, const ProxyOptions& options,
              FailureHandler onFailure);
  ~ProxyThread();

  void addConnection(const std::shared_ptr<Connection>& connection);
  /// The handle of a new channel. `signals` may be null.
  PortChannelHandle addChannel(const std::shared_ptr<const PortChannelSpec>& spec,
                               Connection::SignalTarget* signals);
  void start();
  /// Asks the thread to tell when everything that is there now is done; awaitDrained() waits for
  /// it.
  void requestDrain();
  /// What was left undone at `deadline` ("" for nothing); without a limit when it is empty.
  std::string awaitDrained(std::optional<std::chrono::steady_clock::time_point> deadline);
  /// Ends the thread as it is.
  void end() noexcept;
  ProxyStatistics statistics() const;
  void noteSignals(bool on);
  std::vector<SignalTime> takeSignals();

 private:
  struct Queue {
    int number;
    Fifo fifo;
    bool writeDone = false;  ///< of a put with signal, whose signal found no room
  };
  struct Flush {
    uint64_t* word;
    uint64_t position;  ///< written to `word`...
    uint64_t ticket;    ///< ...once so many operations of the connection are complete
  };
  struct Served {
    std::shared_ptr<Connection> connection;
    std::deque<Flush> flushes;
    bool reported = false;
    std::vector<SignalTime> signals;  ///< seen, and not submitted yet
    uint64_t completedBefore = 0;     ///< at the last checkProgress()
    uint64_t leftBefore = 0;
    bool stallTold = false;
  };
  struct Lists {
    std::vector<std::shared_ptr<Queue>> queues;
    std::vector<ServedChannel> channels;
    std::vector<std::shared_ptr<Served>> connections;
  };
  void run();
  void loop();
  void adoptChanges();
  void tellDrained(uint64_t asked, bool worked);
  bool drain(Queue& queue);
  bool execute(const TriggerFields& fields, Queue& queue);
  void post(const TriggerFields& fields, const ServedChannel& channel, Queue& queue);
  void noteSubmitted(Served& served);
  void noteRound(uint64_t ns);
  void checkProgress();
  bool tend(Served& served);
  bool idle() const;
  std::string leftOver() const;
  Served& servedOf(const Connection* connection);
  void place();

  const std::shared_ptr<Device> device_;
  const ProxyOptions options_;
  const FailureHandler onFailure_;
  const std::shared_ptr<void> flushWords_;

  mutable std::mutex mutex_;
  Lists shared_;                     ///< guarded by mutex_
  std::string cores_;                ///< guarded by mutex_
  std::vector<SignalTime> signals_;  ///< guarded by mutex_
  std::atomic<bool> noting_ = false;
  std::atomic<uint64_t> version_ = 0;

  Lists lists_;  ///< the thread's copy
  uint64_t adopted_ = 0;
  uint64_t drainAnswered_ = 0;
  uint64_t progressCheckedNs_ = 0;
  std::atomic<bool> stop_ = false;
  std::atomic<uint64_t> drainAsked_ = 0;  ///< requests so far
  uint64_t drainDone_ = 0;                ///< of them; guarded by mutex_
  std::string left_;  ///< what the last request still waits for; guarded by mutex_
  std::condition_variable drained_;
  std::thread thread_;

  std::atomic<uint64_t> triggers_ = 0;
  std::atomic<uint64_t> rounds_ = 0;
  std::atomic<uint64_t> fullConnections_ = 0;
  std::atomic<uint64_t> largestRun_ = 0;
  std::atomic<uint64_t> longestRoundNs_ = 0;
  std::atomic<uint64_t> stalls_ = 0;
};

}  // namespace mscclpp::detail
