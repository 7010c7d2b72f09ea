#include <mscclpp/device/launch.hpp>

#include "core/port_kernels.cuh"

namespace mscclpp::test {

namespace {

template <auto Body, class Args>
void launchOn(Device& device, Stream& stream, unsigned blocks, const Args& args) {
  const DeviceScope scope(device);
  device::launch<Body, kPortThreads>({.blocks = blocks, .threads = kPortThreads},
                                     static_cast<cudaStream_t>(stream.native()), args);
}

}  // namespace

void preparePortKernels(Device& device) {
  const DeviceScope scope(device);
  device::prepare<&cuda::portPingPong, kPortThreads, PortPingPongArgs>(0);
  device::prepare<&cuda::portHammer, kPortThreads, PortHammerArgs>(0);
  device::prepare<&cuda::portStream, kPortThreads, PortStreamArgs>(0);
  device::prepare<&cuda::portStuck, kPortThreads, PortStuckArgs>(0);
  device::prepare<&cuda::portPut, kPortThreads, PortPutArgs>(0);
}
void launchPortPingPong(Device& device, Stream& stream, const PortPingPongArgs& args) {
  launchOn<&cuda::portPingPong>(device, stream, 1, args);
}
void launchPortHammer(Device& device, Stream& stream, unsigned blocks, const PortHammerArgs& args) {
  launchOn<&cuda::portHammer>(device, stream, blocks, args);
}
void launchPortStream(Device& device, Stream& stream, unsigned blocks, const PortStreamArgs& args) {
  launchOn<&cuda::portStream>(device, stream, blocks, args);
}
void launchPortStuck(Device& device, Stream& stream, const PortStuckArgs& args) {
  launchOn<&cuda::portStuck>(device, stream, 1, args);
}
void launchPortPut(Device& device, Stream& stream, const PortPutArgs& args) {
  launchOn<&cuda::portPut>(device, stream, 1, args);
}

}  // namespace mscclpp::test
