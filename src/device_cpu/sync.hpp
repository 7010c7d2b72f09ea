#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

/// Locks of the runtime. Built on the futex call alone: ThreadSanitizer sees no synchronisation in
/// them, so the runtime's own locking does not order what kernels of different ranks do.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

inline void futexWait(uint32_t* word, uint32_t value, uint64_t timeoutNs) {
  timespec time{static_cast<time_t>(timeoutNs / 1000000000u),
                static_cast<long>(timeoutNs % 1000000000u)};
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeoutNs == 0 ? nullptr : &time, nullptr, 0);
}
inline void futexWake(uint32_t* word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

/// A mutex over a plain word (0 free, 1 held, 2 held with waiters).
class WordLock {
 public:
  explicit WordLock(uint32_t& word) : word_(word) {
    uint32_t free = 0;
    if (__atomic_compare_exchange_n(&word_, &free, 1u, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
      return;
    }
    while (__atomic_exchange_n(&word_, 2u, __ATOMIC_ACQUIRE) != 0) futexWait(&word_, 2, 0);
  }
  ~WordLock() {
    if (__atomic_exchange_n(&word_, 0u, __ATOMIC_RELEASE) == 2) futexWake(&word_, 1);
  }
  WordLock(const WordLock&) = delete;
  WordLock& operator=(const WordLock&) = delete;

 private:
  uint32_t& word_;
};

/// Counts events; a thread can sleep until the count moves on. read() first, then look at the
/// state, then wait(): nothing is lost in between.
class Signal {
 public:
  uint32_t read() const { return __atomic_load_n(&count_, __ATOMIC_SEQ_CST); }
  void raise() {
    __atomic_fetch_add(&count_, 1u, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&waiters_, __ATOMIC_SEQ_CST) != 0) futexWake(&count_, INT_MAX);
  }
  /// `timeoutNs` 0 = for ever.
  void wait(uint32_t seen, uint64_t timeoutNs = 0) {
    __atomic_fetch_add(&waiters_, 1u, __ATOMIC_SEQ_CST);
    if (read() == seen) futexWait(&count_, seen, timeoutNs);
    __atomic_fetch_sub(&waiters_, 1u, __ATOMIC_SEQ_CST);
  }

 private:
  uint32_t count_ = 0;
  uint32_t waiters_ = 0;
};

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
