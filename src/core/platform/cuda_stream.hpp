// Streams and events of CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <vector>

#include "core/platform/backend.hpp"

namespace mscclpp::detail {

/// Native events of one device for reuse: making one costs a driver call. Outlives the device as
/// long as an event is about.
class CudaEventPool {
 public:
  explicit CudaEventPool(int deviceIndex) : deviceIndex_(deviceIndex) {}
  ~CudaEventPool();
  CudaEventPool(const CudaEventPool&) = delete;
  CudaEventPool& operator=(const CudaEventPool&) = delete;

  cudaEvent_t take(bool timed);
  void give(cudaEvent_t event, bool timed) noexcept;
  int deviceIndex() const noexcept { return deviceIndex_; }

 private:
  const int deviceIndex_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_[2];  ///< untimed, timed
};

class CudaEvent final : public EventBackend {
 public:
  CudaEvent(std::shared_ptr<CudaEventPool> pool, cudaStream_t stream, bool timed);
  ~CudaEvent() override;
  Platform platform() const noexcept override { return Platform::cuda; }
  bool query() const override;
  void synchronize() const override;
  double elapsedMs(const EventBackend& since) const override;
  void* native() const noexcept override { return event_; }

 private:
  std::shared_ptr<CudaEventPool> pool_;
  bool timed_;
  /// Belongs to a capture: it is not used again, since another thread could then record it while
  /// the capture goes on, which the driver does not survive.
  bool captured_ = false;
  cudaEvent_t event_;
};

class CudaGraph final : public GraphBackend {
 public:
  /// Takes `executable` over.
  CudaGraph(int deviceIndex, cudaGraphExec_t executable)
      : deviceIndex_(deviceIndex), executable_(executable) {}
  ~CudaGraph() override;
  cudaGraphExec_t executable() const noexcept { return executable_; }

 private:
  int deviceIndex_;
  cudaGraphExec_t executable_;
};

/// False also for what the driver does not let this thread ask.
bool isCapturing(cudaStream_t stream) noexcept;

class CudaStream final : public StreamBackend {
 public:
  CudaStream(std::shared_ptr<Device> device, std::shared_ptr<CudaEventPool> events,
             cudaStream_t stream, bool owned)
      : device_(std::move(device)), events_(std::move(events)), stream_(stream), owned_(owned) {}
  ~CudaStream() override;
  void* native() const noexcept override { return stream_; }
  Device& device() const noexcept override { return *device_; }
  std::shared_ptr<EventBackend> record(bool timed) override;
  void wait(const EventBackend& event) override;
  void synchronize() override;
  void runOnHost(std::function<void()> action) override;
  std::shared_ptr<GraphBackend> capture(const std::function<void()>& enqueue) override;
  void launch(const GraphBackend& graph) override;
  bool capturing() const noexcept override { return isCapturing(stream_); }

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<CudaEventPool> events_;
  cudaStream_t stream_;
  bool owned_;
};

}  // namespace mscclpp::detail
