// What is special about the transport tcp: finding each other, strangers, bad frames, silence.
#include <chrono>
#include <future>
#include <memory>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>
#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"
#include "core/tcp_peer.hpp"

namespace mscclpp::test {
namespace {

using namespace std::chrono_literals;
using transport::tcp::FrameHeader;
using transport::tcp::FrameType;
using Clock = std::chrono::steady_clock;

std::shared_ptr<Endpoint> makeEndpoint(int rank, std::chrono::nanoseconds timeout = 60s,
                                       const std::string& interface = "lo") {
  return Endpoint::create(Transport::tcp, Device::open(Platform::cpu),
                          {.rank = rank, .timeout = timeout, .interface = interface});
}

std::shared_ptr<LocalMemory> makeMemory(Endpoint& endpoint, size_t bytes) {
  const auto device = Device::open(Platform::cpu);
  return endpoint.registerMemory(
      RegisteredMemory(device, device->allocateExportable(bytes), bytes));
}

/// Progresses until the connection breaks; returns why.
std::string failureOf(Connection& connection) {
  const auto limit = Clock::now() + 30s;
  while (!connection.failed() && Clock::now() < limit) connection.progress();
  return connection.failure();
}

void expectParts(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is missing in: " << text;
  }
}

/// Two connections of this thread, 0 and 1.
struct Pair {
  explicit Pair(std::chrono::nanoseconds timeout = 60s, const std::string& interface = "lo")
      : endpoints{makeEndpoint(0, timeout, interface), makeEndpoint(1, timeout, interface)},
        connections{endpoints[0]->open(1), endpoints[1]->open(0)} {
    auto other = std::async(std::launch::async,
                            [this] { connections[1]->connect(connections[0]->address()); });
    connections[0]->connect(connections[1]->address());
    other.get();
  }
  template <class F>
  void progressUntil(F&& condition) {
    const auto limit = Clock::now() + 30s;
    while (!condition() && Clock::now() < limit) {
      for (const auto& connection : connections) connection->progress();
    }
    EXPECT_TRUE(condition());
  }
  std::shared_ptr<Endpoint> endpoints[2];
  std::shared_ptr<Connection> connections[2];
};

// --- finding each other --------------------------------------------------------------------------

TEST(TcpConnect, TheOwnRankIsRefused) {
  const auto endpoint = makeEndpoint(3);
  expectError(ErrorCode::invalidArgument, {"rank 3"}, [&] { endpoint->open(3); });
  expectError(ErrorCode::invalidArgument, {"rank -1"}, [&] { endpoint->open(-1); });
}

TEST(TcpConnect, AnInterfaceThatIsNotThereIsRefused) {
  expectError(ErrorCode::invalidArgument, {"'nic7'", "lo"}, [] { makeEndpoint(0, 1s, "nic7"); });
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
  const auto far = makeEndpoint(1)->open(0);  // listens, and never accepts
  const auto connection = makeEndpoint(0, 200ms)->open(1);
  const auto where = valueOf<transport::tcp::Address>(far->address());
  const auto port = std::to_string(detail::Rendezvous::decode(where.listener).port);
  expectError<TimeoutError>(ErrorCode::timeout,
                            {"rank 0", "rank 1", "127.0.0.1:" + port, "not accepted yet", "0.2 s"},
                            [&] { connection->connect(far->address()); });
}

TEST(TcpConnect, AnAcceptorWithoutACallerNamesThePeerAndItsOwnAddresses) {
  const auto connection = makeEndpoint(1, 200ms)->open(0);
  const auto where = valueOf<transport::tcp::Address>(connection->address());
  const auto port = std::to_string(detail::Rendezvous::decode(where.listener).port);
  expectError<TimeoutError>(ErrorCode::timeout, {"rank 0", "rank 1", "127.0.0.1:" + port, "0.2 s"},
                            [&] { connection->connect(bytesOf(addressOfNobody(0))); });
}

TEST(TcpConnect, APeerThatIsGoneIsNoticedAtOnce) {
  auto far = makeEndpoint(1)->open(0);
  const auto address = far->address();
  far.reset();
  const auto connection = makeEndpoint(0, 60s)->open(1);
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "127.0.0.1:", "refused"},
                         [&] { connection->connect(address); });
}

TEST(TcpConnect, AddressesOfOtherRanksAndVersionsAreRefused) {
  const auto connection = makeEndpoint(1)->open(0);
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
    endpoints.push_back(makeEndpoint(rank));
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

// --- strangers -----------------------------------------------------------------------------------

TEST(TcpStrangers, AreTurnedAwayAndThePeerStillGetsIn) {
  const auto connection = makeEndpoint(1)->open(0);
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
  const auto acceptor = makeEndpoint(1)->open(0);
  auto stale = valueOf<transport::tcp::Address>(acceptor->address());
  auto where = detail::Rendezvous::decode(stale.listener);
  where.secret[3] ^= 1;
  stale.listener = where.encode();
  const auto wrong = makeEndpoint(0)->open(1);
  const auto right = makeEndpoint(0)->open(1);
  auto accepting = std::async(std::launch::async, [&] { acceptor->connect(right->address()); });
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "127.0.0.1:", "closed on our greeting"},
                         [&] { wrong->connect(bytesOf(stale)); });
  right->connect(acceptor->address());
  accepting.get();
}

