#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace mscclpp::ep::cli {

/// Says on standard error what is going on, once it has taken longer than a second, and again every
/// second (later every five). Quick work prints nothing. Works while the caller is blocked.
class Progress {
 public:
  /// An inactive Progress (ranks other than the printing one) does nothing.
  explicit Progress(bool active);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// What the program does from now on, such as "iteration 2 of 3: dispatch".
  void step(std::string what);

 private:
  void watch();

  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string step_;
  bool over_ = false;
  std::thread watcher_;
};

}  // namespace mscclpp::ep::cli
