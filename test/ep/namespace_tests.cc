// Two nodes that are network namespaces, with addresses of their own and a link between them that
// can be cut. Each is a process whose threads are its ranks.
#include <algorithm>
#include <latch>
#include <memory>
#include <thread>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>

#include "core/namespaces.hpp"
#include "core/processes.hpp"
#include "ep/layer_calls.hpp"

namespace mscclpp::ep::testing {
namespace {

// Node n is side n of the link.
constexpr int kRanks = 4, kPerNode = 2;
constexpr double kCutSeconds = 4;  ///< limit of waits where the link is cut

/// A node's ranks, one thread each. Returns what they throw, a line each.
std::string runNode(int node, const UniqueId& id, double seconds, const RankFunction& function) {
  BufferOptions options = decodingOptions(kRanks);
  options.numNvlBytes = testOptions().numNvlBytes;
  if (seconds > 0) options.timeoutSeconds = seconds;
  std::string errors[kPerNode];
  std::vector<std::thread> threads;
  for (int i = 0; i < kPerNode; ++i) {
    threads.emplace_back([&, i] {
      const int rank = node * kPerNode + i;
      errors[i] = errorOf([&] {
        RankContext context(std::make_shared<TcpBootstrap>(rank, kRanks, id), options);
        function(context);
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::string all;
  for (int i = 0; i < kPerNode; ++i) {
    if (!errors[i].empty()) all += fmt::format("rank {}: {}; ", node * kPerNode + i, errors[i]);
  }
  if (::testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed()) all += "wrong results";
  return all;
}

void runEveryCall(RankContext& rank) {
  const Topology& topology = rank.buffer().topology();
  check(topology.nodes() == 2 && topology.transport() == Transport::tcp, ErrorCode::internal,
        "{} nodes, not over tcp", topology.nodes());
  runLayerCalls(rank);
  runDecodingCalls(rank);
  runLayerCalls(rank);
  rank.sync();
  rank.buffer().destroy();
}

/// The phases in which a link is cut: node 0 is in the call, node 1 enters it after the cut.
enum class Phase { counts, dispatch, combine, lowLatencyDispatch, lowLatencyCombine };
constexpr const char* kPhases[] = {"counts", "dispatch", "combine", "lowLatencyDispatch",
                                   "lowLatencyCombine"};

/// Both nodes' threads and the one that cuts meet here.
struct Meetings {
  std::latch ready{kPerNode};    ///< the good calls are made
  std::latch go{1};              ///< the call that meets the cut may begin
  std::latch entered{kPerNode};  ///< it has begun
};

/// Good calls; one that meets the cut; and what the good ones delivered is still right.
void runThroughCut(RankContext& rank, Phase phase, Meetings& meet) {
  const World world = layerWorld(kRanks);
  const LowLatencyWorld decoding = decodingWorld(kRanks);
  const DispatchCase sent{.id = 1, .hidden = 64, .worst = 600};
  const LowLatencyCase row{.id = 3, .hidden = kDecodingHidden};
  const CombineCase back{.id = 2, .hidden = 64};
  DispatchResult a;
  LowLatencyDispatchResult b;
  CombineResult c;
  const auto read = [&] {
    std::vector<std::uint8_t> all;
    for (const Tensor& tensor : {a.recvX, c.x, b.recvX}) {
      const auto bytes = rank.download<std::uint8_t>(tensor);
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  };
  std::vector<std::uint8_t> delivered;
  const std::string early = errorOf([&] {
    a = dispatch(rank, world, sent);
    c = combine(rank, world, back, a.handle);
    b = lowLatencyDispatch(rank, decoding, row);
    expectDispatch(rank, world, sent, a);
    expectCombine(rank, world, back, c);
    expectLowLatencyDispatch(rank, decoding, row, b);
    delivered = read();
  });
  meet.ready.count_down();
  meet.go.wait();
  const auto call = [&] {
    switch (phase) {
      case Phase::counts:
        dispatch(rank, world, {.id = 4, .hidden = 64});
        break;
      case Phase::dispatch:
        dispatch(rank, world, {.id = 4, .hidden = 64, .worst = 600});
        break;
      case Phase::combine:
        combine(rank, world, {.id = 4, .hidden = 64}, a.handle);
        break;
      case Phase::lowLatencyDispatch:
        lowLatencyDispatch(rank, decoding, {.id = 4});
        break;
      case Phase::lowLatencyCombine:
        lowLatencyCombine(rank, decoding, {.id = 4, .hidden = kDecodingHidden}, b.handle);
        break;
    }
  };
  if (phase == Phase::counts) meet.entered.count_down();  // this one blocks its caller
  std::string late = errorOf(call);
  if (phase != Phase::counts) meet.entered.count_down();
  // All that node 1 needs for its call may have come before the cut; not for one more.
  for (int more = 1; late.empty() && more >= 0; --more) {
    late = errorOf([&] {
      rank.sync();
      rank.buffer().checkHealth();
      if (more > 0) call();
    });
  }
  if (early.empty()) expectSame("what was delivered before the cut", delivered, read());
  throw Error(ErrorCode::internal, early + "|" + late);
}

/// Empty when every rank of a node ended with an error that names a rank, some with one of the
/// other node: a rank may run into its limit while it waits for one that has lost the other node.
std::string missingNames(int node, const std::string& errors) {
  const auto names = [](const std::string& text, int rank) {
    return text.find(fmt::format("connection to rank {} is broken", rank)) != std::string::npos ||
           text.find(fmt::format("waited for rank {} ", rank)) != std::string::npos;
  };
  bool otherNode = false;
  for (int rank = node * kPerNode; rank < (node + 1) * kPerNode; ++rank) {
    const std::size_t at = errors.find(fmt::format("rank {}: internal: |", rank));
    if (at == std::string::npos) return fmt::format("rank {} failed early: {}", rank, errors);
    const std::string mine = errors.substr(at, errors.find("; rank", at) - at);
    bool any = false;
    for (int named = 0; named < kRanks; ++named) {
      if (named == rank || !names(mine, named)) continue;
      any = true;
      otherNode = otherNode || named / kPerNode != node;
    }
    if (!any) return fmt::format("rank {} names nobody: {}", rank, errors);
  }
  if (!otherNode) return "nobody names the other node: " + errors;
  return errors.find("wrong results") == std::string::npos ? "" : errors;
}

Phase phaseOf(const std::string& name) {
  const auto* const found = std::find(std::begin(kPhases), std::end(kPhases), name);
  check(found != std::end(kPhases), ErrorCode::internal, "no phase '{}'", name);
  return static_cast<Phase>(found - std::begin(kPhases));
}

/// A node's ranks on their way through a cut.
class CutNode {
 public:
  CutNode(int node, const UniqueId& id, Phase phase)
      : node_(node), thread_([this, id, phase] {
          errors_ = runNode(node_, id, kCutSeconds,
                            [&](RankContext& rank) { runThroughCut(rank, phase, meet); });
        }) {}
  /// Waits for the ranks; see missingNames().
  std::string missing() {
    thread_.join();
    return missingNames(node_, errors_);
  }

  Meetings meet;

 private:
  int node_;
  std::string errors_;
  std::thread thread_;
};

// --- node 1 --------------------------------------------------------------------------------------

std::string playRight(const UniqueId& id, const std::string& what) {
  if (what == "calls") return runNode(1, id, 0, runEveryCall);
  CutNode node(1, id, phaseOf(what));
  node.meet.ready.wait();
  test::tellParent("ready");
  test::askParent();  // the link is cut
  node.meet.go.count_down();
  return node.missing();
}

/// Arguments: what to do. Then the parent tells when the interface is there, and the group.
const test::RoleRegistration kRight("ep_right", [](const std::vector<std::string>& arguments) {
  test::enterNetworkNamespace();
  test::tellParent("entered");
  test::askParent();
  test::configureLink(1);
  test::tellParent("configured");
  const UniqueId id = UniqueId::fromString(test::askParent());
  const std::string wrong = playRight(id, arguments.at(0));
  test::tellParent(wrong.empty() ? "ok" : wrong);
  return 0;
});

// --- node 0 --------------------------------------------------------------------------------------

void expectSaid(const std::string& said, const std::string& expected) {
  check(said == expected, ErrorCode::internal, "said '{}' instead of '{}'", said, expected);
}

/// Node 1, in its namespace, with the link to it.
std::unique_ptr<test::Child> startRight(const std::string& what) {
  auto right = std::make_unique<test::Child>("ep_right", std::vector<std::string>{what},
                                             std::vector<std::string>{"MSCCLPP_HOST_ID=right"});
  const std::string entered = right->hear();
  check(entered == "entered", ErrorCode::unsupported, "the second namespace: {}", entered);
  test::makeLink(right->pid());
  right->tell("configure");
  expectSaid(right->hear(), "configured");
  return right;
}

void playLeft(test::Child& right, const std::string& what) {
  const UniqueId id = TcpBootstrap::createUniqueId(test::kLinkInterfaces[0]);
  right.tell(id.toString());
  if (what == "calls") {
    expectSaid(runNode(0, id, 0, runEveryCall), "");
  } else {
    CutNode node(0, id, phaseOf(what));
    node.meet.ready.wait();
    const std::string ready = right.hear();
    node.meet.go.count_down();
    node.meet.entered.wait();
    test::setLink(false);
    right.tell("cut");
    const std::string missing = node.missing();
    expectSaid(ready, "ready");
    expectSaid(missing, "");
  }
  expectSaid(right.hear(), "ok");
}

const test::RoleRegistration kLeft("ep_left", [](const std::vector<std::string>& arguments) {
  std::unique_ptr<test::Child> right;
  try {
    test::enterNetworkNamespace();
    right = startRight(arguments.at(0));
  } catch (const std::exception& error) {
    test::tellParent(test::kCannotRun + std::string(error.what()));
    return 1;
  }
  const std::string error = errorOf([&] { playLeft(*right, arguments.at(0)); });
  test::tellParent(error.empty() ? "ok" : error);
  return 0;
});

void runTrial(const std::string& what) {
  test::runSide0("ep_left", {what}, "ok", {"MSCCLPP_HOST_ID=left"});
}

TEST(EpNamespaces, EveryCall) {
  runTrial("calls");
}

class EpCutLink : public ::testing::TestWithParam<const char*> {};

TEST_P(EpCutLink, IsNamedOnBothSides) {
  runTrial(GetParam());
}
INSTANTIATE_TEST_SUITE_P(Phases, EpCutLink, ::testing::ValuesIn(kPhases),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace mscclpp::ep::testing
