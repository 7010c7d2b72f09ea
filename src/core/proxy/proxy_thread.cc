#include "core/proxy/proxy_thread.hpp"

#include <algorithm>
#include <utility>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/proxy/idle.hpp"
#include "core/proxy/placement.hpp"

namespace mscclpp::detail {

namespace {

constexpr size_t kFlushWordBytes = 128;
constexpr uint64_t kPublishEvery = 64;  ///< producers that wait for room need not wait for the run
constexpr uint64_t kPrefetchAfter = 8;  ///< a run of so many is likely to go on
/// A round that takes longer has been held up, by a driver or by the system: peers wait meanwhile.
constexpr uint64_t kLongRoundNs = 1'000'000'000;

uint64_t steadyNs() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

const char* stallAdvice(const Connection& connection) {
  if (!connection.capabilities().deviceMemory) return "";
  return ": a copy on a GPU may stand behind a kernel that waits for it, in a hardware queue that "
         "two streams share; see CUDA_DEVICE_MAX_COPY_CONNECTIONS in docs/environment.md";
}

void raise(std::atomic<uint64_t>& counter, uint64_t by = 1) {
  counter.fetch_add(by, std::memory_order_relaxed);
}

}  // namespace

ProxyThread::ProxyThread(std::shared_ptr<Device> device, const ProxyOptions& options,
                         FailureHandler onFailure)
    : device_(std::move(device)),
      options_(options),
      onFailure_(std::move(onFailure)),
      flushWords_(device_->allocatePinned(Trigger::kMaxChannels * kFlushWordBytes)) {}

ProxyThread::~ProxyThread() {
  end();
}

void ProxyThread::addConnection(const std::shared_ptr<Connection>& connection) {
  const std::lock_guard lock(mutex_);
  for (const auto& served : shared_.connections) {
    if (served->connection == connection) return;
  }
  shared_.connections.push_back(std::make_shared<Served>());
  shared_.connections.back()->connection = connection;
  version_.fetch_add(1, std::memory_order_release);
}

PortChannelHandle ProxyThread::addChannel(const std::shared_ptr<const PortChannelSpec>& spec,
                                          Connection::SignalTarget* signals) {
  addConnection(spec->connection);
  const std::lock_guard lock(mutex_);
  const size_t number = shared_.channels.size();
  check(number < Trigger::kMaxChannels, ErrorCode::invalidArgument,
        "ProxyService: a proxy thread serves at most {} channels: use more threads",
        Trigger::kMaxChannels);
  auto queue = std::find_if(shared_.queues.begin(), shared_.queues.end(),
                            [&](const auto& q) { return q->number == spec->fifo; });
  if (queue == shared_.queues.end()) {
    Fifo fifo(device_, options_.fifoDepth, options_.fifoStart);
    shared_.queues.push_back(
        std::make_shared<Queue>(Queue{.number = spec->fifo, .fifo = std::move(fifo)}));
    queue = std::prev(shared_.queues.end());
  }
  auto* flushed =
      reinterpret_cast<uint64_t*>(static_cast<char*>(flushWords_.get()) + number * kFlushWordBytes);
  *flushed = options_.fifoStart;
  shared_.channels.push_back({.spec = spec,
                              .connection = spec->connection.get(),
                              .local = spec->local.get(),
                              .remote = spec->remote.get(),
                              .counters = spec->counters.get(),
                              .signals = signals,
                              .flushed = flushed});
  version_.fetch_add(1, std::memory_order_release);
  return {.fifo = (*queue)->fifo.deviceHandle(),
          .semaphore = {},
          .flushed = flushed,
          .localBytes = spec->local ? spec->local->size() : 0,
          .remoteBytes = spec->remote ? spec->remote->size() : 0,
          .counterBytes = spec->counters ? spec->counters->size() : 0,
          .channel = static_cast<uint32_t>(number),
          .peer = spec->connection->peer()};
}

void ProxyThread::start() {
  if (thread_.joinable()) return;
  stop_.store(false, std::memory_order_relaxed);
  thread_ = std::thread([this] { run(); });
}

void ProxyThread::requestDrain() {
  drainAsked_.fetch_add(1, std::memory_order_release);
}

std::string ProxyThread::awaitDrained(
    std::optional<std::chrono::steady_clock::time_point> deadline) {
  const uint64_t wanted = drainAsked_.load(std::memory_order_relaxed);
  std::unique_lock lock(mutex_);
  const auto done = [&] { return drainDone_ >= wanted; };
  if (!deadline) {
    drained_.wait(lock, done);
  } else if (!drained_.wait_until(lock, *deadline, done)) {
    return left_.empty() ? "the thread does not answer" : left_;
  }
  return {};
}

void ProxyThread::end() noexcept {
  stop_.store(true, std::memory_order_release);
  if (thread_.joinable()) thread_.join();
}

void ProxyThread::run() {
  try {
    place();
    loop();
  } catch (const std::exception& error) {
    // Only a bug comes here. No connection of this thread will be served any more.
    onFailure_(-1, fmt::format("a proxy thread has ended: {}", error.what()));
  }
}

void ProxyThread::place() {
  const std::string cores = options_.pin ? pinNear(*device_) : allowedCores();
  const std::lock_guard lock(mutex_);
  cores_ = cores;
}

void ProxyThread::loop() {
  Idle idling(options_.spin);
  while (!stop_.load(std::memory_order_acquire)) {
    adoptChanges();
    const uint64_t drainAsked = drainAsked_.load(std::memory_order_acquire);
    const uint64_t start = steadyNs();
    bool worked = false;
    for (const auto& queue : lists_.queues) worked |= drain(*queue);
    for (const auto& served : lists_.connections) worked |= tend(*served);
    raise(rounds_);
    noteRound(steadyNs() - start);
    if (start - progressCheckedNs_ > static_cast<uint64_t>(options_.stallAfter.count())) {
      progressCheckedNs_ = start;
      checkProgress();
    }
    if (drainAsked != drainAnswered_) tellDrained(drainAsked, worked);
    worked ? idling.reset() : idling.pause();
  }
}

void ProxyThread::noteRound(uint64_t ns) {
  if (ns <= longestRoundNs_.load(std::memory_order_relaxed)) return;
  longestRoundNs_.store(ns, std::memory_order_relaxed);
  if (ns > kLongRoundNs) {
    log::warn("proxy of rank {}: {:.1f} s for one look at its channels", options_.rank,
              static_cast<double>(ns) * 1e-9);
  }
}

/// What a transport does not carry out looks to the peer like a rank that sent nothing. Seldom:
/// asking a connection what it has completed may make it ask its driver.
void ProxyThread::checkProgress() {
  for (const auto& served : lists_.connections) {
    const Connection& connection = *served->connection;
    const uint64_t completed = connection.completed(), left = connection.posted() - completed;
    const bool stuck = left > 0 && served->leftBefore > 0 && !connection.failed() &&
                       completed == served->completedBefore;
    if (stuck && !std::exchange(served->stallTold, true)) {
      raise(stalls_);
      log::warn("proxy of rank {}: {} operations to rank {} have made no progress for {} ms ({}){}",
                options_.rank, left, connection.peer(),
                std::chrono::duration_cast<std::chrono::milliseconds>(options_.stallAfter).count(),
                connection.describe(), stallAdvice(connection));
    }
    if (!stuck) served->stallTold = false;
    served->completedBefore = completed;
    served->leftBefore = left;
  }
}

/// `asked` was read before the round, so that the round has seen all that was there when it was
/// asked.
void ProxyThread::tellDrained(uint64_t asked, bool worked) {
  const bool done = !worked && idle();
  const std::lock_guard lock(mutex_);
  left_ = done ? std::string() : leftOver();
  if (!done) return;
  drainDone_ = drainAnswered_ = asked;
  drained_.notify_all();
}

void ProxyThread::adoptChanges() {
  const uint64_t version = version_.load(std::memory_order_acquire);
  if (version == adopted_) return;
  const std::lock_guard lock(mutex_);
  lists_ = shared_;
  adopted_ = version;
}

bool ProxyThread::drain(Queue& queue) {
  TriggerFields fields;
  uint64_t run = 0;
  // At most one lap, so that a busy kernel does not keep other FIFOs waiting.
  while (run < static_cast<uint64_t>(options_.fifoDepth) && queue.fifo.peek(fields)) {
    if (run >= kPrefetchAfter) queue.fifo.prefetch();
    // A kernel may be quicker than the news of its channel.
    if (fields.channel >= lists_.channels.size()) adoptChanges();
    const bool noted =
        noting_.load(std::memory_order_relaxed) &&
        (fields.kind == TriggerKind::signal || fields.kind == TriggerKind::putWithSignal);
    const uint64_t seen = noted ? steadyNs() : 0;
    if (!execute(fields, queue)) {
      raise(fullConnections_);
      break;
    }
    if (noted) {
      Connection* const connection = lists_.channels[fields.channel].connection;
      servedOf(connection).signals.push_back({connection->peer(), queue.number, seen, 0});
    }
    queue.fifo.pop();
    ++run;
    if (fields.kind == TriggerKind::flush || run % kPublishEvery == 0) queue.fifo.publish();
  }
  queue.fifo.publish();
  if (run == 0) return false;
  raise(triggers_, run);
  if (run > largestRun_.load(std::memory_order_relaxed)) {
    largestRun_.store(run, std::memory_order_relaxed);
  }
  return true;
}

/// False when the connection has no room: the trigger stays where it is. What a kernel asked for
/// and cannot be had breaks the connection, whose failure then tells what it was.
bool ProxyThread::execute(const TriggerFields& fields, Queue& queue) {
  check(fields.channel < lists_.channels.size(), ErrorCode::internal,
        "a trigger for channel {}: there are {}", fields.channel, lists_.channels.size());
  const ServedChannel& channel = lists_.channels[fields.channel];
  Connection& connection = *channel.connection;
  if (!connection.failed()) {
    if (!connection.canPost()) return false;
    try {
      post(fields, channel, queue);
    } catch (const std::exception& error) {
      connection.fail(fmt::format("channel {}: {}", fields.channel, error.what()));
    }
    if (queue.writeDone && !connection.failed()) return false;
  }
  queue.writeDone = false;
  return true;
}

/// Posts one trigger; a put with signal takes two operations, and may come again for the second.
void ProxyThread::post(const TriggerFields& fields, const ServedChannel& channel, Queue& queue) {
  Connection& connection = *channel.connection;
  if (fields.kind == TriggerKind::put || fields.kind == TriggerKind::putWithSignal) {
    if (!queue.writeDone) {
      connection.write({.local = channel.local,
                        .remote = channel.remote,
                        .localOffset = fields.localOffset,
                        .remoteOffset = fields.remoteOffset,
                        .bytes = fields.bytes});
    }
    queue.writeDone = fields.kind == TriggerKind::putWithSignal;
    if (!queue.writeDone || !connection.canPost()) return;
    queue.writeDone = false;
  }
  switch (fields.kind) {
    case TriggerKind::put:
      break;
    case TriggerKind::putWithSignal:
    case TriggerKind::signal:
      check(channel.signals != nullptr, ErrorCode::invalidArgument,
            "a signal on a channel that was made without a semaphore");
      connection.signal(*channel.signals);
      break;
    case TriggerKind::atomicAdd:
      connection.atomicAdd(
          {.remote = channel.counters, .offset = fields.remoteOffset, .value = fields.value});
      break;
    case TriggerKind::flush:
      servedOf(&connection)
          .flushes.push_back({channel.flushed, queue.fifo.position() + 1, connection.posted()});
      break;
    default:
      fail(ErrorCode::internal, "a trigger of unknown kind {}", static_cast<uint32_t>(fields.kind));
  }
}

ProxyThread::Served& ProxyThread::servedOf(const Connection* connection) {
  for (const auto& served : lists_.connections) {
    if (served->connection.get() == connection) return *served;
  }
  fail(ErrorCode::internal, "a channel of a connection that is not served");
}

bool ProxyThread::tend(Served& served) {
  Connection& connection = *served.connection;
  if (connection.failed()) {
    if (std::exchange(served.reported, true)) return false;
    served.flushes.clear();  // never completed: their waits end with the failure
    onFailure_(connection.peer(), connection.failure());
    return true;
  }
  connection.submit();
  if (!served.signals.empty()) noteSubmitted(served);
  bool worked = connection.progress();
  while (!served.flushes.empty() && served.flushes.front().ticket <= connection.completed()) {
    const Flush& flush = served.flushes.front();
    __atomic_store_n(flush.word, flush.position, __ATOMIC_RELEASE);
    served.flushes.pop_front();
    worked = true;
  }
  return worked;
}

void ProxyThread::noteSubmitted(Served& served) {
  const uint64_t now = steadyNs();
  const std::lock_guard lock(mutex_);
  for (SignalTime& signal : served.signals) {
    signal.submittedNs = now;
    signals_.push_back(signal);
  }
  served.signals.clear();
}

void ProxyThread::noteSignals(bool on) {
  noting_.store(on, std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  signals_.clear();
}

std::vector<SignalTime> ProxyThread::takeSignals() {
  const std::lock_guard lock(mutex_);
  return std::exchange(signals_, {});
}

bool ProxyThread::idle() const {
  TriggerFields ignored;
  return std::none_of(lists_.queues.begin(), lists_.queues.end(),
                      [&](const auto& queue) { return queue->fifo.peek(ignored); }) &&
         std::all_of(lists_.connections.begin(), lists_.connections.end(), [](const auto& served) {
           const Connection& connection = *served->connection;
           return connection.failed() || connection.completed() == connection.posted();
         });
}

std::string ProxyThread::leftOver() const {
  std::string text;
  for (const auto& served : lists_.connections) {
    const Connection& connection = *served->connection;
    if (connection.failed() || connection.completed() == connection.posted()) continue;
    text += fmt::format("{}{} operations to rank {}", text.empty() ? "" : ", ",
                        connection.posted() - connection.completed(), connection.peer());
  }
  return text.empty() ? "triggers in a FIFO" : text;
}

ProxyStatistics ProxyThread::statistics() const {
  ProxyStatistics result;
  result.triggers = triggers_.load(std::memory_order_relaxed);
  result.rounds = rounds_.load(std::memory_order_relaxed);
  result.fullConnections = fullConnections_.load(std::memory_order_relaxed);
  result.largestRun = largestRun_.load(std::memory_order_relaxed);
  result.longestRoundNs = longestRoundNs_.load(std::memory_order_relaxed);
  result.stalls = stalls_.load(std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  result.cores = cores_;
  return result;
}

}  // namespace mscclpp::detail
