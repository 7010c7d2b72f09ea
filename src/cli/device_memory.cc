#include "device_memory.hpp"

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

#include "cli_kernels.hpp"

namespace mscclpp::ep::cli {

RankDevice::RankDevice(Platform platform, int index, int rank)
    : device_(Device::open(platform, index)),
      stream_(std::make_shared<Stream>(device_->createStream(false, rank))) {
  // Loads the program's own kernels: loading one beside a spinning kernel of a peer would deadlock.
  kernelsOf(platform).prepare(index);
}

Tensor RankDevice::make(DType dtype, std::vector<std::int64_t> shape) const {
  Tensor tensor;
  tensor.present = true;
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.platform = device_->platform();
  tensor.deviceIndex = device_->index();
  tensor.data = device_->allocate(tensor.bytes(), *stream_);
  tensor.owner = std::shared_ptr<void>(
      tensor.data, [device = device_, stream = stream_](void* p) { device->release(p, *stream); });
  return tensor;
}

Tensor RankDevice::upload(DType dtype, std::vector<std::int64_t> shape, const void* host) const {
  Tensor tensor = make(dtype, std::move(shape));
  write(tensor, host);
  return tensor;
}

void RankDevice::write(const Tensor& tensor, const void* host) const {
  if (tensor.bytes() == 0) return;
  device_->copy(tensor.data, host, tensor.bytes(), *stream_);
  stream_->synchronize();
}

void RankDevice::read(const Tensor& tensor, void* host) const {
  // A copy to ordinary host memory that is queued behind a pending kernel blocks the driver, and
  // with it the proxies that the kernel waits for.
  stream_->synchronize();
  if (tensor.bytes() > 0) device_->copy(host, tensor.data, tensor.bytes(), *stream_);
  stream_->synchronize();
}

Platform choosePlatform(const std::string& option) {
  if (!option.empty()) return parsePlatform(option);
  if (env().platform) return *env().platform;
  return Device::count(Platform::cuda) > 0 ? Platform::cuda : Platform::cpu;
}

int deviceOfRank(Platform platform, int rank) {
  const int devices = Device::count(platform);
  check(devices > 0, ErrorCode::unsupported,
        "--platform {}: this build or this machine has no such device (see `mscclpp-ep info`); use "
        "--platform cpu",
        toString(platform));
  return rank % devices;
}

}  // namespace mscclpp::ep::cli
