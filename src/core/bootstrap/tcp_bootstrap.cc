#include <sys/socket.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include <asio/executor_work_guard.hpp>
#include <asio/post.hpp>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

#include "core/bootstrap/connection.hpp"
#include "core/bootstrap/joiner.hpp"
#include "core/bootstrap/rendezvous.hpp"
#include "core/bootstrap/root_server.hpp"

namespace mscclpp {

namespace {

using detail::Bytes;
using detail::Connection;
using detail::Deadline;
using detail::Frame;
using detail::FrameType;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::hours kForever(24 * 365 * 10);
/// For the root to say who is missing. Only a root that is gone or stuck takes that long.
constexpr std::chrono::seconds kAnswerLimit(10);
constexpr std::chrono::seconds kLeaveLimit(2);
constexpr size_t kMaxMessage = size_t{1} << 30;

double seconds(std::chrono::milliseconds time) {
  return std::chrono::duration<double>(time).count();
}

}  // namespace

/// The client half. Rank 0 has one too, connected to its server by a local socket pair. A thread
/// reads; callers wait on a condition variable.
class TcpBootstrap::Impl {
 public:
  Impl(int rank, int size, const UniqueId& id, std::chrono::milliseconds timeout);
  ~Impl() { shutDown(); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void collective(const char* what, void* data, size_t bytesPerRank);
  void send(const void* data, size_t bytes, int peer, int tag);
  void recv(void* data, size_t bytes, int peer, int tag);

  const int rank;
  const int size;

 private:
  struct Failure {
    ErrorCode code;
    int rank;
    std::string text;
  };
  using Lock = std::unique_lock<std::mutex>;

  void connect(const UniqueId& id);
  void join();
  void shutDown() noexcept;
  void post(Frame frame);
  void onFrame(Frame& frame);
  void onClosed(const std::string& why);
  void throwIfFailed() const;
  /// Asks the root to break the group. Returns when the result came after all; else throws with the
  /// ranks that are missing. The root decides which: a collective ends the same way on all ranks.
  void timedOut(Lock& lock, const std::string& what, uint64_t sequence);
  Deadline deadline() const {
    return Clock::now() + (timeout_.count() == 0 ? std::chrono::milliseconds(kForever) : timeout_);
  }

  const std::chrono::milliseconds timeout_;
  std::unique_ptr<detail::RootServer> server_;
  asio::io_context io_;
  std::shared_ptr<Connection> connection_;
  std::thread thread_;
  std::mutex collectiveMutex_;
  uint64_t nextSequence_ = 0;  // under collectiveMutex_

  std::mutex mutex_;  // everything below
  std::condition_variable changed_;
  bool ready_ = false;
  bool closed_ = false;
  bool leaving_ = false;
  std::optional<Failure> failure_;
  std::set<int> left_;
  std::map<uint64_t, Bytes> results_;
  std::map<std::pair<int, int>, std::deque<Bytes>> inbox_;  // by (source, tag)
};

TcpBootstrap::Impl::Impl(int ownRank, int groupSize, const UniqueId& id,
                         std::chrono::milliseconds timeout)
    : rank(ownRank), size(groupSize), timeout_(timeout) {
  check(size >= 1 && rank >= 0 && rank < size, ErrorCode::invalidArgument,
        "TcpBootstrap: rank {} of {}: rank must be at least 0 and below size", rank, size);
  check(timeout.count() >= 0, ErrorCode::invalidArgument,
        "TcpBootstrap: timeout of {} ms: it must be positive, or 0 for no limit", timeout.count());
  connect(id);
  try {
    join();
  } catch (...) {
    shutDown();
    throw;
  }
}

void TcpBootstrap::Impl::connect(const UniqueId& id) {
  const auto rendezvous = detail::Rendezvous::decode(id);
  if (rank != 0) {
    connection_ =
        std::make_shared<Connection>(detail::joinRoot(io_, {rank, size, rendezvous, deadline()}));
    return;
  }
  const int listener = detail::takeListener(rendezvous.secret);
  check(listener >= 0, ErrorCode::invalidState,
        "TcpBootstrap: rank 0 must be made in the process that called createUniqueId(), and once: "
        "this process has no open group of that id");
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    throw SystemError(errno, "TcpBootstrap: cannot open a socket pair");
  }
  server_ = std::make_unique<detail::RootServer>(size, rendezvous.secret, listener, pair[0]);
  connection_ = std::make_shared<Connection>(
      detail::Socket(io_, asio::generic::stream_protocol(AF_UNIX, 0), pair[1]));
}

void TcpBootstrap::Impl::join() {
  connection_->start([this](Frame& frame) { onFrame(frame); },
                     [this](const std::string& why) { onClosed(why); });
  thread_ = std::thread([this] {
    runNoThrow("bootstrap", [this] {
      io_.restart();
      const auto guard = asio::make_work_guard(io_);
      io_.run();
    });
  });
  if (rank != 0) post(Frame::make(FrameType::confirm));
  Lock lock(mutex_);
  if (!changed_.wait_until(lock, deadline(), [this] { return ready_ || failure_; })) {
    timedOut(lock, "joining the group", detail::kJoinSequence);
  }
  if (!ready_) throwIfFailed();  // what happens after all were there is for the next call
}

void TcpBootstrap::Impl::shutDown() noexcept {
  if (!thread_.joinable()) return;
  runNoThrow("bootstrap: leaving", [this] {
    post(Frame::make(FrameType::leave));
    Lock lock(mutex_);
    leaving_ = true;
    changed_.wait_for(lock, kLeaveLimit, [this] { return closed_; });
  });
  server_.reset();
  io_.stop();
  thread_.join();
}

void TcpBootstrap::Impl::post(Frame frame) {
  asio::post(io_, [connection = connection_, moved = std::move(frame)]() mutable {
    connection->send(std::move(moved));
  });
}

void TcpBootstrap::Impl::onFrame(Frame& frame) {
  const Lock lock(mutex_);
  const auto& header = frame.header;
  switch (header.type) {
    case FrameType::ready:
      ready_ = true;
      break;
    case FrameType::result:
      results_[header.sequence] = std::move(frame.payload);
      break;
    case FrameType::left:
      left_.insert(header.rank);
      break;
    case FrameType::message:
      inbox_[{header.rank, header.tag}].push_back(std::move(frame.payload));
      break;
    case FrameType::failed:
      if (!failure_) {
        const auto code = static_cast<ErrorCode>(header.tag);
        const bool anotherGaveUp = code == ErrorCode::timeout && header.rank != rank;
        failure_ = Failure{code, header.rank,
                           (anotherGaveUp ? fmt::format("rank {} gave up: ", header.rank) : "") +
                               frame.payloadText()};
      }
      break;
    default:
      break;
  }
  changed_.notify_all();
}

void TcpBootstrap::Impl::onClosed(const std::string& why) {
  const Lock lock(mutex_);
  closed_ = true;
  if (!leaving_ && !failure_) {
    failure_ = Failure{
        ErrorCode::peerFailure, 0,
        left_.contains(0)
            ? fmt::format("rank 0 of {} has left the group, which ends it", size)
            : fmt::format("rank 0 of {} died: the connection to it ended without a good-bye ({})",
                          size, why)};
  }
  changed_.notify_all();
}

void TcpBootstrap::Impl::throwIfFailed() const {
  if (!failure_) return;
  const std::string text = fmt::format("rank {}: {}", rank, failure_->text);
  if (failure_->code == ErrorCode::peerFailure) throw PeerError(failure_->rank, text);
  throwError(failure_->code, text);
}

void TcpBootstrap::Impl::timedOut(Lock& lock, const std::string& what, uint64_t sequence) {
  const std::string text = fmt::format("{} took longer than {:.1f} s", what, seconds(timeout_));
  Frame frame = Frame::text(FrameType::giveUp, rank, 0, text);
  frame.header.sequence = sequence;
  post(std::move(frame));
  const auto done = [&] {
    return sequence == detail::kJoinSequence ? ready_ : results_.contains(sequence);
  };
  const bool answered = changed_.wait_for(lock, kAnswerLimit, [&] { return done() || failure_; });
  if (done()) return;
  if (!answered) {
    failure_ =
        Failure{ErrorCode::timeout, 0,
                fmt::format("{}: missing rank 0 of {}, which no longer answers", text, size)};
  }
  throwIfFailed();
}

void TcpBootstrap::Impl::collective(const char* what, void* data, size_t bytesPerRank) {
  const size_t total = bytesPerRank * static_cast<size_t>(size);
  check(bytesPerRank <= kMaxMessage / static_cast<size_t>(size), ErrorCode::invalidArgument,
        "{}: {} bytes from each of {} ranks: at most {} bytes in all; use device memory for more",
        what, bytesPerRank, size, kMaxMessage);
  const std::lock_guard oneAtATime(collectiveMutex_);
  const uint64_t sequence = nextSequence_++;
  Lock lock(mutex_);
  throwIfFailed();
  Frame frame = Frame::make(FrameType::contribute, 0, 0, sequence);
  const auto* own = static_cast<const std::byte*>(data) + bytesPerRank * static_cast<size_t>(rank);
  if (bytesPerRank != 0) frame.payload.assign(own, own + bytesPerRank);
  post(std::move(frame));
  const bool came = changed_.wait_until(
      lock, deadline(), [&] { return results_.contains(sequence) || failure_ || !left_.empty(); });
  if (!came) timedOut(lock, what, sequence);
  const auto result = results_.find(sequence);
  if (result != results_.end()) {
    check(result->second.size() == total, ErrorCode::internal, "{}: {} bytes came, not {}", what,
          result->second.size(), total);
    if (total != 0) std::memcpy(data, result->second.data(), total);
    results_.erase(result);
    return;
  }
  throwIfFailed();
  throw PeerError(*left_.begin(), fmt::format("rank {}: {}: rank {} of {} has left the group", rank,
                                              what, *left_.begin(), size));
}

void TcpBootstrap::Impl::send(const void* data, size_t bytes, int peer, int tag) {
  check(bytes <= kMaxMessage, ErrorCode::invalidArgument, "send: {} bytes: at most {}", bytes,
        kMaxMessage);
  const Lock lock(mutex_);
  throwIfFailed();
  if (left_.contains(peer)) {
    throw PeerError(
        peer, fmt::format("rank {}: send: rank {} of {} has left the group", rank, peer, size));
  }
  Frame frame = Frame::make(FrameType::message, peer, tag);
  const auto* from = static_cast<const std::byte*>(data);
  if (bytes != 0) frame.payload.assign(from, from + bytes);
  post(std::move(frame));
}

void TcpBootstrap::Impl::recv(void* data, size_t bytes, int peer, int tag) {
  Lock lock(mutex_);
  auto& queue = inbox_[{peer, tag}];
  const bool came = changed_.wait_until(
      lock, deadline(), [&] { return !queue.empty() || failure_ || left_.contains(peer); });
  if (queue.empty()) {
    throwIfFailed();
    if (!came) {
      throw TimeoutError(
          fmt::format("rank {}: recv took longer than {:.1f} s: missing a message with tag {} from "
                      "rank {} of {}",
                      rank, seconds(timeout_), tag, peer, size));
    }
    throw PeerError(
        peer, fmt::format("rank {}: recv: rank {} of {} has left the group", rank, peer, size));
  }
  const Bytes message = std::move(queue.front());
  queue.pop_front();
  check(message.size() == bytes, ErrorCode::invalidArgument,
        "rank {}: recv: rank {} sent {} bytes with tag {}, {} were expected", rank, peer,
        message.size(), tag, bytes);
  if (bytes != 0) std::memcpy(data, message.data(), bytes);
}

UniqueId TcpBootstrap::createUniqueId(const std::string& interface) {
  return detail::openRendezvous(interface.empty() ? env().socketInterface : interface).encode();
}

TcpBootstrap::TcpBootstrap(int rank, int size, const UniqueId& id,
                           std::chrono::milliseconds timeout)
    : impl_(std::make_unique<Impl>(rank, size, id, timeout)) {}

TcpBootstrap::~TcpBootstrap() = default;

int TcpBootstrap::rank() const {
  return impl_->rank;
}
int TcpBootstrap::size() const {
  return impl_->size;
}
void TcpBootstrap::allGather(void* data, size_t bytesPerRank) {
  impl_->collective("allGather", data, bytesPerRank);
}
void TcpBootstrap::barrier() {
  impl_->collective("barrier", nullptr, 0);
}
void TcpBootstrap::send(const void* data, size_t bytes, int peer, int tag) {
  checkPeer("send", peer);
  impl_->send(data, bytes, peer, tag);
}
void TcpBootstrap::recv(void* data, size_t bytes, int peer, int tag) {
  checkPeer("recv", peer);
  impl_->recv(data, bytes, peer, tag);
}

}  // namespace mscclpp
