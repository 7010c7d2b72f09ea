// Port channels between processes: what a peer's death looks like from a kernel.
#include <csignal>
#include <optional>

#include <mscclpp/errors.hpp>

#include "core/port_kernels.hpp"
#include "core/port_suite.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {
namespace {

constexpr size_t kMemory = size_t{1} << 16;
constexpr uint64_t kOutbox = kMemory / 2;
constexpr uint64_t kLimitNs = 60'000'000'000;
constexpr uint32_t kRounds = 12;

PortSetup setupOf(const std::string& transport) {
  const Transport parsed = parseTransport(transport);
  return {.name = "processes", .platform = Platform::cpu, .transport = parsed};
}

PortPingPongArgs pingPong(PortRank& port, int rank) {
  return {.channel = port.channel(1 - rank),
          .control = port.control(kLimitNs),
          // The flush tells that the source is free: that the peer has answered tells it too, but
          // ThreadSanitizer does not see across processes.
          .announce = Announce::putFlushSignal,
          .rounds = kRounds,
          .bytes = 3001,
          .inbox = 0,
          .outbox = kOutbox,
          .local = port.memory(),
          .counter = nullptr,
          .counterOffset = 0,
          .errors = port.errors(),
          .rank = rank,
          .firstRound = 0,
          .claim = 0};
}

/// Arguments: transport, id. Plays rank 1: a ping-pong, then it tells so, and goes when it is told
/// to.
const RoleRegistration kPortPeer("port-peer", [](const std::vector<std::string>& arguments) {
  TcpBootstrap group(1, 2, UniqueId::fromString(arguments.at(1)), kLongTimeout);
  PortRank port(setupOf(arguments.at(0)), group, 1, kMemory);
  port.fill(0x5A);
  port.start();
  launchPortPingPong(port.device(), port.stream(), pingPong(port, 1));
  port.stream().synchronize();
  tellParent(*port.errors() == 0 ? "good" : "bad");
  if (askParent() == "stop") port.stop();
  return port.service().failure().empty() && *port.errors() == 0 ? 0 : 1;
});

class PortProcesses : public testing::TestWithParam<const char*> {
 protected:
  /// Starts a new peer; both processes have exchanged messages afterwards.
  void meet() {
    port_.reset();
    const UniqueId id = TcpBootstrap::createUniqueId();
    peer_.emplace("port-peer", std::vector<std::string>{GetParam(), id.toString()});
    group_ = std::make_unique<TcpBootstrap>(0, 2, id, kLongTimeout);
    port_ = std::make_unique<PortRank>(setupOf(GetParam()), *group_, 1, kMemory);
    port_->fill(0x5A);
    port_->start();
    launchPortPingPong(port_->device(), port_->stream(), pingPong(*port_, 0));
    port_->stream().synchronize();
    EXPECT_EQ(*port_->errors(), 0u);
    EXPECT_EQ(peer_->hear(), "good");
  }
  PortPutArgs waitForASignal() {
    return {.channel = port_->channel(1),
            .control = port_->control(kLimitNs),
            .remoteOffset = 0,
            .localOffset = 0,
            .bytes = 0,
            .errors = port_->errors(),
            .wait = 1};
  }

  std::optional<Child> peer_;
  std::unique_ptr<TcpBootstrap> group_;
  std::unique_ptr<PortRank> port_;
};

TEST_P(PortProcesses, ExchangeMessagesAndPartInPeace) {
  meet();
  peer_->tell("stop");
  port_->stop();
  EXPECT_EQ(peer_->wait(), 0);
  EXPECT_EQ(port_->service().failure(), "");
  EXPECT_FALSE(failurePublished(port_->record()));
}

TEST_P(PortProcesses, AKernelThatWaitsForADeadPeerIsToldAndTheProcessGoesOn) {
  meet();
  launchPortPut(port_->device(), port_->stream(), waitForASignal());
  const auto start = std::chrono::steady_clock::now();
  peer_->kill(SIGKILL);
  port_->stream().synchronize();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  EXPECT_EQ(*port_->errors(), 1u);
  ASSERT_TRUE(failurePublished(port_->record()));
  EXPECT_EQ(port_->record().what, kWaitProxyFailed);
  EXPECT_EQ(port_->record().peer, 1);
  expectError<PeerError>(ErrorCode::peerFailure, {"rank 1"},
                         [&] { port_->service().checkHealth(); });
  // What is pushed to the dead peer is dropped, and draining does not wait for it.
  launchPortPut(port_->device(), port_->stream(),
                {.channel = port_->channel(1),
                 .control = {nullptr, kLimitNs, 0},
                 .remoteOffset = 0,
                 .localOffset = 0,
                 .bytes = 100,
                 .errors = port_->errors(),
                 .wait = 0});
  port_->stream().synchronize();
  port_->service().stop();
  // A new group in the same process, with a new peer.
  meet();
  peer_->tell("stop");
  port_->stop();
  EXPECT_EQ(peer_->wait(), 0);
}

INSTANTIATE_TEST_SUITE_P(Transports, PortProcesses, testing::Values("shm", "tcp"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace mscclpp::test
