// The transport verbs when a link, a peer or a memory goes away.
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include <mscclpp/errors.hpp>

#include "core/processes.hpp"
#include "core/ranks.hpp"
#include "core/verbs_world.hpp"

namespace mscclpp::test {
namespace {

using transport::verbs::Tuning;

constexpr std::chrono::seconds kNoticed(30);
constexpr Tuning kQuickKeepAlive{.keepAlive = std::chrono::milliseconds(50)};

void run(const std::string& command) {
  EXPECT_EQ(std::system(command.c_str()), 0) << command;
}

/// What `command` prints.
std::string outputOf(const std::string& command) {
  FILE* const pipe = ::popen(command.c_str(), "r");
  std::string text;
  for (int letter = 0; pipe != nullptr && (letter = std::fgetc(pipe)) != EOF;) {
    text += static_cast<char>(letter);
  }
  if (pipe != nullptr) ::pclose(pipe);
  return text;
}

bool breaks(
    Connection& connection, const std::function<void()>& meanwhile = [] {}) {
  return repeat(
      [&] {
        connection.progress();
        meanwhile();
      },
      [&] { return connection.failed(); }, kNoticed);
}

void expectParts(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is missing in: " << text;
  }
}

/// Rank 1 as a process of its own.
int peerRole(const std::vector<std::string>& arguments) {
  VerbsSide side(1, 65536);
  tellParent(side.hello());
  side.meet(askParent());
  tellParent("connected");
  for (std::string order = askParent(); order != "leave"; order = askParent()) {
    if (order.empty()) return 1;  // the parent is gone
    if (order == "lock") {
      // As a user who may lock nothing: root has no limit.
      rlimit none{.rlim_cur = 4096, .rlim_max = 4096};
      if (::setrlimit(RLIMIT_MEMLOCK, &none) != 0 || ::setuid(65534) != 0) return 3;
      const auto cpu = Device::open(Platform::cpu);
      constexpr size_t kBytes = size_t{1} << 20;
      try {
        side.endpoint->registerMemory(
            RegisteredMemory(cpu, cpu->allocateExportable(kBytes), kBytes));
        tellParent("registered");
      } catch (const Error& error) {
        tellParent(std::string(toString(error.code())) + ": " + error.what());
      }
    }
  }
  if (arguments.empty()) side.connection->close();
  return 0;
}
const RoleRegistration kPeer("verbs-peer", peerRole);

class VerbsPeer : public VerbsTest {
 protected:
  /// Rank 0, connected with a child that is rank 1.
  struct World {
    VerbsSide side{0, 65536, {}, kQuickKeepAlive};
    Child peer;
    explicit World(const std::vector<std::string>& arguments = {}) : peer("verbs-peer", arguments) {
      const std::string hello = peer.hear();
      peer.tell(side.hello());
      side.meet(hello);
      EXPECT_EQ(peer.hear(), "connected");
    }
    /// The connection works.
    void use() {
      side.write(0, 0, 65536);
      side.add(8, 1);
      side.connection->flush(kLongTimeout);
    }
  };
};

TEST_F(VerbsPeer, KilledWhileIdleIsNoticed) {
  World world;
  world.use();
  world.peer.kill(SIGKILL);
  ASSERT_TRUE(breaks(*world.side.connection)) << "a dead peer was not noticed";
  expectParts(world.side.connection->failure(),
              {"transport retry counter exceeded", "vendor error", "queue pair", "rank 1",
               "it has died, or the link"});
  expectError<PeerError>(ErrorCode::peerFailure, {"connection to rank 1", "retry"},
                         [&] { world.side.connection->flush(kNoticed); });
}

TEST_F(VerbsPeer, KilledWhileBusyIsNoticed) {
  World world;
  world.use();
  Connection& connection = *world.side.connection;
  uint64_t killedAt = 0;
  ASSERT_TRUE(breaks(connection, [&] {
    if (connection.canPost()) world.side.write(0, 0, 65536);
    if (connection.canPost()) world.side.add(16, 1);
    if (killedAt == 0 && connection.completed() > 50) {
      killedAt = connection.completed();
      world.peer.kill(SIGKILL);
    }
  })) << "a dead peer was not noticed";
  EXPECT_GT(killedAt, 0U);
  EXPECT_LT(connection.completed(), connection.posted());
  expectParts(connection.failure(), {"rank 1", "queue pair"});
  world.side.write(0, 0, 8);  // does nothing
  EXPECT_TRUE(connection.canPost());
}

TEST_F(VerbsPeer, EndWithoutGoodbyeIsADeath) {
  World world({"rude"});
  world.use();
  world.peer.tell("leave");
  EXPECT_EQ(world.peer.wait(), 0);
  EXPECT_TRUE(breaks(*world.side.connection));
}

TEST_F(VerbsPeer, GoodbyeIsNoDeath) {
  World world;
  world.use();
  world.peer.tell("leave");
  EXPECT_EQ(world.peer.wait(), 0);
  // Longer than signs of life and the hardware's retries take together.
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  repeat([&] { world.side.connection->progress(); },
         [&] { return std::chrono::steady_clock::now() > end; });
  EXPECT_EQ(world.side.connection->failure(), "");
  world.side.write(0, 0, 8);
  EXPECT_TRUE(breaks(*world.side.connection));
  expectParts(world.side.connection->failure(), {"it has said good-bye before"});
}

TEST_F(VerbsPeer, LimitOfLockedMemoryIsNamed) {
  World world;
  world.peer.tell("lock");
  expectParts(world.peer.hear(), {"outOfMemory", "1048576 bytes", "4096 bytes", "ulimit -l"});
  world.peer.tell("leave");
  EXPECT_EQ(world.peer.wait(), 0);
}

using VerbsFailure = VerbsTest;

TEST_F(VerbsFailure, FreedMemoryOfThePeerIsABadCompletion) {
  VerbsWorld world(4096, {}, kQuickKeepAlive);
  world[1].memory.reset();
  world[0].write(0, 0, 4096);
  world[0].connection->submit();
  ASSERT_TRUE(breaks(*world[0].connection));
  expectParts(world[0].connection->failure(),
              {"remote access error", "status 10", "rank 1", "it has freed the memory"});
  EXPECT_TRUE(breaks(*world[1].connection));  // its peer's queue pair is of no more use
}

TEST_F(VerbsFailure, FatalEventBreaksIdleConnectionsOfThatNic) {
  VerbsWorld world(4096);
  world[0].add(8, 1);
  world.drain();
  ibv_async_event event{};
  event.event_type = IBV_EVENT_DEVICE_FATAL;
  const auto& nic = world[0].endpoint->nic();
  nic->events().note(event, nic->portNumber(), "local catastrophic error");
  EXPECT_TRUE(breaks(*world[0].connection));
  expectParts(world[0].connection->failure(),
              {nic->name(), "the device reported: local catastrophic error"});
}

TEST_F(VerbsFailure, AddToFreedMemoryIsRefusedByTheCpu) {
  VerbsWorld world(4096, {}, {.hardwareAtomics = false});
  world[1].memory.reset();
  world[0].add(8, 1);
  world[0].connection->submit();
  ASSERT_TRUE(breaks(*world[1].connection));
  expectParts(world[1].connection->failure(), {"no counter is"});
}

TEST_F(VerbsFailure, OneBrokenConnectionLeavesTheOthersAlone) {
  VerbsWorld broken(4096);
  VerbsWorld sound(4096);
  broken[1].memory.reset();
  broken[0].write(0, 0, 8);
  EXPECT_TRUE(breaks(*broken[0].connection));
  sound[0].add(8, 1);
  sound.drain();
  EXPECT_EQ(sound[1].load(8), 1);
}

/// A link that may be cut; both ways, since both ends lose packets.
class VerbsLink : public VerbsTest {
 protected:
  void SetUp() override {
    VerbsTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    link_ = verbsLink();
    if (!link_.empty()) return;
    if (verbsRequired()) FAIL() << "MSCCLPP_TEST_VERBS_LINK is not set";
    GTEST_SKIP() << "no link that may be cut: tools/rxe_vm/run.py has one";
  }
  std::string link_;
};

class LossyLink {
 public:
  explicit LossyLink(const std::string& link) : link_(link) {
    run("tc qdisc add dev " + link_ + " root netem loss 1%");
  }
  ~LossyLink() { run("tc qdisc del dev " + link_ + " root"); }
  /// Whether packets were dropped, so that the test has shown something.
  bool hasDropped() const {
    const std::string text = outputOf("tc -s qdisc show dev " + link_);
    return text.find("dropped ") != std::string::npos &&
           text.find("dropped 0,") == std::string::npos;
  }

