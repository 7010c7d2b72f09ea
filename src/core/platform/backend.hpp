// What a platform implements behind Event and Stream.
#pragma once

#include <functional>
#include <memory>

#include <mscclpp/platform.hpp>

namespace mscclpp::detail {

class EventBackend {
 public:
  EventBackend() = default;
  EventBackend(const EventBackend&) = delete;
  EventBackend& operator=(const EventBackend&) = delete;
  virtual ~EventBackend() = default;
  virtual Platform platform() const noexcept = 0;
  virtual bool query() const = 0;
  virtual void synchronize() const = 0;
  /// `since` is of the same platform.
  virtual double elapsedMs(const EventBackend& since) const = 0;
  virtual void* native() const noexcept = 0;
};

class GraphBackend {
 public:
  GraphBackend() = default;
  GraphBackend(const GraphBackend&) = delete;
  GraphBackend& operator=(const GraphBackend&) = delete;
  virtual ~GraphBackend() = default;
};

class StreamBackend {
 public:
  StreamBackend() = default;
  StreamBackend(const StreamBackend&) = delete;
  StreamBackend& operator=(const StreamBackend&) = delete;
  virtual ~StreamBackend() = default;
  virtual void* native() const noexcept = 0;
  virtual Device& device() const noexcept = 0;
  virtual std::shared_ptr<EventBackend> record(bool timed) = 0;
  /// `event` may be of another platform only when the stream is the host itself.
  virtual void wait(const EventBackend& event) = 0;
  virtual void synchronize() = 0;
  virtual void runOnHost(std::function<void()> action) = 0;
  virtual std::shared_ptr<GraphBackend> capture(const std::function<void()>& enqueue);
  virtual void launch(const GraphBackend& graph);
  virtual bool capturing() const noexcept { return false; }
};

std::shared_ptr<Device> makeCpuDevice();
int cudaDeviceCount() noexcept;
/// @throws Error unsupported or invalidArgument; also in a build without CUDA.
std::shared_ptr<Device> makeCudaDevice(int index);

}  // namespace mscclpp::detail
