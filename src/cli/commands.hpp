#pragma once

#include <functional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "ranks.hpp"

namespace mscclpp::ep::cli {

/// What to run when the arguments have been parsed; set by the subcommand that was chosen.
using Action = std::function<int()>;

/// Each adds its subcommand. `arguments` are the program's own, for members. What the action throws
/// as CLI::ValidationError is a bad option.
void addDemo(CLI::App& app, const std::vector<std::string>& arguments, Action& action);
void addBench(CLI::App& app, const std::vector<std::string>& arguments, Action& action);
void addLowLatencyBench(CLI::App& app, const std::vector<std::string>& arguments, Action& action);
void addTraffic(CLI::App& app, Action& action);
void addInfo(CLI::App& app, Action& action);

/// --member, which is not for people.
void addMember(CLI::App& command, RankOptions& ranks);

}  // namespace mscclpp::ep::cli
