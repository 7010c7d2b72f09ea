#include "core/bootstrap/root_server.hpp"

#include <sys/socket.h>

#include <cstddef>
#include <cstring>
#include <utility>

#include <asio/buffer.hpp>
#include <asio/post.hpp>
#include <asio/read.hpp>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

namespace mscclpp::detail {

namespace {

constexpr std::chrono::seconds kGuestLimit(20);
constexpr int kMaxGuests = 4096;
constexpr std::chrono::milliseconds kDrainStep(1);
constexpr int kDrainSteps = 2000;
constexpr std::chrono::milliseconds kAcceptPause(10);

Socket adopt(asio::io_context& io, int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof(address);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
  return Socket(io, asio::generic::stream_protocol(address.ss_family, 0), fd);
}

}  // namespace

struct RootServer::Guest {
  Guest(asio::io_context& io, int fd) : socket(adopt(io, fd)), limit(io) {}
  Socket socket;
  asio::steady_timer limit;
  Hello hello{};
};

RootServer::RootServer(int size, const Secret& secret, int listener, int own)
    : size_(size),
      secret_(secret),
      listener_(io_, listener),
      acceptTimer_(io_),
      drainTimer_(io_),
      members_(static_cast<size_t>(size)) {
  startMember(0, std::make_shared<Connection>(adopt(io_, own)), true);
  acceptNext();
  thread_ = std::thread([this] { runNoThrow("bootstrap root", [this] { io_.run(); }); });
}

RootServer::~RootServer() {
  runNoThrow("bootstrap root: stopping", [this] {
    asio::post(io_, [this] { stopWhenFlushed(kDrainSteps); });
    thread_.join();
  });
}

void RootServer::stopWhenFlushed(int triesLeft) {
  // Rank 0's connection ends with `leave`: until then frames of its may still be on their way here.
  bool busy = members_[0].presence == Presence::joined;
  for (const Member& member : members_) {
    if (member.connection && !member.connection->flushed()) busy = true;
  }
  if (!busy || triesLeft == 0) return io_.stop();
  drainTimer_.expires_after(kDrainStep);
  drainTimer_.async_wait(
      [this, triesLeft](const asio::error_code&) { stopWhenFlushed(triesLeft - 1); });
}

void RootServer::acceptNext() {
  listener_.async_wait(
      asio::posix::stream_descriptor::wait_read, [this](const asio::error_code& error) {
        if (error) return;
        const int fd =
            ::accept4(listener_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
          auto guest = std::make_shared<Guest>(io_, fd);
          tuneSocket(guest->socket);
          if (guests_ < kMaxGuests) readSecret(guest);
          return acceptNext();
        }
        // Out of descriptors, say: the socket stays readable, so ask again a little later.
        acceptTimer_.expires_after(kAcceptPause);
        acceptTimer_.async_wait([this](const asio::error_code&) { acceptNext(); });
      });
}

void RootServer::readSecret(const std::shared_ptr<Guest>& guest) {
  ++guests_;
  guest->limit.expires_after(kGuestLimit);
  guest->limit.async_wait([guest](const asio::error_code& error) {
    asio::error_code ignored;
    if (!error) guest->socket.close(ignored);
  });
  asio::async_read(guest->socket, asio::buffer(guest->hello.secret),
                   [this, guest](const asio::error_code& error, size_t) {
                     --guests_;
                     if (!error && sameSecret(guest->hello.secret, secret_))
                       return readHello(guest);
                     guest->limit.cancel();
                     if (!error) log::warn("bootstrap: refused a connection with a wrong secret");
                   });
}

void RootServer::readHello(const std::shared_ptr<Guest>& guest) {
  auto* rest = reinterpret_cast<std::byte*>(&guest->hello) + sizeof(Secret);
  asio::async_read(guest->socket, asio::buffer(rest, sizeof(Hello) - sizeof(Secret)),
                   [this, guest](const asio::error_code& error, size_t) {
                     guest->limit.cancel();
                     if (!error) admit(guest);
                   });
}

void RootServer::admit(const std::shared_ptr<Guest>& guest) {
  const Hello& hello = guest->hello;
  if (hello.version != kProtocolVersion) {
    return refuse(
        std::move(guest->socket),
        fmt::format("rank {} speaks version {} of the bootstrap protocol, rank 0 version {}: "
                    "use the same library on all ranks",
                    hello.rank, hello.version, kProtocolVersion));
  }
  if (hello.size != size_) {
    return refuse(
        std::move(guest->socket),
        fmt::format("rank {} was made with size {}, rank 0 with size {}: sizes must agree",
                    hello.rank, hello.size, size_));
  }
  if (hello.rank < 0 || hello.rank >= size_ ||
      members_[static_cast<size_t>(hello.rank)].presence != Presence::absent) {
    return refuse(
        std::move(guest->socket),
        fmt::format("rank {} of {} is there already: every rank joins once", hello.rank, size_));
  }
  auto connection = std::make_shared<Connection>(std::move(guest->socket));
  startMember(hello.rank, connection, false);
  connection->send(Frame::make(FrameType::welcome));
}

void RootServer::refuse(Socket socket, const std::string& why) {
  log::debug("bootstrap: refused a rank: {}", why);
  auto connection = std::make_shared<Connection>(std::move(socket));
  connection->send(Frame::text(FrameType::refuse, 0, 0, why));
  connection->closeAfterFlush();
}

void RootServer::startMember(int rank, std::shared_ptr<Connection> connection, bool joined) {
  if (joined) join(rank, connection);
  Connection* const raw = connection.get();  // not owning: the handlers live in the connection
  connection->start(
      [this, rank, raw](Frame& frame) { handle(rank, raw->shared_from_this(), frame); },
      [this, rank, raw](const std::string& why) {
        // One that never confirmed was only trying addresses.
        if (members_[static_cast<size_t>(rank)].connection.get() == raw) lost(rank, why);
      });
}

void RootServer::handle(int rank, const std::shared_ptr<Connection>& from, Frame& frame) {
  if (frame.header.type == FrameType::confirm) return join(rank, from);
  if (members_[static_cast<size_t>(rank)].connection != from) return from->close();
  switch (frame.header.type) {
    case FrameType::contribute:
      return contribute(rank, frame);
    case FrameType::message:
      return forward(rank, frame);
    case FrameType::giveUp:
      return giveUp(rank, frame);
    case FrameType::leave:
      return leave(rank);
    default:
      lost(rank, fmt::format("frame of unknown type {}", static_cast<uint32_t>(frame.header.type)));
      return from->close();
  }
}

void RootServer::join(int rank, const std::shared_ptr<Connection>& connection) {
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.presence != Presence::absent) {
    connection->send(Frame::text(
        FrameType::failed, rank, static_cast<int>(ErrorCode::invalidArgument),
        fmt::format("rank {} of {} is there already: every rank joins once", rank, size_)));
    return connection->closeAfterFlush();
  }
  member = {Presence::joined, connection};
  if (broken_) connection->send(reason_.header, std::make_shared<const Bytes>(reason_.payload));
  if (++joined_ == size_)
    broadcast({.type = FrameType::ready}, std::make_shared<const Bytes>(), -1);
}