// --- a peer that speaks by hand ------------------------------------------------------------------

/// Rank 1 with memories of 4096 bytes, connected to a rank 0 that this test plays.
class TcpWire : public testing::Test {
 protected:
  void start(std::chrono::nanoseconds timeout = 60s) {
    endpoint_ = makeEndpoint(1, timeout);
    memory_ = makeMemory(*endpoint_, kBytes);
    connection_ = endpoint_->open(0);
    peer_ = std::make_unique<TcpPeer>(connection_->address());
    peer_->greet(0, 1, peer_->secret());
    connection_->connect(bytesOf(addressOfNobody(0)));
    transport::tcp::Greeting answer{};
    ASSERT_TRUE(peer_->receive(&answer, sizeof(answer)));
  }
  uint64_t id() const { return valueOf<transport::tcp::MemoryDescription>(memory_->describe()).id; }
  void expectUntouched() const {
    for (size_t i = 0; i < kBytes; ++i) ASSERT_EQ(memory_->memory().data()[i], 0) << "byte " << i;
  }
  /// The frame breaks the connection, the reason has all `parts`, memory is as it was.
  void expectRefused(const FrameHeader& frame, std::vector<std::string> parts) {
    start();
    peer_->send(frame);
    const std::vector<char> bytes(10'000, 'x');
    peer_->send(bytes.data(), bytes.size());
    parts.insert(parts.end(), {"rank 0 at 127.0.0.1:", "bad frame"});
    expectParts(failureOf(*connection_), parts);
    expectUntouched();
  }

  static constexpr size_t kBytes = 4096;
  std::shared_ptr<Endpoint> endpoint_;
  std::shared_ptr<LocalMemory> memory_;
  std::shared_ptr<Connection> connection_;
  std::unique_ptr<TcpPeer> peer_;
};

TEST_F(TcpWire, AWriteBeyondTheMemoryIsRefused) {
  start();
  const uint64_t memory = id();
  expectRefused(
      {.type = FrameType::write, .last = 1, .memory = memory, .offset = 4000, .value = 97},
      {"97 bytes", "offset 4000", "4096"});
}

TEST_F(TcpWire, AnOffsetThatWrapsIsRefused) {
  expectRefused({.type = FrameType::write, .last = 1, .memory = 1, .offset = ~0ULL, .value = 2},
                {"18446744073709551615"});
}

TEST_F(TcpWire, AnUnknownMemoryIsRefused) {
  expectRefused({.type = FrameType::write, .last = 1, .memory = 99, .offset = 0, .value = 4},
                {"memory 99", "not registered"});
}

TEST_F(TcpWire, APieceBeyondTheLimitIsRefused) {
  expectRefused({.type = FrameType::write, .last = 1, .memory = 1, .offset = 0, .value = 1 << 20},
                {"1048576", "131072"});
}

TEST_F(TcpWire, AMisalignedAddIsRefused) {
  expectRefused({.type = FrameType::add, .last = 1, .memory = 1, .offset = 12, .value = 1},
                {"offset 12", "multiple of 8"});
}

TEST_F(TcpWire, AnAddBeyondTheMemoryIsRefused) {
  expectRefused({.type = FrameType::add, .last = 1, .memory = 1, .offset = 4096, .value = 1},
                {"offset 4096"});
}

TEST_F(TcpWire, AnUnknownTypeIsRefused) {
  expectRefused({.type = static_cast<FrameType>(77)}, {"type 77"});
}

TEST_F(TcpWire, AnAckOfMoreThanWasPostedIsRefused) {
  expectRefused({.type = FrameType::ack, .value = 5}, {"5", "of 0"});
}

TEST_F(TcpWire, MemoryThatIsGoneIsRefused) {
  start();
  const uint64_t gone = id();
  memory_.reset();
  peer_->send({.type = FrameType::add, .last = 1, .memory = gone, .offset = 0, .value = 1});
  expectParts(failureOf(*connection_), {"not registered (any more)"});
}

TEST_F(TcpWire, FramesMayComeByteByByte) {
  start();
  struct {
    FrameHeader write{.type = FrameType::write, .last = 1, .memory = 0, .offset = 5, .value = 6};
    char text[6] = {'h', 'e', 'l', 'l', 'o', '!'};
    char pad[2] = {};
    FrameHeader add{.type = FrameType::add, .last = 1, .memory = 0, .offset = 64, .value = 9};
  } frames;
  frames.write.memory = frames.add.memory = id();
  const auto* const bytes = reinterpret_cast<const char*>(&frames);
  const auto skip = static_cast<size_t>(frames.pad - bytes);
  for (size_t i = 0; i < sizeof(frames); ++i) {
    if (i == skip || i == skip + 1) continue;
    peer_->send(bytes + i, 1);
    connection_->progress();
  }
  const auto* const counter = reinterpret_cast<const int64_t*>(memory_->memory().data() + 64);
  const auto limit = Clock::now() + 30s;
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) != 9 && Clock::now() < limit) {
    connection_->progress();
  }
  EXPECT_EQ(std::string(memory_->memory().data() + 5, 6), "hello!");
  // Both are acknowledged, with one ack or two.
  FrameHeader ack{};
  do {
    connection_->progress();
    ASSERT_TRUE(peer_->receive(&ack, sizeof(ack)));
  } while (ack.type != FrameType::ack || ack.value < 2);
  EXPECT_EQ(ack.value, 2U);
}

