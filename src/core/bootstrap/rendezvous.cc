#include "core/bootstrap/rendezvous.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>

#include <mscclpp/errors.hpp>

namespace mscclpp::detail {

namespace {

constexpr size_t kMaxAddresses = 5;
constexpr size_t kAddressBytes = 17;  // family (4 or 6), then 16 bytes
constexpr std::array<uint8_t, 4> kMagic = {'M', 'S', 'C', 1};

/// Byte map of a UniqueId: magic 0, secret 4, port 20 (big endian), address count 22, addresses 23.
constexpr size_t kSecretAt = 4;
constexpr size_t kPortAt = kSecretAt + kSecretBytes;
constexpr size_t kCountAt = kPortAt + 2;
constexpr size_t kAddressesAt = kCountAt + 1;
static_assert(kAddressesAt + kMaxAddresses * kAddressBytes <= sizeof(UniqueId));

const uint8_t* addressBytes(const SocketAddress& address) {
  if (address.storage.ss_family == AF_INET) {
    return reinterpret_cast<const uint8_t*>(
        &reinterpret_cast<const sockaddr_in*>(&address.storage)->sin_addr);
  }
  return reinterpret_cast<const uint8_t*>(
      &reinterpret_cast<const sockaddr_in6*>(&address.storage)->sin6_addr);
}

SocketAddress makeAddress(bool v4, const uint8_t* bytes, uint16_t port) {
  SocketAddress address;
  if (v4) {
    auto* in = reinterpret_cast<sockaddr_in*>(&address.storage);
    in->sin_family = AF_INET;
    in->sin_port = htons(port);
    std::memcpy(&in->sin_addr, bytes, 4);
    address.length = sizeof(sockaddr_in);
  } else {
    auto* in = reinterpret_cast<sockaddr_in6*>(&address.storage);
    in->sin6_family = AF_INET6;
    in->sin6_port = htons(port);
    std::memcpy(&in->sin6_addr, bytes, 16);
    address.length = sizeof(sockaddr_in6);
  }
  return address;
}

struct NamedAddress {
  std::string interface;
  bool loopback = false;
  SocketAddress address;
};

std::vector<NamedAddress> interfacesUp() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) throw SystemError(errno, "cannot list the network interfaces");
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, freeifaddrs);
  std::vector<NamedAddress> found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    const bool v4 = entry->ifa_addr->sa_family == AF_INET;
    if (!v4 && entry->ifa_addr->sa_family != AF_INET6) continue;
    SocketAddress address;
    address.length = v4 ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&address.storage, entry->ifa_addr, address.length);
    // A link-local address means nothing without the peer's own interface index.
    const auto* bytes = addressBytes(address);
    if (!v4 && bytes[0] == 0xfe && (bytes[1] & 0xc0) == 0x80) continue;
    found.push_back(
        {entry->ifa_name, (entry->ifa_flags & IFF_LOOPBACK) != 0, makeAddress(v4, bytes, 0)});
  }
  return found;
}

/// Bridges of containers and virtual machines have the same address on every host: try them last.
bool likelyVirtual(const NamedAddress& entry) {
  constexpr std::array<std::string_view, 5> kPrefixes = {"docker", "br-", "veth", "virbr", "cni"};
  return std::ranges::any_of(kPrefixes,
                             [&](auto prefix) { return entry.interface.starts_with(prefix); });
}

std::string hostOf(const SocketAddress& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  inet_ntop(address.storage.ss_family, addressBytes(address), text.data(), text.size());
  return text.data();
}

/// Listening sockets that wait for their rank 0, by secret. Never destroyed.
struct Listeners {
  std::mutex mutex;
  std::map<Secret, int> sockets;
};
Listeners& listeners() {
  static Listeners* const instance = new Listeners;
  return *instance;
}

