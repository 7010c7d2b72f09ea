#pragma once

#include <cstddef>
#include <type_traits>

/// CPU half of <mscclpp/device/launch.hpp>.
namespace mscclpp::device {
inline namespace cpu {

class Stream;
using NativeStream = Stream*;

/// Blocks, threads per block and bytes of dynamic shared memory of one launch.
struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 32;
  size_t sharedBytes = 0;
  bool early = false;  ///< see the CUDA half; no meaning here
};

namespace detail {

/// A kernel as the runtime sees it; `args` is copied before launchGrid returns.
struct GridRequest {
  LaunchShape shape;
  unsigned maxThreads;
  void (*entry)(const void* args);
  const void* args;
  size_t argsBytes;
  size_t argsAlignment;
  const char* name;  ///< static storage
};
void launchGrid(NativeStream stream, const GridRequest& request);

template <auto Body, class Args>
void kernelEntry(const void* args) {
  Body(*static_cast<const Args*>(args));
}
template <auto Body>
constexpr const char* kernelName() {
  return __PRETTY_FUNCTION__;
}

}  // namespace detail

/// Nothing to load on this platform.
template <auto Body, int MaxThreads, class Args>
void prepare(size_t /*maxSharedBytes*/) {}

/// Enqueues one kernel; does not block. Throws Error for a shape that no GPU would take, and when
/// the stream has failed.
template <auto Body, int MaxThreads, class Args>
void launch(const LaunchShape& shape, NativeStream stream, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args>, "Args is copied as bytes");
  detail::launchGrid(stream, {shape, MaxThreads, &detail::kernelEntry<Body, Args>, &args,
                              sizeof(Args), alignof(Args), detail::kernelName<Body>()});
}

}  // namespace cpu
}  // namespace mscclpp::device