 private:
  std::string link_;
};

TEST_F(VerbsLink, OnePercentLossChangesNothing) {
  for (const bool hardwareAtomics : {true, false}) {
    const LossyLink loss(link_);
    VerbsWorld world(size_t{1} << 20, {.queueDepth = 64, .queuePairs = 2},
                     {.hardwareAtomics = hardwareAtomics, .stripeBytes = 8192});
    checkDataBeforeCounter(world, 200);
    EXPECT_TRUE(loss.hasDropped());
  }
}

TEST_F(VerbsLink, CutLinkIsNoticedBusyAndIdle) {
  for (const bool busy : {true, false}) {
    VerbsWorld world(65536, {}, kQuickKeepAlive);
    world[0].write(0, 0, 65536);
    world.drain();
    run("ip link set " + link_ + " down");
    if (busy) {
      world[0].write(0, 0, 65536);
      world[0].connection->submit();
    }
    EXPECT_TRUE(breaks(*world[0].connection)) << "busy " << busy;
    EXPECT_TRUE(breaks(*world[1].connection)) << "busy " << busy;
    run("ip link set " + link_ + " up");
    expectParts(world[0].connection->failure(), {"rank 1", "the port reported: port error"});
  }
}

}  // namespace
}  // namespace mscclpp::test
