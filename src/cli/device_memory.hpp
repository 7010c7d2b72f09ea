#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <mscclpp/ext/ep/types.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp::ep::cli {

/// One rank's device, its own stream (the "compute stream" of the calls) and ordinary tensors on
/// it. Tensors keep the stream alive and are released in its order.
class RankDevice {
 public:
  /// Opens the device and makes it the calling thread's current one (CUDA).
  RankDevice(Platform platform, int index, int rank);

  Device& device() const { return *device_; }
  Stream& stream() const { return *stream_; }
  void* native() const { return stream_->native(); }

  /// Not initialised.
  Tensor make(DType dtype, std::vector<std::int64_t> shape) const;
  /// Copies from host memory; blocks.
  Tensor upload(DType dtype, std::vector<std::int64_t> shape, const void* host) const;
  /// Overwrites a tensor from host memory; blocks.
  void write(const Tensor& tensor, const void* host) const;
  /// Waits for the stream and copies to the host; blocks.
  void read(const Tensor& tensor, void* host) const;
  template <class T>
  std::vector<T> read(const Tensor& tensor) const {
    std::vector<T> out(tensor.bytes() / sizeof(T));
    read(tensor, out.data());
    return out;
  }

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<Stream> stream_;
};

/// The platform of a command: the option, else MSCCLPP_EP_PLATFORM, else CUDA if there is a GPU.
Platform choosePlatform(const std::string& option);
/// Rank `rank`'s device: ranks share the GPUs in turn.
int deviceOfRank(Platform platform, int rank);

}  // namespace mscclpp::ep::cli
