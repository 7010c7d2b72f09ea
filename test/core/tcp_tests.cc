// What is special about the transport tcp: finding each other, strangers, silence, bounded work.
#include <fcntl.h>

#include <chrono>
#include <filesystem>
#include <future>
#include <memory>
#include <set>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>
#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"
#include "core/tcp_peer.hpp"
#include "core/transport/tcp/tcp_endpoint.hpp"

namespace mscclpp::test {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using transport::tcp::StagingUse;

/// Two connections of this thread, 0 and 1.
struct Pair {
  explicit Pair(std::chrono::nanoseconds timeout = 60s, const std::string& interface = "lo",
                StagingUse staging = StagingUse::deviceMemory) {
    for (const int rank : {0, 1}) {
      endpoints[rank] = std::make_shared<transport::tcp::TcpEndpoint>(
          Device::open(Platform::cpu),
          EndpointOptions{.rank = rank, .timeout = timeout, .interface = interface}, staging);
      connections[rank] = endpoints[rank]->open(1 - rank);
    }
    auto other = std::async(std::launch::async,
                            [this] { connections[1]->connect(connections[0]->address()); });
    connections[0]->connect(connections[1]->address());
    other.get();
  }
  void progress() {
    for (const auto& connection : connections) connection->progress();
  }
  template <class F>
  void progressUntil(F&& condition) {
    const auto limit = Clock::now() + 30s;
    while (!condition() && Clock::now() < limit) {
      progress();
    }
    EXPECT_TRUE(condition());
  }
  std::shared_ptr<Endpoint> endpoints[2];
  std::shared_ptr<Connection> connections[2];
};

// --- finding each other --------------------------------------------------------------------------

TEST(TcpConnect, TheOwnRankIsRefused) {
  const auto endpoint = makeTcpEndpoint(3);
  expectError(ErrorCode::invalidArgument, {"rank 3"}, [&] { endpoint->open(3); });
  expectError(ErrorCode::invalidArgument, {"rank -1"}, [&] { endpoint->open(-1); });
}

TEST(TcpConnect, AnInterfaceThatIsNotThereIsRefused) {
  expectError(ErrorCode::invalidArgument, {"'nic7'", "lo"}, [] { makeTcpEndpoint(0, 1s, "nic7"); });
}

TEST(TcpConnect, WorksOverChosenAddresses) {
  for (const std::string interface : {"", "lo", "127.0.0.1", "::1"}) {
    try {
      detail::localAddresses(interface);
    } catch (const Error&) {
      continue;  // a machine without IPv6
    }
    const Pair pair(60s, interface);
    if (interface.empty() || interface == "lo") continue;
    EXPECT_NE(pair.connections[0]->describe().find(interface), std::string::npos)
        << pair.connections[0]->describe();
    EXPECT_NE(pair.endpoints[0]->describe().find(interface), std::string::npos);
  }
}

TEST(TcpConnect, ADiallerThatIsNotAcceptedNamesThePeerAndTheAddresses) {
  const auto far = makeTcpEndpoint(1)->open(0);  // listens, and never accepts
  const auto connection = makeTcpEndpoint(0, 200ms)->open(1);
  const auto where = valueOf<transport::tcp::Address>(far->address());
  const auto port = std::to_string(detail::Rendezvous::decode(where.listener).port);
  expectError<TimeoutError>(ErrorCode::timeout,
                            {"rank 0", "rank 1", "127.0.0.1:" + port, "not accepted yet", "0.2 s"},
                            [&] { connection->connect(far->address()); });
}

TEST(TcpConnect, AnAcceptorWithoutACallerNamesThePeerAndItsOwnAddresses) {
  const auto connection = makeTcpEndpoint(1, 200ms)->open(0);
  const auto where = valueOf<transport::tcp::Address>(connection->address());
  const auto port = std::to_string(detail::Rendezvous::decode(where.listener).port);
  expectError<TimeoutError>(ErrorCode::timeout, {"rank 0", "rank 1", "127.0.0.1:" + port, "0.2 s"},
                            [&] { connection->connect(bytesOf(addressOfNobody(0))); });
}

TEST(TcpConnect, APeerThatIsGoneIsNoticedAtOnce) {
  auto far = makeTcpEndpoint(1)->open(0);
  const auto address = far->address();
  far.reset();
  const auto connection = makeTcpEndpoint(0, 60s)->open(1);
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "127.0.0.1:", "refused"},
                         [&] { connection->connect(address); });
}

TEST(TcpConnect, AddressesOfOtherRanksAndVersionsAreRefused) {
  const auto connection = makeTcpEndpoint(1)->open(0);
  auto address = addressOfNobody(2);
  expectError(ErrorCode::invalidArgument, {"rank 2", "rank 0"},
              [&] { connection->connect(bytesOf(address)); });
  address = addressOfNobody(0);
  ++address.version;
  expectError(ErrorCode::invalidArgument, {"version"},
              [&] { connection->connect(bytesOf(address)); });
}

