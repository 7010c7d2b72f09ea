#include "core/platform/cuda_stream.hpp"

#include <utility>

#include <mscclpp/errors.hpp>

#include "core/platform/cuda_check.hpp"

namespace mscclpp::detail {

CudaEventPool::~CudaEventPool() {
  runNoThrow("freeing CUDA events", [this] {
    for (const auto& events : free_) {
      for (cudaEvent_t event : events) cudaLog(cudaEventDestroy(event), "cudaEventDestroy");
    }
  });
}

cudaEvent_t CudaEventPool::take(bool timed) {
  {
    const std::lock_guard lock(mutex_);
    auto& events = free_[timed ? 1 : 0];
    if (!events.empty()) {
      cudaEvent_t event = events.back();
      events.pop_back();
      return event;
    }
  }
  cudaEvent_t event = nullptr;
  cudaTry(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming),
          "cudaEventCreateWithFlags");
  return event;
}

void CudaEventPool::give(cudaEvent_t event, bool timed) noexcept {
  runNoThrow("returning a CUDA event", [&] {
    const std::lock_guard lock(mutex_);
    free_[timed ? 1 : 0].push_back(event);
  });
}

CudaEvent::CudaEvent(std::shared_ptr<CudaEventPool> pool, cudaStream_t stream, bool timed)
    : pool_(std::move(pool)), timed_(timed), event_(pool_->take(timed)) {
  captured_ = isCapturing(stream);
  const cudaError_t result = cudaEventRecord(event_, stream);
  if (result != cudaSuccess) pool_->give(event_, timed_);
  cudaTry(result, "cudaEventRecord");
}

CudaEvent::~CudaEvent() {
  if (!captured_) {
    pool_->give(event_, timed_);
    return;
  }
  runNoThrow("freeing a captured CUDA event", [this] {
    const CurrentDevice current(pool_->deviceIndex());
    cudaLog(cudaEventDestroy(event_), "cudaEventDestroy");
  });
}

bool CudaEvent::query() const {
  const CurrentDevice current(pool_->deviceIndex());
  const RelaxedCapture relaxed;
  const cudaError_t result = cudaEventQuery(event_);
  if (result == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());  // "not ready" must not stay behind as an error
    return false;
  }
  cudaTry(result, "cudaEventQuery");
  return true;
}

void CudaEvent::synchronize() const {
  const CurrentDevice current(pool_->deviceIndex());
  cudaTry(cudaEventSynchronize(event_), "cudaEventSynchronize");
}

double CudaEvent::elapsedMs(const EventBackend& since) const {
  const auto& first = static_cast<const CudaEvent&>(since);
  check(timed_ && first.timed_, ErrorCode::invalidArgument,
        "Event::elapsedMs: an event was recorded with timed = false");
  check(query() && first.query(), ErrorCode::invalidState,
        "Event::elapsedMs: an event is not complete yet: synchronize() first");
  float milliseconds = 0;
  cudaTry(cudaEventElapsedTime(&milliseconds, first.event_, event_), "cudaEventElapsedTime");
  return milliseconds;
}

bool isCapturing(cudaStream_t stream) noexcept {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // must not stay behind as an error
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

CudaGraph::~CudaGraph() {
  runNoThrow("destroying a CUDA graph", [this] {
    const CurrentDevice current(deviceIndex_);
    cudaLog(cudaGraphExecDestroy(executable_), "cudaGraphExecDestroy");
  });
}

std::shared_ptr<GraphBackend> CudaStream::capture(const std::function<void()>& enqueue) {
  const CurrentDevice current(device_->index());
  cudaTry(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
          "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    enqueue();
  } catch (...) {  // the capture must end, or the stream stays useless
    static_cast<void>(cudaStreamEndCapture(stream_, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaGetLastError());
    throw;
  }
  cudaTry(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t result = cudaGraphInstantiate(&executable, graph, 0);
  cudaLog(cudaGraphDestroy(graph), "cudaGraphDestroy");
  cudaTry(result, "cudaGraphInstantiate");
  auto made = std::make_shared<CudaGraph>(device_->index(), executable);
  cudaTry(cudaGraphUpload(executable, stream_), "cudaGraphUpload");
  cudaTry(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return made;
}

void CudaStream::launch(const GraphBackend& graph) {
  cudaTry(cudaGraphLaunch(static_cast<const CudaGraph&>(graph).executable(), stream_),
          "cudaGraphLaunch");
}

CudaStream::~CudaStream() {
  if (!owned_) return;
  runNoThrow("destroying a CUDA stream", [this] {
    const CurrentDevice current(device_->index());
    cudaLog(cudaStreamDestroy(stream_), "cudaStreamDestroy");
  });
}

std::shared_ptr<EventBackend> CudaStream::record(bool timed) {
  const CurrentDevice current(device_->index());
  return std::make_shared<CudaEvent>(events_, stream_, timed);
}

void CudaStream::wait(const EventBackend& event) {
  const CurrentDevice current(device_->index());
  cudaTry(cudaStreamWaitEvent(stream_, static_cast<cudaEvent_t>(event.native()), 0),
          "cudaStreamWaitEvent");
}

void CudaStream::synchronize() {
  const CurrentDevice current(device_->index());
  cudaTry(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

void CudaStream::runOnHost(std::function<void()> action) {
  const CurrentDevice current(device_->index());
  auto owned = std::make_unique<std::function<void()>>(std::move(action));
  const auto call = [](void* data) {
    const std::unique_ptr<std::function<void()>> mine(static_cast<std::function<void()>*>(data));
    runNoThrow("host function of a CUDA stream", *mine);
  };
  cudaTry(cudaLaunchHostFunc(stream_, call, owned.get()), "cudaLaunchHostFunc");
  static_cast<void>(owned.release());
}

}  // namespace mscclpp::detail
