#include <chrono>
#include <vector>

#include <mscclpp/device/launch.hpp>
#include <mscclpp/errors.hpp>

#include "port_bench_kernels.cuh"

namespace mscclpp::bench {

namespace {

template <auto Body, class Args>
void launchOn(Device& device, Stream& stream, unsigned blocks, unsigned threads, const Args& args) {
  const DeviceScope scope(device);
  device::launch<Body, kMaxThreads>({.blocks = blocks, .threads = threads},
                                    static_cast<cudaStream_t>(stream.native()), args);
}

void tryCuda(cudaError_t result) {
  check(result == cudaSuccess, ErrorCode::cuda, "bare copies: {}", cudaGetErrorString(result));
}

}  // namespace

void prepareKernels(Device& device) {
  const DeviceScope scope(device);
  device::prepare<&cuda::push, kMaxThreads, PushArgs>(0);
  device::prepare<&cuda::ping, kMaxThreads, PingArgs>(0);
  device::prepare<&cuda::flush, kMaxThreads, FlushArgs>(0);
  device::prepare<&cuda::stream, kMaxThreads, StreamArgs>(0);
}
void launchPush(Device& device, Stream& stream, unsigned blocks, unsigned threads,
                const PushArgs& args) {
  launchOn<&cuda::push>(device, stream, blocks, threads, args);
}
void launchPing(Device& device, Stream& stream, const PingArgs& args) {
  launchOn<&cuda::ping>(device, stream, 1, 1, args);
}
void launchFlush(Device& device, Stream& stream, const FlushArgs& args) {
  launchOn<&cuda::flush>(device, stream, 1, 1, args);
}
void launchStream(Device& device, Stream& stream, const StreamArgs& args) {
  launchOn<&cuda::stream>(device, stream, 1, args.threads, args);
}

double bareCopies(Device& device, char* destination, const char* source, uint64_t bytes,
                  uint64_t count, unsigned batch) {
  const DeviceScope scope(device);
  Stream stream = device.createStream(true);
  const auto native = static_cast<cudaStream_t>(stream.native());
  std::vector<void*> destinations(batch, destination);
  std::vector<const void*> sources(batch, source);
  std::vector<size_t> sizes(batch, bytes);
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t done = 0; done < count; done += batch) {
    if (batch == 1) {
      tryCuda(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, native));
    } else {
      tryCuda(cudaMemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), batch,
                                   &attributes, &first, 1, native));
    }
  }
  stream.synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace mscclpp::bench