void RootServer::contribute(int rank, Frame& frame) {
  // Some rank has an error by now: nobody may come out of this collective as if it had not.
  if (broken_) return;
  const uint64_t sequence = frame.header.sequence;
  Collective& collective = collectives_[sequence];
  collective.parts.resize(static_cast<size_t>(size_));
  const size_t bytes = frame.payload.size();
  for (int other = 0; other < size_; ++other) {
    const auto& part = collective.parts[static_cast<size_t>(other)];
    if (part && part->size() != bytes) {
      return breakGroup(
          rank, static_cast<int>(ErrorCode::invalidArgument),
          fmt::format("collective number {}: rank {} brought {} bytes, rank {} {} bytes: "
                      "all ranks must make the same calls (a barrier is 0 bytes)",
                      sequence, other, part->size(), rank, bytes),
          -1);
    }
  }
  collective.parts[static_cast<size_t>(rank)] =
      std::make_shared<const Bytes>(std::move(frame.payload));
  if (++collective.present < size_) return;
  Bytes all;
  all.reserve(bytes * static_cast<size_t>(size_));
  for (const auto& part : collective.parts) all.insert(all.end(), part->begin(), part->end());
  collectives_.erase(sequence);
  broadcast({.type = FrameType::result, .sequence = sequence},
            std::make_shared<const Bytes>(std::move(all)), -1);
}

void RootServer::forward(int rank, Frame& frame) {
  const int to = frame.header.rank;
  if (to < 0 || to >= size_) return;
  const Member& member = members_[static_cast<size_t>(to)];
  if (member.presence != Presence::joined) return;  // the sender has been told, or will be
  FrameHeader header = frame.header;
  header.rank = rank;
  member.connection->send(header, std::make_shared<const Bytes>(std::move(frame.payload)));
}

void RootServer::giveUp(int rank, const Frame& frame) {
  const std::vector<int> missing = missingRanks(frame.header.sequence);
  if (missing.empty()) return;  // done in the last moment: the result is on its way to all
  breakGroup(rank, static_cast<int>(ErrorCode::timeout),
             fmt::format("{}: missing rank{} {} of {}", frame.payloadText(),
                         missing.size() == 1 ? "" : "s", fmt::join(missing, ", "), size_),
             -1);
}

std::vector<int> RootServer::missingRanks(uint64_t sequence) const {
  const auto found = collectives_.find(sequence);
  std::vector<int> missing;
  for (int rank = 0; rank < size_; ++rank) {
    const auto index = static_cast<size_t>(rank);
    // One that is not in the list is complete: whoever asks has contributed to it.
    const bool there = sequence == kJoinSequence
                           ? members_[index].presence != Presence::absent
                           : found == collectives_.end() || found->second.parts[index] != nullptr;
    if (!there) missing.push_back(rank);
  }
  return missing;
}

void RootServer::leave(int rank) {
  Member& member = members_[static_cast<size_t>(rank)];
  member.presence = Presence::left;
  member.connection->closeAfterFlush();
  broadcast({.type = FrameType::left, .rank = rank}, std::make_shared<const Bytes>(), rank);
}

void RootServer::lost(int rank, const std::string& why) {
  members_[static_cast<size_t>(rank)].presence = Presence::dead;
  breakGroup(
      rank, static_cast<int>(ErrorCode::peerFailure),
      fmt::format("rank {} of {} died: its connection to rank 0 ended without a good-bye ({})",
                  rank, size_, why),
      rank);
}

void RootServer::breakGroup(int blamed, int code, const std::string& text, int except) {
  if (std::exchange(broken_, true)) return;  // the first reason is the one that helps
  reason_ = Frame::text(FrameType::failed, blamed, code, text);
  broadcast(reason_.header, std::make_shared<const Bytes>(reason_.payload), except);
}

void RootServer::broadcast(const FrameHeader& header, const std::shared_ptr<const Bytes>& payload,
                           int except) {
  for (int rank = 0; rank < size_; ++rank) {
    const Member& member = members_[static_cast<size_t>(rank)];
    if (rank != except && member.presence == Presence::joined)
      member.connection->send(header, payload);
  }
}

}  // namespace mscclpp::detail
