// What an RDMA device tells unasked.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include <infiniband/verbs.h>

namespace mscclpp::transport::verbs {

/// Thread safe.
class EventLog {
 public:
  /// Keeps what `event`, called `text`, means for queue pairs and for `port`.
  void note(const ibv_async_event& event, int port, const std::string& text);
  /// How many were noted.
  uint64_t count() const noexcept { return count_.load(std::memory_order_acquire); }
  /// Why a queue pair, or the whole device, is of no more use; empty while it is.
  std::string failureOf(uint32_t queuePair) const;
  /// A queue pair is gone: its number may be given to another one.
  void forget(uint32_t queuePair) noexcept;
  /// The last thing that befell the port, such as "port error"; empty for nothing, and when it has
  /// come back. No failure by itself: what is under way is retried.
  std::string portTrouble() const;

 private:
  std::atomic<uint64_t> count_ = 0;
  mutable std::mutex mutex_;
  std::map<uint32_t, std::string> queuePairFailures_;
  std::string deviceFailure_;
  std::string portTrouble_;
};

}  // namespace mscclpp::transport::verbs
