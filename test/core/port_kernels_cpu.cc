#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/launch.hpp>

#include "core/port_kernels.cuh"

namespace mscclpp::test {

namespace {

template <auto Body, class Args>
void launchOn(Stream& stream, unsigned blocks, const Args& args) {
  device::launch<Body, kPortThreads>({.blocks = blocks, .threads = kPortThreads},
                                     static_cast<device::NativeStream>(stream.native()), args);
}

}  // namespace

void preparePortKernels(Device&) {}
void launchPortPingPong(Device&, Stream& stream, const PortPingPongArgs& args) {
  launchOn<&cpu::portPingPong>(stream, 1, args);
}
void launchPortHammer(Device&, Stream& stream, unsigned blocks, const PortHammerArgs& args) {
  launchOn<&cpu::portHammer>(stream, blocks, args);
}
void launchPortStream(Device&, Stream& stream, unsigned blocks, const PortStreamArgs& args) {
  launchOn<&cpu::portStream>(stream, blocks, args);
}
void launchPortStuck(Device&, Stream& stream, const PortStuckArgs& args) {
  launchOn<&cpu::portStuck>(stream, 1, args);
}
void launchPortPut(Device&, Stream& stream, const PortPutArgs& args) {
  launchOn<&cpu::portPut>(stream, 1, args);
}

}  // namespace mscclpp::test
