#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <mscclpp/bootstrap.hpp>

/// Starts the ranks of one command, as threads of this process or as processes of this program.
namespace mscclpp::ep::cli {

struct RankOptions {
  int ranks = 1;
  bool processes = false;
  /// This process was started by startMembers(): it is one rank and reads which one from its
  /// standard input.
  bool member = false;
  /// The program's arguments, without its name: what members are started with.
  std::vector<std::string> arguments;
};

struct RankContext {
  int rank = 0;
  int ranks = 1;
  std::shared_ptr<Bootstrap> bootstrap;
  /// Only this rank prints.
  bool printer() const { return rank == 0; }
};

/// One rank's work; returns an exit code. What it throws is printed with the rank's number.
using RankWork = std::function<int(const RankContext&)>;

/// Runs `work` on all ranks (in a member: on its own rank) and returns the worst exit code. Blocks.
int runRanks(const RankOptions& options, const RankWork& work);

}  // namespace mscclpp::ep::cli
