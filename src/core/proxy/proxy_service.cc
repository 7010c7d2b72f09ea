#include <mutex>
#include <optional>
#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>
#include <mscclpp/proxy.hpp>

#include "core/proxy/port_semaphore_state.hpp"
#include "core/proxy/proxy_thread.hpp"

namespace mscclpp {

namespace {

constexpr int kMaxThreads = 64;

void checkMemory(const char* what, size_t bytes) {
  check(bytes <= Trigger::kMaxMemory, ErrorCode::invalidArgument,
        "createChannel: the {} memory has {} bytes: a trigger reaches {}", what, bytes,
        Trigger::kMaxMemory);
}

}  // namespace

class ProxyService::Impl {
 public:
  Impl(std::shared_ptr<Device> ofDevice, const ProxyOptions& given)
      : device(std::move(ofDevice)), options(given) {
    for (int i = 0; i < options.threads; ++i) {
      threads.push_back(std::make_unique<detail::ProxyThread>(
          device, options, [this](int peer, const std::string& why) { reportFailure(peer, why); }));
    }
  }

  detail::ProxyThread& threadOf(int peer) {
    return *threads[static_cast<size_t>(peer) % threads.size()];
  }

  void watch(FailureRecord& record) {
    const std::lock_guard lock(mutex_);
    records_.push_back(&record);
    if (!failure_.empty()) raiseFailure(record, {kWaitProxyFailed, failedPeer_}, options.rank);
  }

  std::pair<int, std::string> failure() const {
    const std::lock_guard lock(mutex_);
    return {failedPeer_, failure_};
  }

  const std::shared_ptr<Device> device;
  const ProxyOptions options;
  std::vector<std::unique_ptr<detail::ProxyThread>> threads;
  bool running = false;

 private:
  void reportFailure(int peer, const std::string& why) {
    const std::string text =
        peer < 0 ? why : fmt::format("the connection to rank {} is broken: {}", peer, why);
    log::error("proxy of rank {}: {}", options.rank, text);
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) {
      failure_ = text;
      failedPeer_ = peer;
    }
    for (FailureRecord* record : records_) {
      raiseFailure(*record, {kWaitProxyFailed, peer}, options.rank);
    }
  }

  mutable std::mutex mutex_;
  std::vector<FailureRecord*> records_;
  std::string failure_;
  int failedPeer_ = -1;
};

ProxyService::ProxyService(std::shared_ptr<Device> device, const ProxyOptions& options) {
  check(device != nullptr, ErrorCode::invalidArgument, "ProxyService: the device is null");
  check(options.threads >= 1 && options.threads <= kMaxThreads, ErrorCode::invalidArgument,
        "ProxyService: {} threads: allowed is 1 to {}", options.threads, kMaxThreads);
  impl_ = std::make_unique<Impl>(std::move(device), options);
}

ProxyService::~ProxyService() {
  for (const auto& thread : impl_->threads) thread->end();
}

void ProxyService::addConnection(const std::shared_ptr<Connection>& connection) {
  check(connection != nullptr, ErrorCode::invalidArgument, "addConnection: the connection is null");
  impl_->threadOf(connection->peer()).addConnection(connection);
}

PortChannel ProxyService::createChannel(const PortChannelSpec& spec) {
  check(spec.connection != nullptr, ErrorCode::invalidArgument,
        "createChannel: the connection is null: there is none to the own rank");
  check((spec.local == nullptr) == (spec.remote == nullptr), ErrorCode::invalidArgument,
        "createChannel: the {} memory is null: put needs both", spec.local ? "remote" : "local");
  if (spec.local) checkMemory("local", spec.local->size());
  if (spec.remote) checkMemory("remote", spec.remote->size());
  if (spec.counters) {
    checkMemory("counter", spec.counters->size());
    check(!spec.counters->onDevice() || spec.connection->capabilities().deviceCounters,
          ErrorCode::unsupported,
          "createChannel: the counters lie in GPU memory, where {} cannot add: use "
          "allocateHostMemory()",
          toString(spec.connection->transport()));
  }
  PortChannel channel;
  channel.spec_ = std::make_shared<const PortChannelSpec>(spec);
  auto* state = spec.semaphore.state_.get();
  channel.handle_ = impl_->threadOf(spec.connection->peer())
                        .addChannel(channel.spec_, state == nullptr ? nullptr : &state->target);
  if (state != nullptr) channel.handle_.semaphore = spec.semaphore.deviceHandle();
  return channel;
}

void ProxyService::watch(FailureRecord& record) {
  impl_->watch(record);
}

void ProxyService::start() {
  impl_->running = true;
  for (const auto& thread : impl_->threads) thread->start();
}

void ProxyService::drain() {
  check(impl_->running, ErrorCode::invalidState,
        "ProxyService::drain: the threads are not running: start() first");
  const auto limit = impl_->options.timeout;
  std::optional<std::chrono::steady_clock::time_point> deadline;
  if (limit.count() != 0) deadline = std::chrono::steady_clock::now() + limit;
  for (const auto& thread : impl_->threads) thread->requestDrain();
  std::string left;
  for (const auto& thread : impl_->threads) {
    const std::string part = thread->awaitDrained(deadline);
    if (!part.empty()) left += (left.empty() ? "" : ", ") + part;
  }
  check(left.empty(), ErrorCode::timeout,
        "ProxyService: not complete after {:.1f} s: {}. Do the peers still make progress?",
        static_cast<double>(limit.count()) / 1e9, left);
}

void ProxyService::stop() {
  if (!impl_->running) return;
  drain();
  for (const auto& thread : impl_->threads) thread->end();
  impl_->running = false;
}

std::string ProxyService::failure() const {
  return impl_->failure().second;
}

void ProxyService::checkHealth() const {
  const auto [peer, text] = impl_->failure();
  if (!text.empty()) throw PeerError(peer, text);
}

std::vector<ProxyStatistics> ProxyService::statistics() const {
  std::vector<ProxyStatistics> all;
  all.reserve(impl_->threads.size());
  for (const auto& thread : impl_->threads) all.push_back(thread->statistics());
  return all;
}

void ProxyService::noteSignals(bool on) {
  for (const auto& thread : impl_->threads) thread->noteSignals(on);
}

std::vector<SignalTime> ProxyService::takeSignals() {
  std::vector<SignalTime> all;
  for (const auto& thread : impl_->threads) {
    const std::vector<SignalTime> some = thread->takeSignals();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

const std::shared_ptr<Device>& ProxyService::device() const noexcept {
  return impl_->device;
}

}  // namespace mscclpp
