#include "core/transport/tcp/tcp_connection.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <mscclpp/errors.hpp>

#include "core/transport/tcp/handshake.hpp"
#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

namespace {

/// An idle side sends a heartbeat so often, or four times within the endpoint's timeout.
constexpr std::chrono::nanoseconds kHeartbeatEvery = std::chrono::seconds(1);

enum class Side { own, peer };

std::string addressOf(detail::Socket& socket, Side side) {
  detail::SocketAddress address;
  address.length = sizeof(address.storage);
  const auto get = side == Side::own ? ::getsockname : ::getpeername;
  const int result =
      get(socket.native_handle(), reinterpret_cast<sockaddr*>(&address.storage), &address.length);
  return result == 0 ? address.toString() : "an unknown address";
}

bool wouldBlock(const asio::error_code& error) {
  return error == asio::error::would_block || error == asio::error::try_again ||
         error == asio::error::interrupted;
}

std::string reason(const asio::error_code& error) {
  if (error == asio::error::eof) {
    return "closed the connection without a good-bye: its process has ended, or it has given up";
  }
  return fmt::format("is lost: {} (its process or host has ended, or the link is cut)",
                     error.message());
}

}  // namespace

TcpConnection::TcpConnection(std::shared_ptr<TcpEndpoint> endpoint, int peer)
    : Connection(Transport::tcp, peer),
      endpoint_(std::move(endpoint)),
      own_(detail::openRendezvous(endpoint_->options().interface)),
      listener_(detail::takeListener(own_.secret)) {}

TcpConnection::~TcpConnection() {
  if (listener_ >= 0) ::close(listener_);
  dropSocket();
}

ConnectionCapabilities TcpConnection::capabilities() const noexcept {
  return {.deviceMemory = endpoint_->device()->platform() == Platform::cuda};
}

std::string TcpConnection::describe() const {
  const std::lock_guard lock(textMutex_);
  return fmt::format("rank {} to rank {}: tcp, {}", endpoint_->options().rank, peer(), path_);
}

std::vector<std::byte> TcpConnection::address() const {
  const Address own{.version = kVersion,
                    .rank = endpoint_->options().rank,
                    .endpoint = endpoint_->memories()->endpoint(),
                    .listener = own_.encode()};
  std::vector<std::byte> bytes(sizeof(own));
  std::memcpy(bytes.data(), &own, sizeof(own));
  return bytes;
}

void TcpConnection::connect(std::span<const std::byte> theirs) {
  Address address{};
  check(theirs.size() == sizeof(address), ErrorCode::invalidArgument,
        "tcp: an address has {} bytes, not {}: did the peer open another transport?",
        sizeof(address), theirs.size());
  std::memcpy(&address, theirs.data(), sizeof(address));
  check(
      address.version == kVersion && address.rank == peer(), ErrorCode::invalidArgument,
      "tcp: this is an address of rank {}, version {:#x}; needed is one of rank {}, version {:#x}",
      address.rank, address.version, peer(), kVersion);
  check(listener_ >= 0, ErrorCode::invalidState,
        "tcp: connect() to rank {} was called before: open another connection", peer());
  const int own = endpoint_->options().rank;
  const Handshake handshake{.rank = own,
                            .peer = peer(),
                            .ownSecret = own_.secret,
                            .theirs = detail::Rendezvous::decode(address.listener),
                            .limit = endpoint_->options().timeout};
  sender_ = std::make_unique<Sender>(endpoint_->makeStaging());
  receiver_ = std::make_unique<Receiver>(endpoint_->memories(), endpoint_->makeStaging());
  const int listener = std::exchange(listener_, -1);
  if (own < peer()) {
    ::close(listener);
    socket_ = dial(io_, handshake);
  } else {
    std::string listening;
    for (detail::SocketAddress at : own_.addresses) {
      listening += fmt::format("{}{}:{}", listening.empty() ? "" : ", ", at.host(), own_.port);
    }
    socket_ = accept(io_, listener, handshake, listening);
  }
  theirEndpoint_ = address.endpoint;
  prepareSocket();
}

void TcpConnection::prepareSocket() {
  socket_->non_blocking(true);
  const auto set = [&](int name, unsigned value) {
    ::setsockopt(socket_->native_handle(), IPPROTO_TCP, name, &value, sizeof(value));
  };
  set(TCP_NODELAY, 1);
  // The kernel gives up at the same time as we do; 0 is its own limit of many minutes.
  const auto limit =
      std::chrono::duration_cast<std::chrono::milliseconds>(endpoint_->options().timeout);
  set(TCP_USER_TIMEOUT, static_cast<unsigned>(std::min<int64_t>(limit.count(), INT32_MAX)));
  const std::lock_guard lock(textMutex_);
  peerText_ = fmt::format("rank {} at {}", peer(), addressOf(*socket_, Side::peer));
  path_ = fmt::format("{} to {}{}", addressOf(*socket_, Side::own), addressOf(*socket_, Side::peer),
                      capabilities().deviceMemory ? ", GPU memory through pinned memory" : "");
  lastLook_ = lastHeard_ = lastSent_ = Clock::now();
}

