#include "device_cpu/runtime.hpp"

/// The public Stream and Event.
namespace mscclpp::device {
inline namespace cpu {

Stream::Stream(std::unique_ptr<detail::StreamState> state) : state_(std::move(state)) {}
Stream::~Stream() = default;

Stream* createStream(int rank) {
  auto state = std::make_unique<detail::StreamState>();
  state->rank = rank;
  state->home = rank < 0 ? 0 : rank;
  detail::addStream(state.get());
  return new Stream(std::move(state));
}

void destroyStream(Stream* stream) {
  if (stream == nullptr) return;
  detail::Runtime& rt = detail::runtime();
  detail::StreamState& state = stream->state();
  for (;;) {
    const uint32_t seen = state.signal.read();
    {
      detail::WordLock lock(rt.lock);
      if (rt.manual) detail::dropOperations(&state, "dropped: the stream was destroyed");
      if (state.first == nullptr) break;
    }
    state.signal.wait(seen);
  }
  detail::removeStream(&state);
  detail::dropBlocks(&state);
  detail::raceDestroy(state.raceHost);
  delete stream;
}

int Stream::rank() const {
  return state_->rank;
}

void Stream::enqueueHost(std::function<void()> action) {
  auto op = std::make_unique<detail::StreamOp>();
  op->kind = detail::StreamOp::Kind::host;
  op->action = std::move(action);
  detail::enqueue(state_.get(), std::move(op));
}

void Stream::synchronize() {
  detail::Runtime& rt = detail::runtime();
  if (detail::currentWorker() != nullptr) {
    fail(ErrorCode::invalidState, "Stream::synchronize called by a host function of a stream");
  }
  std::string report;
  for (;;) {
    const uint32_t seen = state_->signal.read();
    {
      detail::WordLock lock(rt.lock);
      if (state_->first == nullptr) {
        report = state_->failure.c_str();
        break;
      }
      if (rt.manual) {
        fail(
            ErrorCode::invalidState,
            "Stream::synchronize in manual mode with unfinished work: call Manual::runAll() first");
      }
    }
    state_->signal.wait(seen);
  }
  detail::raceAcquire(state_->sync);
  if (!report.empty()) throw DeviceError(report);
}

bool Stream::idle() const {
  detail::WordLock lock(detail::runtime().lock);
  return state_->first == nullptr;
}

std::string Stream::failure() const {
  detail::WordLock lock(detail::runtime().lock);
  return state_->failure.c_str();
}

void Stream::clearFailure() {
  detail::WordLock lock(detail::runtime().lock);
  state_->failure.clear();
}

Event::Event() = default;
Event::~Event() = default;

std::shared_ptr<detail::EventRecord> Event::current() const {
  detail::WordLock lock(lock_);
  return record_;
}

void Event::record(Stream& stream) {
  auto record =
      std::allocate_shared<detail::EventRecord>(detail::ArenaAllocator<detail::EventRecord>{});
  auto op = std::make_unique<detail::StreamOp>();
  op->kind = detail::StreamOp::Kind::record;
  op->event = record;
  detail::enqueue(&stream.state(), std::move(op));
  detail::WordLock lock(lock_);
  record_ = std::move(record);
}

void Event::streamWait(Stream& stream) {
  auto record = current();
  if (record == nullptr) return;
  auto op = std::make_unique<detail::StreamOp>();
  op->kind = detail::StreamOp::Kind::wait;
  op->event = std::move(record);
  detail::enqueue(&stream.state(), std::move(op));
}

bool Event::query() const {
  const auto record = current();
  if (record == nullptr) return true;
  if (!record->done.load(std::memory_order_acquire)) return false;
  detail::raceAcquire(record->sync);
  if (!record->failure.empty()) throw DeviceError(record->failure.c_str());
  return true;
}

void Event::synchronize() const {
  const auto record = current();
  if (record == nullptr) return;
  for (;;) {
    const uint32_t seen = record->signal.read();
    if (record->done.load(std::memory_order_acquire)) break;
    {
      detail::Runtime& rt = detail::runtime();
      detail::WordLock lock(rt.lock);
      if (rt.manual && !record->done.load()) {
        fail(ErrorCode::invalidState,
             "Event::synchronize in manual mode before the event: call Manual::runAll() first");
      }
    }
    record->signal.wait(seen);
  }
  detail::raceAcquire(record->sync);
  if (!record->failure.empty()) throw DeviceError(record->failure.c_str());
}

uint64_t Event::timestampNs() const {
  const auto record = current();
  if (record == nullptr || !record->done.load(std::memory_order_acquire)) return 0;
  return record->timestampNs;
}

}  // namespace cpu
}  // namespace mscclpp::device
