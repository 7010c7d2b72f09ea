// How ranks find each other and exchange small host data before any channel exists.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace mscclpp {

/// Where a group meets: addresses and port of its root and a random 128-bit secret that every
/// member must show. Plain bytes: send it to the other ranks over whatever is there. Whoever has it
/// can join: treat it like a password. It is never logged.
struct UniqueId {
  uint8_t bytes[128];

  /// 256 hexadecimal digits.
  std::string toString() const;
  /// @throws Error invalidArgument unless `text` came from toString().
  static UniqueId fromString(std::string_view text);
  bool operator==(const UniqueId&) const = default;
};
static_assert(sizeof(UniqueId) == 128 && std::is_trivially_copyable_v<UniqueId>);

/// A group of ranks 0 .. size-1. Collectives are called by all ranks in the same order. Everything
/// blocks. Errors: TimeoutError names the ranks that are missing; PeerError names a rank that died
/// or left, on every rank, and the group is of no use after it.
class Bootstrap {
 public:
  virtual ~Bootstrap() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Collective. `data` has size() pieces of `bytesPerRank` bytes, the own piece filled in; all are
  /// on return.
  virtual void allGather(void* data, size_t bytesPerRank) = 0;
  /// Collective. Returns after every rank has called it.
  virtual void barrier() = 0;
  /// Sends to one rank; does not wait for its recv(). Messages of one sender and tag arrive in
  /// order.
  virtual void send(const void* data, size_t bytes, int peer, int tag) = 0;
  /// Receives a message of exactly `bytes` bytes. @throws Error invalidArgument when it has another
  /// size.
  virtual void recv(void* data, size_t bytes, int peer, int tag) = 0;

  /// Collective. As above, for a vector of size() trivially copyable elements.
  template <class T>
  void allGather(std::vector<T>& values) {
    static_assert(std::is_trivially_copyable_v<T>);
    checkElements(values.size());
    allGather(values.data(), sizeof(T));
  }

 protected:
  Bootstrap() = default;
  Bootstrap(const Bootstrap&) = delete;
  Bootstrap& operator=(const Bootstrap&) = delete;
  void checkElements(size_t elements) const;
  void checkPeer(const char* what, int peer) const;
};

/// A group over TCP: every rank is connected to rank 0, which passes messages on. IPv4, IPv6, or
/// only a loopback interface. Several groups may live in one process, several ranks too.
///
/// Rank 0 must live in the process that called createUniqueId (or a fork of it): that call opens
/// the listening socket. Ranks may be made in any order. Keep rank 0's object until the others need
/// the group no more; after a last barrier() any order is fine. The destructor does not wait for
/// other ranks.
///
/// Thread safe: send and recv from any threads; collectives one at a time.
class TcpBootstrap : public Bootstrap {
 public:
  /// Makes the id of a new group and starts listening (for rank 0 of this process). `interface`: a
  /// name such as "eth0", or an address of this host; empty: MSCCLPP_SOCKET_INTERFACE, else every
  /// address of the host.
  /// @throws Error invalidArgument with the interfaces there are, SystemError.
  static UniqueId createUniqueId(const std::string& interface = "");

  /// Collective: joins the group; returns when all ranks are there. `timeout` bounds this and every
  /// later call (0 = no limit).
  /// @throws TimeoutError with the missing ranks, Error invalidArgument for a bad rank, size, a
  /// rank taken twice, or sizes that differ, invalidState when rank 0 was made in another process
  /// than the id, PeerError.
  TcpBootstrap(int rank, int size, const UniqueId& id,
               std::chrono::milliseconds timeout = std::chrono::seconds(100));
  ~TcpBootstrap() override;

  int rank() const override;
  int size() const override;
  void allGather(void* data, size_t bytesPerRank) override;
  using Bootstrap::allGather;
  void barrier() override;
  void send(const void* data, size_t bytes, int peer, int tag) override;
  void recv(void* data, size_t bytes, int peer, int tag) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// A group over the caller's own collectives (torch.distributed, MPI). Timeouts and dead peers are
/// the callbacks' business; what they throw passes through.
class CallbackBootstrap : public Bootstrap {
 public:
  /// `allGather(data, bytesPerRank)` as in Bootstrap::allGather. `barrier` may be empty: then an
  /// allGather of one byte is used.
  CallbackBootstrap(int rank, int size, std::function<void(void*, size_t)> allGather,
                    std::function<void()> barrier = {});

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void allGather(void* data, size_t bytesPerRank) override;
  using Bootstrap::allGather;
  void barrier() override;
  /// Always an Error (unsupported): point-to-point messages cannot be built on a collective.
  /// Nothing in this library needs them.
  void send(const void* data, size_t bytes, int peer, int tag) override;
  void recv(void* data, size_t bytes, int peer, int tag) override;

 private:
  int rank_;
  int size_;
  std::function<void(void*, size_t)> allGather_;
  std::function<void()> barrier_;
};

}  // namespace mscclpp