std::shared_ptr<RemoteMemory> TcpConnection::importMemory(std::span<const std::byte> description) {
  check(theirEndpoint_.has_value(), ErrorCode::invalidState,
        "tcp: connect() to rank {} before importing its memories", peer());
  return PeerMemory::read(description, peer(), *theirEndpoint_);
}

bool TcpConnection::canPost() const {
  return failed() || posted() - completed_ < static_cast<uint64_t>(endpoint_->options().queueDepth);
}

void TcpConnection::doWrite(const Write& write) {
  const auto& source = static_cast<const Memory&>(*write.local);
  if (closed_) return failAfterClose();
  sender_->write(source.shared_from_this(), write.localOffset,
                 static_cast<const PeerMemory&>(*write.remote), write.remoteOffset, write.bytes);
}

void TcpConnection::doAdd(const Add& add) {
  if (closed_) return failAfterClose();
  sender_->add(static_cast<const PeerMemory&>(*add.remote), add.offset, add.value);
}

bool TcpConnection::progress() {
  if (!socket_) return false;
  if (failed()) {
    dropSocket();
    return false;
  }
  try {
    return step();
  } catch (const std::exception& error) {
    breakOff(error.what());
    return true;
  }
}

bool TcpConnection::step() {
  const Clock::time_point now = Clock::now();
  if (closed_) return send(now);
  const bool received = receive();
  if (receiver_->goodbye()) {
    // Everything that the peer did for us is acknowledged by now, and nothing will be added.
    check(completed_ == posted(), ErrorCode::peerFailure,
          "has said good-bye while {} of our {} operations were not complete",
          posted() - completed_, posted());
    return received;
  }
  if (sendError_ && !received) throw Error(ErrorCode::peerFailure, reason(sendError_));
  const bool sent = send(now);
  watchSilence(now, received);
  return received || sent;
}

bool TcpConnection::receive() {
  const bool settled = receiver_->settle();
  asio::error_code error;
  const bool received = !receiver_->goodbye() && receiver_->advance(*socket_, error) > 0;
  check(receiver_->acknowledged() <= posted(), ErrorCode::peerFailure,
        "sent a bad frame: an ack of {} operations, of {} that were posted",
        receiver_->acknowledged(), posted());
  completed_ = receiver_->acknowledged();
  // After a good-bye the end of the stream is as expected.
  if (error && !wouldBlock(error) && !received && !receiver_->goodbye()) {
    throw Error(ErrorCode::peerFailure, reason(error));
  }
  sender_->acknowledge(receiver_->complete());
  return settled || received;
}

bool TcpConnection::send(Clock::time_point now) {
  // A socket that takes nothing more may still hold what the peer said last: that is read first.
  if (sendError_) return false;
  const std::chrono::nanoseconds limit = endpoint_->options().timeout;
  const auto every = limit.count() == 0 ? kHeartbeatEvery : std::min(kHeartbeatEvery, limit / 4);
  if (!closed_ && now - lastSent_ >= every) sender_->heartbeat();
  asio::error_code error;
  const size_t sent = sender_->advance(*socket_, error);
  if (sent > 0) lastSent_ = now;
  if (error && !wouldBlock(error)) sendError_ = error;
  return sent > 0;
}

void TcpConnection::watchSilence(Clock::time_point now, bool heard) {
  const std::chrono::nanoseconds limit = endpoint_->options().timeout;
  if (heard || limit.count() == 0) {
    lastHeard_ = lastLook_ = now;
    return;
  }
  // Time in which this side did not look proves nothing about the other: it does not count.
  if (now - lastLook_ > limit / 4) lastHeard_ += now - lastLook_;
  lastLook_ = now;
  check(now - lastHeard_ < limit, ErrorCode::peerFailure,
        "has been silent for {:.1f} s, the limit: the link is cut, its host is down, or its "
        "process makes no progress",
        std::chrono::duration<double>(limit).count());
}

void TcpConnection::failAfterClose() {
  breakOff("an operation was posted after this side had said good-bye");
}

void TcpConnection::breakOff(const std::string& why) {
  fail(fmt::format("{}: {}", peerText_, why));
  dropSocket();
}

void TcpConnection::dropSocket() noexcept {
  if (!socket_) return;
  // Unread bytes would turn the end of the stream into a reset, which may overtake a good-bye.
  char discarded[4096];
  for (int reads = 0; closed_ && reads < 64; ++reads) {
    if (::recv(socket_->native_handle(), discarded, sizeof(discarded), MSG_DONTWAIT) <= 0) break;
  }
  asio::error_code ignored;
  socket_->close(ignored);
  socket_.reset();
  runNoThrow("tcp: ending a connection", [this] {
    sender_.reset();
    receiver_.reset();
  });
}

void TcpConnection::close() noexcept {
  if (!socket_ || closed_ || failed()) return;
  runNoThrow("tcp: saying good-bye", [this] {
    closed_ = true;
    sender_->goodbye();
    send(Clock::now());
  });
}

}  // namespace mscclpp::transport::tcp