/// A socket that is closed unless release() is called.
class SocketGuard {
 public:
  explicit SocketGuard(int fd) : fd_(fd) {}
  ~SocketGuard() {
    if (fd_ >= 0) ::close(fd_);
  }
  SocketGuard(const SocketGuard&) = delete;
  SocketGuard& operator=(const SocketGuard&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

/// Binds and listens; returns the port, or 0 with errno set.
uint16_t listenOn(int fd, const SocketAddress& address) {
  constexpr int kBacklog = 4096;
  if (::bind(fd, address.get(), address.length) != 0 || ::listen(fd, kBacklog) != 0) return 0;
  SocketAddress bound;
  bound.length = sizeof(bound.storage);
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&bound.storage), &bound.length) != 0) return 0;
  return ntohs(bound.storage.ss_family == AF_INET
                   ? reinterpret_cast<const sockaddr_in*>(&bound.storage)->sin_port
                   : reinterpret_cast<const sockaddr_in6*>(&bound.storage)->sin6_port);
}

int openSocket(int family) {
  return ::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

}  // namespace

std::string SocketAddress::toString() const {
  const bool v4 = storage.ss_family == AF_INET;
  const uint16_t port = ntohs(v4 ? reinterpret_cast<const sockaddr_in*>(&storage)->sin_port
                                 : reinterpret_cast<const sockaddr_in6*>(&storage)->sin6_port);
  return fmt::format("{}:{}", host(), port);
}

std::string SocketAddress::host() const {
  return storage.ss_family == AF_INET ? hostOf(*this) : "[" + hostOf(*this) + "]";
}

UniqueId Rendezvous::encode() const {
  UniqueId id{};
  const size_t count = std::min(addresses.size(), kMaxAddresses);
  std::ranges::copy(kMagic, id.bytes);
  std::ranges::copy(secret, id.bytes + kSecretAt);
  id.bytes[kPortAt] = static_cast<uint8_t>(port >> 8);
  id.bytes[kPortAt + 1] = static_cast<uint8_t>(port & 0xff);
  id.bytes[kCountAt] = static_cast<uint8_t>(count);
  for (size_t i = 0; i < count; ++i) {
    const bool v4 = addresses[i].storage.ss_family == AF_INET;
    uint8_t* at = id.bytes + kAddressesAt + i * kAddressBytes;
    at[0] = v4 ? 4 : 6;
    std::copy_n(addressBytes(addresses[i]), v4 ? 4 : 16, at + 1);
  }
  return id;
}

Rendezvous Rendezvous::decode(const UniqueId& id) {
  const size_t count = id.bytes[kCountAt];
  check(std::equal(kMagic.begin(), kMagic.end(), id.bytes) && count >= 1 && count <= kMaxAddresses,
        ErrorCode::invalidArgument,
        "these bytes are no UniqueId of this version: make one with TcpBootstrap::createUniqueId() "
        "and pass all {} bytes on",
        sizeof(id.bytes));
  Rendezvous result;
  std::copy_n(id.bytes + kSecretAt, kSecretBytes, result.secret.begin());
  result.port = static_cast<uint16_t>((id.bytes[kPortAt] << 8) | id.bytes[kPortAt + 1]);
  for (size_t i = 0; i < count; ++i) {
    const uint8_t* at = id.bytes + kAddressesAt + i * kAddressBytes;
    check(at[0] == 4 || at[0] == 6, ErrorCode::invalidArgument,
          "the UniqueId holds an address of unknown kind {}: was it cut or changed?", at[0]);
    result.addresses.push_back(makeAddress(at[0] == 4, at + 1, result.port));
  }
  return result;
}

