// A peer of a tcp connection that speaks the wire format by hand, also wrongly.
#pragma once

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>
#include <mscclpp/errors.hpp>

#include "core/bootstrap/rendezvous.hpp"
#include "core/transport/tcp/wire.hpp"

namespace mscclpp::test {

/// The address of a peer of this rank, at an address where nobody listens.
inline transport::tcp::Address addressOfNobody(int rank) {
  transport::tcp::Address address{
      .version = transport::tcp::kVersion, .rank = rank, .endpoint = 77, .listener = {}};
  detail::Rendezvous where;
  where.secret.fill(0x11);
  where.port = 9;  // "discard"
  where.addresses = detail::localAddresses("lo");
  where.addresses.resize(1);
  address.listener = where.encode();
  return address;
}

template <class T>
std::vector<std::byte> bytesOf(const T& value) {
  std::vector<std::byte> bytes(sizeof(value));
  std::memcpy(bytes.data(), &value, sizeof(value));
  return bytes;
}

template <class T>
T valueOf(std::span<const std::byte> bytes) {
  T value;
  check(bytes.size() == sizeof(value), ErrorCode::internal, "{} bytes, not {}", bytes.size(),
        sizeof(value));
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

/// A blocking socket to a connection that listens.
class TcpPeer {
 public:
  /// `address`: Connection::address() of the connection under test.
  explicit TcpPeer(std::span<const std::byte> address)
      : theirs_(valueOf<transport::tcp::Address>(address)) {
    const auto where = detail::Rendezvous::decode(theirs_.listener);
    secret_ = where.secret;
    const detail::SocketAddress& first = where.addresses.front();
    socket_ = ::socket(first.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const timeval limit{.tv_sec = 30, .tv_usec = 0};
    ::setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (::connect(socket_, first.get(), first.length) != 0) throw SystemError(errno, "connect");
  }
  ~TcpPeer() { close(); }
  TcpPeer(const TcpPeer&) = delete;
  TcpPeer& operator=(const TcpPeer&) = delete;

  const detail::Secret& secret() const { return secret_; }
  void greet(int from, int to, const detail::Secret& secret) {
    const transport::tcp::Greeting greeting{.version = transport::tcp::kVersion,
                                            .from = from,
                                            .to = to,
                                            .reserved = 0,
                                            .secret = secret};
    send(&greeting, sizeof(greeting));
  }
  void send(const void* data, size_t bytes) {
    const ssize_t sent = ::send(socket_, data, bytes, MSG_NOSIGNAL);
    if (sent != static_cast<ssize_t>(bytes)) throw SystemError(errno, "send");
  }
  void send(const transport::tcp::FrameHeader& frame) { send(&frame, sizeof(frame)); }
  /// False at the end of the stream, or when it was reset.
  bool receive(void* data, size_t bytes) {
    return ::recv(socket_, data, bytes, MSG_WAITALL) == static_cast<ssize_t>(bytes);
  }
  /// Whether there is something to receive now.
  bool arrived() {
    char byte = 0;
    return ::recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0;
  }
  bool turnedAway() {
    char byte = 0;
    return !receive(&byte, 1);
  }
  void close() {
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }
  /// Ends the connection with a reset.
  void reset() {
    const linger now{.l_onoff = 1, .l_linger = 0};
    ::setsockopt(socket_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    close();
  }

 private:
  transport::tcp::Address theirs_;
  detail::Secret secret_{};
  int socket_ = -1;
};

// --- what the tests of tcp share ----------------------------------------------------------------

inline std::shared_ptr<Endpoint> makeTcpEndpoint(
    int rank, std::chrono::nanoseconds timeout = std::chrono::seconds(60),
    const std::string& interface = "lo") {
  return Endpoint::create(Transport::tcp, Device::open(Platform::cpu),
                          {.rank = rank, .timeout = timeout, .interface = interface});
}

inline std::shared_ptr<LocalMemory> makeMemory(Endpoint& endpoint, size_t bytes) {
  const auto device = Device::open(Platform::cpu);
  return endpoint.registerMemory(
      RegisteredMemory(device, device->allocateExportable(bytes), bytes));
}

/// Progresses until the connection breaks; returns why.
inline std::string failureOf(Connection& connection) {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!connection.failed() && std::chrono::steady_clock::now() < limit) connection.progress();
  return connection.failure();
}

inline void expectParts(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is missing in: " << text;
  }
}

}  // namespace mscclpp::test
