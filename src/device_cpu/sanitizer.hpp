#pragma once

#include <cstddef>

#ifdef MSCCLPP_SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#ifdef MSCCLPP_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

/// What the runtime tells the sanitizers. This library itself is never instrumented: it reports
/// what kernels do (who runs, what orders what, what a bulk copy touches) through these calls,
/// which are empty in a plain build.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

#ifdef MSCCLPP_SIMT_TSAN
inline constexpr bool kRaceDetector = true;
inline void* raceCreate() {
  return __tsan_create_fiber(0);
}
inline void raceDestroy(void* context) {
  if (context != nullptr) __tsan_destroy_fiber(context);
}
inline void* raceCurrent() {
  return __tsan_get_current_fiber();
}
inline void raceSwitch(void* context) {
  __tsan_switch_to_fiber(context, __tsan_switch_to_fiber_no_sync);
}
inline void raceRelease(void* address) {
  __tsan_release(address);
}
inline void raceAcquire(void* address) {
  __tsan_acquire(address);
}
inline void raceRead(const void* address, size_t bytes) {
  __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void raceWrite(void* address, size_t bytes) {
  __tsan_write_range(address, bytes);
}
#else
inline constexpr bool kRaceDetector = false;
inline void* raceCreate() {
  return nullptr;
}
inline void raceDestroy(void*) {}
inline void* raceCurrent() {
  return nullptr;
}
inline void raceSwitch(void*) {}
inline void raceRelease(void*) {}
inline void raceAcquire(void*) {}
inline void raceRead(const void*, size_t) {}
inline void raceWrite(void*, size_t) {}
#endif

/// While it lives, what intercepted library calls (malloc, memcpy) touch is not recorded.
class RaceQuiet {
 public:
#ifdef MSCCLPP_SIMT_TSAN
  RaceQuiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~RaceQuiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  RaceQuiet() {}
  ~RaceQuiet() {}
#endif
  RaceQuiet(const RaceQuiet&) = delete;
  RaceQuiet& operator=(const RaceQuiet&) = delete;
};

#ifdef MSCCLPP_SIMT_ASAN
inline constexpr bool kAddressSanitizer = true;
inline void poison(void* address, size_t bytes) {
  __asan_poison_memory_region(address, bytes);
}
inline void unpoison(void* address, size_t bytes) {
  __asan_unpoison_memory_region(address, bytes);
}
/// The first poisoned byte of a range, or null.
inline const void* firstPoisoned(const void* address, size_t bytes) {
  return __asan_region_is_poisoned(const_cast<void*>(address), bytes);
}
inline void startSwitch(void** fakeStack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fakeStack, bottom, bytes);
}
inline void finishSwitch(void* fakeStack) {
  __sanitizer_finish_switch_fiber(fakeStack, nullptr, nullptr);
}
#else
inline constexpr bool kAddressSanitizer = false;
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
inline const void* firstPoisoned(const void*, size_t) {
  return nullptr;
}
inline void startSwitch(void**, const void*, size_t) {}
inline void finishSwitch(void*) {}
#endif

/// Copies and fills that no sanitizer intercepts.
inline void rawCopy(void* to, const void* from, size_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes)::"memory");
#else
  auto* t = static_cast<volatile unsigned char*>(to);
  auto* f = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) t[i] = f[i];
#endif
}
inline void rawFill(void* to, int value, size_t bytes) {
#if defined(__x86_64__)
  asm volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
#else
  auto* t = static_cast<volatile unsigned char*>(to);
  for (size_t i = 0; i < bytes; ++i) t[i] = static_cast<unsigned char>(value);
#endif
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