TEST_F(TcpWire, TheEndOfTheStreamIsADeathUnlessThereWasAGoodbye) {
  start();
  peer_->close();
  expectParts(failureOf(*connection_), {"rank 0 at 127.0.0.1:", "without a good-bye"});
  start();
  peer_->reset();
  expectParts(failureOf(*connection_), {"rank 0 at 127.0.0.1:", "reset"});
  start();
  peer_->send({.type = FrameType::goodbye});
  peer_->close();
  for (int i = 0; i < 1000; ++i) connection_->progress();
  EXPECT_EQ(connection_->failure(), "");
}

TEST_F(TcpWire, WorkForAPeerThatHasLeftFails) {
  start();
  const transport::tcp::MemoryDescription theirs{.version = transport::tcp::kVersion,
                                                 .onDevice = 0,
                                                 .endpoint = 77,  // of addressOfNobody
                                                 .id = 1,
                                                 .bytes = 64};
  const auto remote = connection_->importMemory(bytesOf(theirs));
  peer_->send({.type = FrameType::goodbye});
  connection_->atomicAdd({remote.get(), 0, 1});
  expectParts(failureOf(*connection_), {"rank 0", "good-bye", "1 of our 1 operations"});
}

TEST_F(TcpWire, MemoryOfAnotherEndpointIsRefused) {
  start();
  const auto stranger = makeMemory(*makeEndpoint(0), 64);
  expectError(ErrorCode::invalidArgument, {"another endpoint", "rank 0"},
              [&] { connection_->importMemory(stranger->describe()); });
}

// --- silence -------------------------------------------------------------------------------------

TEST_F(TcpWire, APeerThatSaysNothingIsGivenUp) {
  const auto before = Clock::now();
  start(400ms);
  expectParts(failureOf(*connection_), {"rank 0 at 127.0.0.1:", "silent for 0.4 s"});
  EXPECT_GE(Clock::now() - before, 400ms);
}

TEST_F(TcpWire, APeerThatDoesNotReadIsGivenUp) {
  start(400ms);
  const transport::tcp::MemoryDescription theirs{.version = transport::tcp::kVersion,
                                                 .onDevice = 0,
                                                 .endpoint = 77,
                                                 .id = 1,
                                                 .bytes = 1 << 20};
  const auto remote = connection_->importMemory(bytesOf(theirs));
  for (int i = 0; i < 1000; ++i) connection_->write({memory_.get(), remote.get(), 0, 0, kBytes});
  expectParts(failureOf(*connection_), {"rank 0 at 127.0.0.1:"});
  EXPECT_EQ(connection_->completed(), 0U);
}

TEST(TcpSilence, IdleSidesKeepEachOtherAlive) {
  constexpr auto kTimeout = 300ms;
  Pair pair(kTimeout);
  const auto end = Clock::now() + 4 * kTimeout;
  pair.progressUntil([&] { return Clock::now() > end; });
  for (const auto& connection : pair.connections) EXPECT_EQ(connection->failure(), "");
}

// --- bounded work --------------------------------------------------------------------------------

TEST(TcpProgress, OneCallMovesALimitedPartOfALongWrite) {
  constexpr size_t kBytes = size_t{32} << 20;
  Pair pair;
  const auto local = makeMemory(*pair.endpoints[0], kBytes);
  const auto target = makeMemory(*pair.endpoints[1], kBytes);
  const auto remote = pair.connections[0]->importMemory(target->describe());
  std::memset(local->memory().data(), 0x5C, kBytes);
  pair.connections[0]->write({local.get(), remote.get(), 0, 0, kBytes});
  size_t arrived = 0;
  int calls = 0;
  while (arrived < kBytes) {
    pair.connections[0]->progress();
    pair.connections[1]->progress();
    ++calls;
    size_t now = arrived;
    while (now < kBytes && target->memory().data()[now] == 0x5C) ++now;
    ASSERT_LE(now - arrived, size_t{1} << 20);
    arrived = now;
  }
  EXPECT_GE(calls, 32);
  pair.progressUntil([&] { return pair.connections[0]->completed() == 1; });
}

}  // namespace
}  // namespace mscclpp::test