bool sameSecret(const Secret& a, const Secret& b) noexcept {
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

std::vector<SocketAddress> localAddresses(const std::string& wanted) {
  std::vector<NamedAddress> all = interfacesUp();
  std::vector<SocketAddress> result;
  if (!wanted.empty()) {
    std::set<std::string> names;
    for (const auto& entry : all) {
      names.insert(entry.interface);
      if (entry.interface == wanted || hostOf(entry.address) == wanted)
        result.push_back(entry.address);
    }
    check(
        !result.empty(), ErrorCode::invalidArgument,
        "socket interface '{}' has no usable address: interfaces that are up are {} (an address of "
        "this host is allowed too)",
        wanted, fmt::join(names, ", "));
    return result;
  }
  const bool onlyLoopback = std::ranges::all_of(all, &NamedAddress::loopback);
  if (!onlyLoopback) std::erase_if(all, [](const auto& entry) { return entry.loopback; });
  const auto rank = [](const NamedAddress& entry) {
    return (likelyVirtual(entry) ? 2 : 0) + (entry.address.storage.ss_family == AF_INET ? 0 : 1);
  };
  std::ranges::stable_sort(all, {}, rank);
  for (const auto& entry : all) result.push_back(entry.address);
  check(!result.empty(), ErrorCode::system,
        "no network interface is up, not even loopback: run 'ip link set lo up'");
  return result;
}

Rendezvous openRendezvous(const std::string& wantedInterface) {
  Rendezvous result;
  result.addresses = localAddresses(wantedInterface);
  if (getrandom(result.secret.data(), result.secret.size(), 0) !=
      static_cast<ssize_t>(result.secret.size())) {
    throw SystemError(errno, "cannot get random bytes for the group's secret");
  }

  // A chosen interface: listen there only. Else everywhere: an IPv6 socket that takes IPv4 as well,
  // or an IPv4 socket on a machine without IPv6.
  const std::array<uint8_t, 16> any{};
  std::vector<SocketAddress> candidates = {makeAddress(false, any.data(), 0),
                                           makeAddress(true, any.data(), 0)};
  if (!wantedInterface.empty()) {
    result.addresses.resize(1);
    candidates = result.addresses;
  }
  for (const SocketAddress& candidate : candidates) {
    SocketGuard fd(openSocket(candidate.storage.ss_family));
    if (fd.get() < 0) continue;
    if (wantedInterface.empty() && candidate.storage.ss_family == AF_INET6) {
      const int no = 0;
      ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no));
    }
    result.port = listenOn(fd.get(), candidate);
    if (result.port == 0) continue;
    if (wantedInterface.empty() && candidate.storage.ss_family == AF_INET) {
      std::erase_if(result.addresses, [](const auto& a) { return a.storage.ss_family != AF_INET; });
    }
    const std::lock_guard lock(listeners().mutex);
    listeners().sockets.emplace(result.secret, fd.release());
    return result;
  }
  throw SystemError(errno, "cannot listen on " + candidates.back().toString());
}

int takeListener(const Secret& secret) noexcept {
  const std::lock_guard lock(listeners().mutex);
  const auto found = listeners().sockets.find(secret);
  if (found == listeners().sockets.end()) return -1;
  const int fd = found->second;
  listeners().sockets.erase(found);
  return fd;
}

}  // namespace mscclpp::detail

namespace mscclpp {

std::string UniqueId::toString() const {
  return fmt::format("{:02x}", fmt::join(bytes, ""));
}

UniqueId UniqueId::fromString(std::string_view text) {
  check(text.size() == 2 * sizeof(bytes), ErrorCode::invalidArgument,
        "a UniqueId has {} hexadecimal digits, this text has {} characters", 2 * sizeof(bytes),
        text.size());
  const auto digit = [&](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    fail(ErrorCode::invalidArgument, "a UniqueId has hexadecimal digits only, this text has '{}'",
         c);
  };
  UniqueId id;
  for (size_t i = 0; i < sizeof(bytes); ++i) {
    id.bytes[i] = static_cast<uint8_t>(digit(text[2 * i]) * 16 + digit(text[2 * i + 1]));
  }
  static_cast<void>(detail::Rendezvous::decode(id));
  return id;
}

}  // namespace mscclpp
