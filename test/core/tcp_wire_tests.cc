// A tcp connection whose peer speaks the wire format by hand: bad frames, bad ends, silence.
#include <chrono>
#include <cstddef>
#include <memory>

#include <gtest/gtest.h>

#include "core/ranks.hpp"
#include "core/tcp_peer.hpp"

namespace mscclpp::test {
namespace {

using namespace std::chrono_literals;
using transport::tcp::FrameHeader;
using transport::tcp::FrameType;
using Clock = std::chrono::steady_clock;

/// Rank 1 with memories of 4096 bytes, connected to a rank 0 that this test plays.
class TcpWire : public testing::Test {
 protected:
  void start(std::chrono::nanoseconds timeout = 60s) {
    endpoint_ = makeTcpEndpoint(1, timeout);
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
    while (!peer_->arrived()) connection_->progress();
    ASSERT_TRUE(peer_->receive(&ack, sizeof(ack)));
  } while (ack.type != FrameType::ack || ack.value < 2);
  EXPECT_EQ(ack.value, 2U);
}

TEST_F(TcpWire, AnOperationIsCompleteOnlyWithItsLastByte) {
  start();
  constexpr size_t kHalf = 50;
  struct {
    FrameHeader first{.type = FrameType::write, .last = 1, .memory = 0, .offset = 0, .value = 8};
    char text[8] = {'c', 'o', 'm', 'p', 'l', 'e', 't', 'e'};
    FrameHeader second{
        .type = FrameType::write, .last = 1, .memory = 0, .offset = 100, .value = 2 * kHalf};
    char half[kHalf] = {};
  } frames;
  frames.first.memory = frames.second.memory = id();
  peer_->send(&frames, offsetof(decltype(frames), half) + kHalf);
  const auto nextAck = [&] {
    FrameHeader frame{};
    while (frame.type != FrameType::ack) {
      while (!peer_->arrived() && !connection_->failed()) connection_->progress();
      check(peer_->receive(&frame, sizeof(frame)), ErrorCode::internal, "no ack has come");
    }
    return frame.value;
  };
  const auto limit = Clock::now() + 30s;
  while (memory_->memory().data()[7] != 'e' && Clock::now() < limit) connection_->progress();
  EXPECT_EQ(nextAck(), 1U);
  peer_->send(frames.half, kHalf);
  EXPECT_EQ(nextAck(), 2U);
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
  const auto stranger = makeMemory(*makeTcpEndpoint(0), 64);
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

}  // namespace
}  // namespace mscclpp::test
