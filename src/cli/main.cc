// The program mscclpp-ep: a demonstration, a benchmark and facts about the installation.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>

#include "commands.hpp"
#include "exit_code.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr const char* kFooter =
    "Exit codes: 0 all is well, 1 a result is wrong, 2 a bad option, 3 it could not run to the "
    "end.\n"
    "Environment variables: see `mscclpp-ep info`.";

int run(int argc, char** argv) {
  // Ranks that are threads and share a GPU need a hardware queue for each of their streams, for
  // kernels and for copies. Read by the driver when it starts; a value of the user's stays.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", "32", 0);

  CLI::App app{"Expert-parallel dispatch and combine: a demonstration and a benchmark.",
               "mscclpp-ep"};
  app.set_version_flag("--version", MSCCLPP_EP_VERSION, "Print the version and exit");
  app.require_subcommand(0, 1);
  app.footer(kFooter);
  app.get_formatter()->column_width(36);
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  Action action;
  addDemo(app, arguments, action);
  addBench(app, arguments, action);
  addLowLatencyBench(app, arguments, action);
  addTraffic(app, action);
  addInfo(app, action);
  try {
    app.parse(argc, argv);
    if (!action)
      throw CLI::RequiredError("A subcommand (demo, bench, bench-ll, traffic-ll or info)");
    return action();
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kSuccess : kBadUsage;
  } catch (const Error& error) {
    std::fputs(fmt::format("mscclpp-ep: {}\n", error.what()).c_str(), stderr);
    return error.code() == ErrorCode::invalidArgument ? kBadUsage : kRuntimeError;
  } catch (const std::exception& error) {
    std::fputs(fmt::format("mscclpp-ep: {}\n", error.what()).c_str(), stderr);
    return kRuntimeError;
  }
}

}  // namespace

void addMember(CLI::App& command, RankOptions& ranks) {
  command
      .add_flag("--member", ranks.member, "One rank of --processes; started by the program itself")
      ->group("");
}

}  // namespace mscclpp::ep::cli

int main(int argc, char** argv) {
  return mscclpp::ep::cli::run(argc, argv);
}
