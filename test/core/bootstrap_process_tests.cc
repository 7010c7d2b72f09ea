// TcpBootstrap with ranks as processes, some of which die.
#include <signal.h>

#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>

#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using namespace std::chrono_literals;
using test::askParent;
using test::Child;
using test::tellParent;

/// Joins, says so, then does a barrier whenever told to, and reports how it went.
const test::RoleRegistration kMember("member", [](const std::vector<std::string>& arguments) {
  const int rank = std::stoi(arguments.at(0));
  const int size = std::stoi(arguments.at(1));
  const UniqueId id =
      arguments.size() > 2 ? UniqueId::fromString(arguments[2]) : TcpBootstrap::createUniqueId();
  if (arguments.size() <= 2) tellParent(id.toString());
  TcpBootstrap group(rank, size, id, std::chrono::milliseconds(60s));
  tellParent("joined");
  while (askParent() == "barrier") {
    try {
      group.barrier();
      tellParent("passed");
    } catch (const PeerError& error) {
      tellParent(fmt::format("peer {} {}", error.rank(), error.what()));
    } catch (const Error& error) {
      tellParent(std::string("error ") + error.what());
    }
  }
  return 0;
});

/// A group of processes; rank 0 is one of them.
std::vector<Child> startGroup(int size) {
  std::vector<Child> ranks;
  ranks.emplace_back("member", std::vector<std::string>{"0", std::to_string(size)});
  const std::string id = ranks[0].hear();
  for (int rank = 1; rank < size; ++rank) {
    ranks.emplace_back("member",
                       std::vector<std::string>{std::to_string(rank), std::to_string(size), id});
  }
  for (Child& child : ranks) EXPECT_EQ(child.hear(), "joined");
  return ranks;
}

TEST(BootstrapProcess, BarrierAndOrderlyEnd) {
  auto ranks = startGroup(4);
  for (Child& child : ranks) child.tell("barrier");
  for (Child& child : ranks) EXPECT_EQ(child.hear(), "passed");
  for (Child& child : ranks) child.tell("end");
  for (Child& child : ranks) EXPECT_EQ(child.wait(), 0);
}

void expectDeathIsNamed(int victim) {
  auto ranks = startGroup(4);
  // All but the victim are in a barrier when it dies.
  for (int rank = 0; rank < 4; ++rank) {
    if (rank != victim) ranks[static_cast<size_t>(rank)].tell("barrier");
  }
  ranks[static_cast<size_t>(victim)].kill(SIGKILL);
  for (int rank = 0; rank < 4; ++rank) {
    if (rank == victim) continue;
    const std::string said = ranks[static_cast<size_t>(rank)].hear();
    EXPECT_TRUE(said.starts_with(fmt::format("peer {} ", victim))) << said;
    EXPECT_NE(said.find(fmt::format("rank {} of 4 died", victim)), std::string::npos) << said;
  }
  // And it stays said.
  const int other = victim == 3 ? 2 : 3;
  ranks[static_cast<size_t>(other)].tell("barrier");
  EXPECT_TRUE(
      ranks[static_cast<size_t>(other)].hear().starts_with(fmt::format("peer {} ", victim)));
}

TEST(BootstrapProcess, ARankThatDiesIsNamedOnEveryRank) {
  expectDeathIsNamed(2);
}

TEST(BootstrapProcess, RankZeroThatDiesIsNamedOnEveryRank) {
  expectDeathIsNamed(0);
}

TEST(BootstrapProcess, AnIdleGroupLearnsOfADeathAtItsNextCall) {
  auto ranks = startGroup(3);
  ranks[1].kill(SIGKILL);
  EXPECT_EQ(ranks[1].wait(), 128 + SIGKILL);
  ranks[2].tell("barrier");
  EXPECT_TRUE(ranks[2].hear().starts_with("peer 1 "));
}

TEST(BootstrapProcess, RankZeroCannotBeMadeElsewhere) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  Child child("member", {"0", "1", id.toString()});
  EXPECT_NE(child.hear().find("createUniqueId"), std::string::npos);
  EXPECT_EQ(child.wait(), 1);
}

}  // namespace
}  // namespace mscclpp
