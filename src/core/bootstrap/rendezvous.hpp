// What is inside a UniqueId, and the listening socket that belongs to one.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <mscclpp/bootstrap.hpp>

namespace mscclpp::detail {

/// Bytes of the secret at the front of a hello.
inline constexpr size_t kSecretBytes = 16;
using Secret = std::array<uint8_t, kSecretBytes>;

/// An IPv4 or IPv6 address and port in the form that the socket calls take.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
  /// "10.1.2.3:4567" or "[fe80::1]:4567".
  std::string toString() const;
  /// The same without the port: "10.1.2.3" or "[fe80::1]".
  std::string host() const;
};

/// The decoded content of a UniqueId.
struct Rendezvous {
  Secret secret{};
  uint16_t port = 0;
  std::vector<SocketAddress> addresses;  ///< in the order to try, with the port filled in

  UniqueId encode() const;
  /// @throws Error invalidArgument unless `id` came from encode().
  static Rendezvous decode(const UniqueId& id);
};

/// Compares in a time that does not depend on where they differ.
bool sameSecret(const Secret& a, const Secret& b) noexcept;

/// Addresses of this host that peers may reach: of the interface (or address) `wanted`, or of all
/// interfaces that are up, loopback only when there is nothing else. Ports are 0.
/// @throws Error invalidArgument with the interfaces there are.
std::vector<SocketAddress> localAddresses(const std::string& wanted);

/// Opens the listening socket of a new group and keeps it until takeListener().
Rendezvous openRendezvous(const std::string& wantedInterface);

/// The socket opened for this secret in this process (or its parent before a fork); the caller owns
/// it. -1 when there is none, or it has been taken.
int takeListener(const Secret& secret) noexcept;

}  // namespace mscclpp::detail
