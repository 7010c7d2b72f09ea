#include <map>
#include <mutex>
#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/platform.hpp>

#include "core/platform/backend.hpp"

namespace mscclpp {

std::string_view toString(Platform platform) noexcept {
  return platform == Platform::cpu ? "cpu" : "cuda";
}

Platform parsePlatform(std::string_view name) {
  if (name == "cpu") return Platform::cpu;
  if (name == "cuda") return Platform::cuda;
  fail(ErrorCode::invalidArgument, "platform '{}': allowed is one of cpu, cuda", name);
}

DmaBuf Device::exportDmaBuf(const void*, size_t bytes) const {
  fail(ErrorCode::unsupported, "{} cannot export {} bytes as a dma-buf", describe(), bytes);
}

bool Event::query() const {
  return !backend_ || backend_->query();
}

void Event::synchronize() const {
  if (backend_) backend_->synchronize();
}

double Event::elapsedMs(const Event& since) const {
  check(backend_ && since.backend_, ErrorCode::invalidArgument,
        "Event::elapsedMs: {} event is null: only recorded events have a time",
        backend_ ? "the first" : "this");
  check(backend_->platform() == since.backend_->platform(), ErrorCode::invalidArgument,
        "Event::elapsedMs: one event is of platform {}, the other of {}",
        toString(backend_->platform()), toString(since.backend_->platform()));
  return backend_->elapsedMs(*since.backend_);
}

void* Event::native() const noexcept {
  return backend_ ? backend_->native() : nullptr;
}

Stream::Stream() noexcept = default;
Stream::Stream(std::unique_ptr<detail::StreamBackend> backend) : backend_(std::move(backend)) {}
Stream::~Stream() = default;
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;

void* Stream::native() const {
  return backend_->native();
}
Device& Stream::device() const {
  return backend_->device();
}
Event Stream::record(bool timed) {
  return Event(backend_->record(timed));
}
void Stream::wait(const Event& event) {
  if (!event) return;
  const Platform own = device().platform();
  const bool isHost = own == Platform::cpu && native() == nullptr;
  check(isHost || event.backend()->platform() == own, ErrorCode::invalidArgument,
        "Stream::wait: a stream of platform {} cannot wait for an event of platform {}",
        toString(own), toString(event.backend()->platform()));
  backend_->wait(*event.backend());
}
void Stream::synchronize() {
  backend_->synchronize();
}
Graph Stream::capture(const std::function<void()>& enqueue) {
  return Graph(backend_->capture(enqueue));
}
bool Stream::capturing() const noexcept {
  return backend_->capturing();
}
void Stream::launch(const Graph& graph) {
  check(static_cast<bool>(graph), ErrorCode::invalidArgument, "Stream::launch: the graph is null");
  backend_->launch(*graph.backend());
}
std::shared_ptr<detail::GraphBackend> detail::StreamBackend::capture(const std::function<void()>&) {
  fail(ErrorCode::unsupported, "graphs can be captured on the platform cuda only, not on {}",
       toString(device().platform()));
}
void detail::StreamBackend::launch(const GraphBackend&) {
  fail(ErrorCode::unsupported, "the platform {} has no graphs", toString(device().platform()));
}
void Stream::runOnHost(std::function<void()> action) {
  backend_->runOnHost(std::move(action));
}

std::shared_ptr<Device> Device::open(Platform platform, int index) {
  struct Opened {
    std::mutex mutex;
    std::map<std::pair<Platform, int>, std::weak_ptr<Device>> devices;
  };
  static Opened* const opened = new Opened;  // never destroyed: objects may be opened at exit
  const std::lock_guard lock(opened->mutex);
  auto& entry = opened->devices[{platform, index}];
  if (auto device = entry.lock()) return device;
  check(platform == Platform::cuda || index == 0, ErrorCode::invalidArgument,
        "cpu device {}: the host is one device, its index is 0", index);
  auto device = platform == Platform::cpu ? detail::makeCpuDevice() : detail::makeCudaDevice(index);
  entry = device;
  return device;
}

int Device::count(Platform platform) noexcept {
  return platform == Platform::cpu ? 1 : detail::cudaDeviceCount();
}

}  // namespace mscclpp
