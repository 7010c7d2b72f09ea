// How the sockets of two ranks find each other.
#pragma once

#include <chrono>
#include <string>

#include "core/bootstrap/connection.hpp"
#include "core/bootstrap/rendezvous.hpp"

namespace mscclpp::transport::tcp {

/// What one side of a handshake knows.
struct Handshake {
  int rank;  ///< own
  int peer;
  detail::Secret ownSecret;        ///< the peer shows it
  detail::Rendezvous theirs;       ///< whose secret is shown to the peer
  std::chrono::nanoseconds limit;  ///< 0: none
};

/// Connects to the peer's listening socket, trying all its addresses, and returns when the peer has
/// accepted. @throws TimeoutError, PeerError when no address can work any more.
detail::Socket dial(asio::io_context& io, const Handshake& handshake);

/// Waits on `listener` (owned from now on, closed in the end) for the peer; anybody else is turned
/// away. `listening` is for the error text. @throws TimeoutError.
detail::Socket accept(asio::io_context& io, int listener, const Handshake& handshake,
                      const std::string& listening);

}  // namespace mscclpp::transport::tcp
