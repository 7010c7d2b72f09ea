// The meeting point of a TcpBootstrap group: lives beside rank 0, passes messages on.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <asio/io_context.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/steady_timer.hpp>

#include "core/bootstrap/connection.hpp"
#include "core/bootstrap/rendezvous.hpp"

namespace mscclpp::detail {

inline constexpr uint32_t kProtocolVersion = 2;

/// The first bytes from a joining rank. The secret comes first and is checked before anything else
/// is read.
struct Hello {
  Secret secret;
  uint32_t version;
  int32_t rank;
  int32_t size;
  uint32_t reserved;
};
static_assert(sizeof(Hello) == 32);

/// Serves one group on a thread of its own.
class RootServer {
 public:
  /// Takes over `listener`. `own` is the server's end of rank 0's connection (a local socket pair).
  RootServer(int size, const Secret& secret, int listener, int own);
  /// Waits a moment until what rank 0 has sent has been passed on, then closes all connections.
  ~RootServer();
  RootServer(const RootServer&) = delete;
  RootServer& operator=(const RootServer&) = delete;

 private:
  enum class Presence { absent, joined, left, dead };
  struct Member {
    Presence presence = Presence::absent;
    std::shared_ptr<Connection> connection;
  };
  struct Collective {
    std::vector<std::shared_ptr<const Bytes>> parts;  ///< null until contributed
    int present = 0;
  };
  /// A connection that has not shown the secret, or not said all of its hello.
  struct Guest;

  void acceptNext();
  void readSecret(const std::shared_ptr<Guest>& guest);
  void readHello(const std::shared_ptr<Guest>& guest);
  void admit(const std::shared_ptr<Guest>& guest);
  void refuse(Socket socket, const std::string& why);
  void startMember(int rank, std::shared_ptr<Connection> connection, bool joined);
  void handle(int rank, const std::shared_ptr<Connection>& from, Frame& frame);
  void join(int rank, const std::shared_ptr<Connection>& connection);
  void contribute(int rank, Frame& frame);
  void forward(int rank, Frame& frame);
  void giveUp(int rank, const Frame& frame);
  std::vector<int> missingRanks(uint64_t sequence) const;
  void leave(int rank);
  void lost(int rank, const std::string& why);
  void breakGroup(int blamed, int code, const std::string& text, int except);
  void broadcast(const FrameHeader& header, const std::shared_ptr<const Bytes>& payload,
                 int except);
  void stopWhenFlushed(int triesLeft);

  const int size_;
  const Secret secret_;
  asio::io_context io_;
  asio::posix::stream_descriptor listener_;
  asio::steady_timer acceptTimer_;
  asio::steady_timer drainTimer_;
  std::vector<Member> members_;
  std::map<uint64_t, Collective> collectives_;
  int joined_ = 0;
  int guests_ = 0;
  bool broken_ = false;
  Frame reason_;  ///< for ranks that join after it broke
  std::thread thread_;
};

}  // namespace mscclpp::detail
