#pragma once

#include <cstddef>

namespace mscclpp::device {
inline namespace cpu {
namespace detail {

/// A point of execution with a stack of its own: a kernel thread, or a worker's scheduler.
struct Context {
  void* sp = nullptr;         // where it stopped; null = not started
  void* race = nullptr;       // its race-detector context
  void* fakeStack = nullptr;  // AddressSanitizer's
  void* stackBottom = nullptr;
  size_t stackSize = 0;
};

using ContextEntry = void (*)();

/// Stops `from`, which must be running, and goes on with `to`. A context without `sp` starts with
/// the entry function on its stack; that function never returns.
void jump(Context& from, Context& to, ContextEntry entry);

/// Describes the calling OS thread's own stack.
void adoptThread(Context& context);

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
