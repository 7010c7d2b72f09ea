#include <mscclpp/device/launch.hpp>

#include "core/channel_kernels.cuh"

namespace mscclpp::test {

namespace {

constexpr device::LaunchShape kShape{.blocks = 1, .threads = kChannelThreads};

struct AddressArgs {
  uint32_t* address;
};
__device__ void writeTo(const AddressArgs& args) {
  if (device::threadIndex() == 0) *args.address = 1;
}

/// Launches go to the current device; a test's thread is one rank and keeps its device.
template <auto Body, class Args>
void launchOn(Device& device, Stream& stream, const Args& args) {
  cudaSetDevice(device.index());
  device::launch<Body, kChannelThreads>(kShape, static_cast<cudaStream_t>(stream.native()), args);
}

}  // namespace

void prepareChannelKernels(Device& device) {
  cudaSetDevice(device.index());
  device::prepare<&cuda::pingPong, kChannelThreads, PingPongArgs>(0);
  device::prepare<&cuda::self, kChannelThreads, SelfArgs>(0);
  device::prepare<&cuda::stuck, kChannelThreads, SelfArgs>(0);
}
void launchPingPong(Device& device, Stream& stream, const PingPongArgs& args) {
  launchOn<&cuda::pingPong>(device, stream, args);
}
void launchSelf(Device& device, Stream& stream, const SelfArgs& args) {
  launchOn<&cuda::self>(device, stream, args);
}
void launchStuck(Device& device, Stream& stream, const SelfArgs& args) {
  launchOn<&cuda::stuck>(device, stream, args);
}
void launchIllegalAccess(Device& device, Stream& stream) {
  launchOn<&writeTo>(device, stream, AddressArgs{reinterpret_cast<uint32_t*>(0x10)});
}

}  // namespace mscclpp::test
