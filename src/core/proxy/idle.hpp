// What a polling thread does when there is nothing to do.
#pragma once

#include <chrono>
#include <thread>

namespace mscclpp::detail {

/// Looks again at once for a while, then lets other threads of the core go first, and in the end
/// sleeps between looks. Two spinning threads on one core would cost each other a time slice.
class Idle {
 public:
  explicit Idle(std::chrono::nanoseconds spin) : spin_(spin) {}

  void reset() noexcept { empty_ = 0; }

  void pause() {
    if (empty_++ == 0) since_ = std::chrono::steady_clock::now();
    if (empty_ < kPauses) {
      __builtin_ia32_pause();
    } else if (empty_ % kYieldsPerLook != 0 || std::chrono::steady_clock::now() - since_ < spin_) {
      std::this_thread::yield();
    } else {
      --empty_;  // look at the clock, and sleep, again next time
      std::this_thread::sleep_for(kSleep);
    }
  }

 private:
  static constexpr unsigned kPauses = 256;
  static constexpr unsigned kYieldsPerLook = 16;
  static constexpr std::chrono::microseconds kSleep{50};

  const std::chrono::nanoseconds spin_;
  unsigned empty_ = 0;
  std::chrono::steady_clock::time_point since_;
};

}  // namespace mscclpp::detail