TEST(TcpConnect, RanksMayConnectInAnyOrder) {
  std::vector<std::shared_ptr<Endpoint>> endpoints;
  std::shared_ptr<Connection> connections[4][4];
  for (int rank = 0; rank < 4; ++rank) {
    endpoints.push_back(makeTcpEndpoint(rank));
    for (int peer = 0; peer < 4; ++peer) {
      if (peer != rank) connections[rank][peer] = endpoints.back()->open(peer);
    }
  }
  // Rank 3 accepts from 2, 1, 0 while they come as 0, 1, 2; every rank has an order of its own.
  const std::vector<std::vector<int>> orders = {{3, 2, 1}, {3, 0, 2}, {1, 0, 3}, {2, 1, 0}};
  runRanks(4, [&](int rank) {
    std::vector<std::future<void>> calls;
    for (const int peer : orders[static_cast<size_t>(rank)]) {
      calls.push_back(std::async(std::launch::async, [&, rank, peer] {
        connections[rank][peer]->connect(connections[peer][rank]->address());
      }));
    }
    for (auto& call : calls) call.get();
  });
}

TEST(TcpConnect, TwiceIsRefused) {
  const Pair pair;
  expectError(ErrorCode::invalidState, {"before"},
              [&] { pair.connections[0]->connect(pair.connections[1]->address()); });
}

TEST(TcpConnect, SocketsDoNotLeakIntoChildren) {
  const auto sockets = [] {
    std::set<int> found;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      const auto target = std::filesystem::read_symlink(entry.path(), gone).string();
      const int fd = std::stoi(entry.path().filename().string());
      if (target.starts_with("socket:") && (::fcntl(fd, F_GETFD) & FD_CLOEXEC) == 0) {
        found.insert(fd);
      }
    }
    return found;
  };
  const auto before = sockets();
  const Pair pair;
  const auto listening = makeTcpEndpoint(0)->open(1);
  EXPECT_EQ(sockets(), before);
}

// --- strangers -----------------------------------------------------------------------------------

TEST(TcpStrangers, AreTurnedAwayAndThePeerStillGetsIn) {
  const auto connection = makeTcpEndpoint(1)->open(0);
  TcpPeer silent(connection->address());
  TcpPeer babbler(connection->address());
  const std::string request = "GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n";
  babbler.send(request.data(), request.size());
  TcpPeer guesser(connection->address());
  guesser.greet(0, 1, detail::Secret{});
  TcpPeer wrongRank(connection->address());
  wrongRank.greet(2, 1, wrongRank.secret());
  auto accepting =
      std::async(std::launch::async, [&] { connection->connect(bytesOf(addressOfNobody(0))); });
  EXPECT_TRUE(babbler.turnedAway());
  EXPECT_TRUE(guesser.turnedAway());
  EXPECT_TRUE(wrongRank.turnedAway());
  TcpPeer peer(connection->address());
  peer.greet(0, 1, peer.secret());
  transport::tcp::Greeting answer{};
  EXPECT_TRUE(peer.receive(&answer, sizeof(answer)));
  accepting.get();
  EXPECT_EQ(answer.from, 1);
  EXPECT_EQ(answer.secret[0], 0x11);  // of addressOfNobody: the dialler can tell who answers
  EXPECT_TRUE(silent.turnedAway());
  EXPECT_FALSE(connection->failed());
  // And from now on there is no door to knock at.
  EXPECT_THROW(TcpPeer late(connection->address()), SystemError);
}

TEST(TcpStrangers, ADiallerWithAWrongSecretIsToldAndTheAcceptorGoesOn) {
  const auto acceptor = makeTcpEndpoint(1)->open(0);
  auto stale = valueOf<transport::tcp::Address>(acceptor->address());
  auto where = detail::Rendezvous::decode(stale.listener);
  where.secret[3] ^= 1;
  stale.listener = where.encode();
  const auto wrong = makeTcpEndpoint(0)->open(1);
  const auto right = makeTcpEndpoint(0)->open(1);
  auto accepting = std::async(std::launch::async, [&] { acceptor->connect(right->address()); });
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "127.0.0.1:", "closed on our greeting"},
                         [&] { wrong->connect(bytesOf(stale)); });
  right->connect(acceptor->address());
  accepting.get();
}

