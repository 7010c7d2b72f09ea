#include <chrono>
#include <cstring>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/launch.hpp>

#include "port_bench_kernels.cuh"

namespace mscclpp::bench {

namespace {

template <auto Body, class Args>
void launchOn(Stream& stream, unsigned blocks, unsigned threads, const Args& args) {
  device::launch<Body, kMaxThreads>({.blocks = blocks, .threads = threads},
                                    static_cast<device::NativeStream>(stream.native()), args);
}

}  // namespace

void prepareKernels(Device&) {}
void launchPush(Device&, Stream& stream, unsigned blocks, unsigned threads, const PushArgs& args) {
  launchOn<&cpu::push>(stream, blocks, threads, args);
}
void launchPing(Device&, Stream& stream, const PingArgs& args) {
  launchOn<&cpu::ping>(stream, 1, 1, args);
}
void launchFlush(Device&, Stream& stream, const FlushArgs& args) {
  launchOn<&cpu::flush>(stream, 1, 1, args);
}
void launchStream(Device&, Stream& stream, const StreamArgs& args) {
  launchOn<&cpu::stream>(stream, 1, args.threads, args);
}

double bareCopies(Device&, char* destination, const char* source, uint64_t bytes, uint64_t count,
                  unsigned) {
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(destination, source, bytes);
    asm volatile("" ::: "memory");  // NOLINT: every copy is made
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace mscclpp::bench
