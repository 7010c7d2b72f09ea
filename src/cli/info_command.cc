#include <array>
#include <cstdio>
#include <memory>
#include <optional>

#include <mscclpp/connection.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>
#include <mscclpp/platform.hpp>
#include <mscclpp/topology.hpp>

#include "commands.hpp"
#include "device_memory.hpp"
#include "exit_code.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

struct InfoArguments {
  RankOptions ranks;  ///< 0: their topology is not asked for
  std::optional<int> ranksPerNode;
  std::string transport;
  std::string platform;
};

/// A device, and below it what could carry a rank's data from there.
std::string describeDevice(Platform platform, int index) {
  const std::string name = fmt::format("  {}:{}  ", toString(platform), index);
  try {
    const auto device = Device::open(platform, index);
    std::string out = name + device->describe() + "\n";
    for (const std::string& line : describeTransports(device, index)) out += "    " + line + "\n";
    return out;
  } catch (const Error& error) {
    return fmt::format("{}cannot be used: {}\n", name, error.what());
  }
}

std::string devicesOf(Platform platform) {
  const int count = Device::count(platform);
  std::string out;
  for (int i = 0; i < count; ++i) out += describeDevice(platform, i);
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

/// As the library sees it when so many ranks of this host make a group.
int printTopology(const InfoArguments& arguments) {
  const Platform platform = choosePlatform(arguments.platform);
  TopologyOptions options{.ranksPerNode = arguments.ranksPerNode};
  if (!arguments.transport.empty()) options.transport = parseTransport(arguments.transport);
  return runRanks(arguments.ranks, [&](const RankContext& context) {
    const auto device = Device::open(platform, deviceOfRank(platform, context.rank));
    const Topology topology = Topology::discover(*context.bootstrap, device, options);
    if (context.printer()) std::fputs(("topology: " + topology.describe()).c_str(), stdout);
    return kSuccess;
  });
}

int runInfo(const InfoArguments& arguments) {
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
  return arguments.ranks.ranks > 0 ? printTopology(arguments) : kSuccess;
}

}  // namespace

void addInfo(CLI::App& app, Action& action) {
  constexpr int kMaxRanks = 64;
  auto args = std::make_shared<InfoArguments>();
  args->ranks.ranks = 0;
  CLI::App* command =
      app.add_subcommand("info",
                         "Prints the version, the build, the devices with what carries data from "
                         "them, the environment, and on request a topology");
  const auto number = [&](const char* name, auto& value, const char* help) {
    return command->add_option(name, value, help)
        ->check(CLI::Range(1, kMaxRanks).description(""))
        ->type_name("N");
  };
  CLI::Option* ranks = number("--ranks", args->ranks.ranks,
                              "Also the topology of so many ranks on this host; 1 to 64; default: "
                              "not printed");
  number("--ranks-per-node", args->ranksPerNode,
         "Forces the node shape; 1 to 64; default: MSCCLPP_EP_RANKS_PER_NODE, else one node per "
         "host")
      ->needs(ranks);
  command
      ->add_option("--transport", args->transport,
                   "What carries data between nodes: shm, cuda_ipc, tcp or verbs; default: "
                   "MSCCLPP_EP_TRANSPORT, else chosen from what is there")
      ->check(CLI::IsMember({"shm", "cuda_ipc", "tcp", "verbs"}).description(""))
      ->type_name("NAME")
      ->needs(ranks);
  command
      ->add_option("--platform", args->platform,
                   "Of the ranks: cpu, or cuda (rank r uses GPU r modulo their number); default: "
                   "MSCCLPP_EP_PLATFORM, else cuda if there is a GPU, else cpu")
      ->check(CLI::IsMember({"cpu", "cuda"}).description(""))
      ->type_name("NAME")
      ->needs(ranks);
  command->callback([args, &action] { action = [args] { return runInfo(*args); }; });
}

}  // namespace mscclpp::ep::cli
