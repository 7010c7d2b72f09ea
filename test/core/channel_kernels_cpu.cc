#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/launch.hpp>

#include "core/channel_kernels.cuh"

namespace mscclpp::test {

namespace {

constexpr device::LaunchShape kShape{.blocks = 1, .threads = kChannelThreads};

device::NativeStream nativeOf(Stream& stream) {
  return static_cast<device::NativeStream>(stream.native());
}

}  // namespace

void prepareChannelKernels(Device&) {}
void launchPingPong(Device&, Stream& stream, const PingPongArgs& args) {
  device::launch<&cpu::pingPong, kChannelThreads>(kShape, nativeOf(stream), args);
}
void launchSelf(Device&, Stream& stream, const SelfArgs& args) {
  device::launch<&cpu::self, kChannelThreads>(kShape, nativeOf(stream), args);
}
void launchStuck(Device&, Stream& stream, const SelfArgs& args) {
  device::launch<&cpu::stuck, kChannelThreads>(kShape, nativeOf(stream), args);
}

}  // namespace mscclpp::test