TEST(TcpStrangers, ADiallerDoesNotTrustWhoDoesNotKnowItsSecret) {
  auto impostor = addressOfNobody(1);
  const detail::Rendezvous where = detail::openRendezvous("lo");
  const int listener = detail::takeListener(where.secret);
  impostor.listener = where.encode();
  ::fcntl(listener, F_SETFL, 0);  // blocks
  auto answering = std::async(std::launch::async, [&] {
    const int guest = ::accept(listener, nullptr, nullptr);
    transport::tcp::Greeting greeting{};
    EXPECT_EQ(::recv(guest, &greeting, sizeof(greeting), MSG_WAITALL),
              static_cast<ssize_t>(sizeof(greeting)));
    EXPECT_EQ(greeting.secret, where.secret);
    std::swap(greeting.from, greeting.to);  // and the secret that it was shown, not the dialler's
    EXPECT_EQ(::send(guest, &greeting, sizeof(greeting), MSG_NOSIGNAL),
              static_cast<ssize_t>(sizeof(greeting)));
    char byte = 0;
    EXPECT_EQ(::recv(guest, &byte, 1, 0), 0);
    ::close(guest);
    ::close(listener);
  });
  const auto dialler = makeTcpEndpoint(0)->open(1);
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "answered with a wrong secret"},
                         [&] { dialler->connect(bytesOf(impostor)); });
  answering.get();
}

// --- silence -------------------------------------------------------------------------------------

TEST(TcpSilence, IdleSidesKeepEachOtherAlive) {
  constexpr auto kTimeout = 300ms;
  Pair pair(kTimeout);
  const auto end = Clock::now() + 4 * kTimeout;
  pair.progressUntil([&] { return Clock::now() > end; });
  for (const auto& connection : pair.connections) EXPECT_EQ(connection->failure(), "");
}

TEST(TcpSilence, WhoDidNotLookDoesNotBlameTheOther) {
  constexpr auto kTimeout = 200ms;
  Pair pair(kTimeout);
  pair.progress();
  const auto end = Clock::now() + 2 * kTimeout;
  while (Clock::now() < end) {  // busy with something else
  }
  pair.progress();
  for (const auto& connection : pair.connections) EXPECT_EQ(connection->failure(), "");
}

// --- staging -------------------------------------------------------------------------------------

TEST(TcpStaging, NothingOvertakesACopy) {
  constexpr size_t kBytes = 1000;
  constexpr int kEnough = 1000;
  device::cpu::Manual copies;  // they are made in runAll() only
  Pair pair(60s, "lo", StagingUse::always);
  const auto source = makeMemory(*pair.endpoints[0], kBytes);
  const auto target = makeMemory(*pair.endpoints[1], kBytes);
  const auto words = makeMemory(*pair.endpoints[1], 8);
  Connection& connection = *pair.connections[0];
  const auto theirs = connection.importMemory(target->describe());
  const auto theirWords = connection.importMemory(words->describe());
  std::memset(source->memory().data(), 'x', kBytes);
  const auto* const counter = reinterpret_cast<const int64_t*>(words->memory().data());
  const auto byte = [&] { return *target->memory().data(); };

  connection.write({source.get(), theirs.get(), 0, 0, kBytes});
  connection.atomicAdd({theirWords.get(), 0, 1});
  for (int i = 0; i < kEnough; ++i) pair.progress();
  EXPECT_EQ(*counter, 0);  // the source has not been copied
  ASSERT_TRUE(copies.runAll()) << copies.lastFailure();
  for (int i = 0; i < kEnough; ++i) pair.progress();
  EXPECT_EQ(byte(), 0);
  EXPECT_EQ(*counter, 0);  // the data waits before the target
  EXPECT_EQ(connection.completed(), 0U);
  pair.progressUntil([&] {
    EXPECT_TRUE(copies.runAll()) << copies.lastFailure();
    return connection.completed() == 2;
  });
  EXPECT_EQ(byte(), 'x');
  EXPECT_EQ(*counter, 1);
}

// --- bounded work --------------------------------------------------------------------------------

TEST(TcpProgress, OneCallMovesALimitedPartOfALongWrite) {
  constexpr size_t kBytes = size_t{32} << 20;
  constexpr size_t kLimit = size_t{1} << 20;
  Pair pair;
  const auto local = makeMemory(*pair.endpoints[0], kBytes);
  const auto target = makeMemory(*pair.endpoints[1], kBytes);
  const auto remote = pair.connections[0]->importMemory(target->describe());
  std::memset(local->memory().data(), 0x5C, kBytes);
  pair.connections[0]->write({local.get(), remote.get(), 0, 0, kBytes});
  size_t seen = 0;
  const auto arrived = [&] {  // since the last call
    const size_t before = seen;
    while (seen < kBytes && target->memory().data()[seen] == 0x5C) ++seen;
    return seen - before;
  };
  pair.connections[0]->progress();
  for (int i = 0; i < 1000; ++i) pair.connections[1]->progress();
  EXPECT_LE(arrived(), kLimit);
  EXPECT_GT(seen, 0U);
  while (pair.connections[0]->progress()) {  // until the socket is full
  }
  pair.connections[1]->progress();
  EXPECT_LE(arrived(), kLimit);
  pair.progressUntil([&] { return pair.connections[0]->completed() == 1; });
}

}  // namespace
}  // namespace mscclpp::test
