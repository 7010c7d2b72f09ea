#include <array>
#include <cstdio>
#include <functional>

#include <mscclpp/connection.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>
#include <mscclpp/platform.hpp>

#include "commands.hpp"
#include "exit_code.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

std::string devicesOf(Platform platform) {
  const int count = Device::count(platform);
  std::string out;
  for (int i = 0; i < count; ++i) {
    std::string line;
    try {
      line = Device::open(platform, i)->describe();
    } catch (const Error& error) {
      line = fmt::format("cannot be used: {}", error.what());
    }
    out += fmt::format("  {}:{}  {}\n", toString(platform), i, line);
  }
  if (count > 0) return out;
  std::string reason = "none";
  try {
    Device::open(platform, 0);
  } catch (const Error& error) {
    reason = fmt::format("none: {}", error.what());
  }
  return fmt::format("  {}    {}\n", toString(platform), reason);
}

/// The values in force. docs/environment.md has the whole table.
std::string environmentTable() {
  static constexpr std::array kLevels{"trace", "debug", "info", "warn", "error", "off"};
  const Env& e = env();
  TextTable table({"variable", "value", "meaning"}, 3);
  const auto row = [&](const char* name, std::string value, const char* meaning) {
    table.add({name, value.empty() ? "not set" : std::move(value), meaning});
  };
  const double seconds = std::chrono::duration<double>(e.timeout).count();
  row("MSCCLPP_EP_PLATFORM", e.platform ? std::string(toString(*e.platform)) : "",
      "cpu or cuda: default of --platform");
  row("MSCCLPP_EP_TIMEOUT", seconds > 0 ? fmt::format("{} s", seconds) : "0 (no limit)",
      "seconds that any wait for a peer may take");
  row("MSCCLPP_EP_RANKS_PER_NODE", e.ranksPerNode ? std::to_string(*e.ranksPerNode) : "",
      "forces the node shape");
  row("MSCCLPP_EP_TRANSPORT", e.transport ? std::string(toString(*e.transport)) : "",
      "shm, cuda_ipc, tcp or verbs: carries port channels");
  row("MSCCLPP_SOCKET_INTERFACE", e.socketInterface, "interface or address of the rendezvous");
  row("MSCCLPP_HOST_ID", e.hostId, "identity of this host");
  row("MSCCLPP_LOG_LEVEL", kLevels[static_cast<std::size_t>(e.logLevel)],
      "trace, debug, info, warn, error or off");
  row("MSCCLPP_SIMT_...", "-", "the CPU platform's runtime: docs/environment.md");
  return table.text();
}

int runInfo() {
  std::string out = fmt::format("mscclpp-ep {}\n", MSCCLPP_EP_VERSION);
#if MSCCLPP_HAVE_CUDA
  out += "platforms built: cpu, cuda (architectures " MSCCLPP_EP_CUDA_ARCHS ")\n";
#else
  out += "platforms built: cpu (no CUDA: configure with MSCCLPP_USE_CUDA=ON)\n";
#endif
  out += fmt::format("compiler: {}; build type {}\n", __VERSION__, MSCCLPP_EP_BUILD_TYPE);
  out += fmt::format("host: {}\ndevices:\n{}{}environment:\n{}", hostId(), devicesOf(Platform::cpu),
                     devicesOf(Platform::cuda), environmentTable());
  std::fputs(out.c_str(), stdout);
  return kSuccess;
}

}  // namespace

void addInfo(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("info", "Prints the version, the build, the devices and the environment");
  command->callback([&action] { action = runInfo; });
}

}  // namespace mscclpp::ep::cli
