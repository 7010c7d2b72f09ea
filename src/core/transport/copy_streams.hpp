// The streams of an endpoint whose copies a GPU carries out.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include <mscclpp/platform.hpp>

namespace mscclpp::transport {

/// A few streams that the connections of an endpoint share. A GPU has few hardware queues (8 unless
/// CUDA_DEVICE_MAX_CONNECTIONS says otherwise), and streams that share one wait for each other: a
/// copy may then stand behind a kernel that waits for it.
class CopyStreams {
 public:
  CopyStreams(const std::shared_ptr<Device>& device, int rank, int count) {
    for (int i = 0; i < count; ++i) {
      streams_.push_back(std::make_shared<Stream>(device->createStream(true, rank)));
    }
  }
  /// Deals them out in turn. Thread safe.
  std::shared_ptr<Stream> next() {
    return streams_[next_.fetch_add(1, std::memory_order_relaxed) % streams_.size()];
  }

 private:
  std::vector<std::shared_ptr<Stream>> streams_;
  std::atomic<size_t> next_{0};
};

}  // namespace mscclpp::transport
