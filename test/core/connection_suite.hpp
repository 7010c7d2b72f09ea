// The conformance suite of Connection: one suite, instantiated for each transport. A transport that
// joins is two lines in conformance_tests.cc; docs/transports.md says what the suite expects.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>

#include "core/cannot_run.hpp"
#include "core/connection_rank.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {

/// The param is the name of a ConnectionInstance.
class ConnectionSuite : public testing::TestWithParam<std::string> {
 protected:
  /// Skips, or fails under CI=true when the instance is required there, if there is no such
  /// endpoint on this machine.
  void SetUp() override;
  const ConnectionInstance& instance() const { return findInstance(GetParam()); }
  std::shared_ptr<Endpoint> makeEndpoint(int rank) const {
    return instance().makeEndpoint({.rank = rank});
  }

  /// Runs `body` for every rank on a thread of its own; what one throws fails the test.
  void runAsThreads(int ranks, const std::function<void(Rank&)>& body, const RankSetup& setup = {});
  /// Runs a registered scenario: rank 0 in this process, the others in processes of their own.
  void runAsProcesses(int ranks, const std::string& scenario);
};

/// What ranks do, under a name: so that a process can be told to do it.
class Scenario {
 public:
  using Body = std::function<void(Rank&)>;
  Scenario(const std::string& name, Body body, const RankSetup& setup = {});
  static const Scenario& find(const std::string& name);
  const Body& body() const { return body_; }
  const RankSetup& setup() const { return setup_; }

 private:
  Body body_;
  RankSetup setup_;
};

/// "cpu" or "cuda": the last part of a test's name.
std::string instancePlatform(const testing::TestParamInfo<std::string>& info);

}  // namespace mscclpp::test
