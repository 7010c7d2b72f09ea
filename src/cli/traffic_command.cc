#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include <mscclpp/format.hpp>

#include "commands.hpp"
#include "exit_code.hpp"
#include "ext/ep/low_latency_traffic.hpp"
#include "ext/ep/plan/low_latency_plan.hpp"
#include "number_options.hpp"
#include "text_table.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kMostRanks = 4096;

struct Arguments {
  LowLatencyShape shape;
  std::vector<int> ranks = {8, 16, 32, 64, 128, 256, 512};
  bool bf16 = false;
  std::string reduce = "rank";
};

std::string inMegabytes(double bytes) {
  return fmt::format("{:.2f}", bytes * 1e-6);
}

int run(const Arguments& arguments) {
  LowLatencyShape shape = arguments.shape;
  shape.fp8 = !arguments.bf16;
  shape.source = arguments.reduce == "source";
  checkTopk(shape.topk, shape.experts);
  checkHidden(shape.hidden);
  checkLogfmt(shape.logfmt, arguments.reduce);
  std::string text = fmt::format(
      "low latency, worked out and not run: {} tokens per rank, hidden {}, top-{} of {} experts, "
      "uniform routing, {} out, {} back, combine_reduce {}, {} ranks per node\n"
      "per rank and call, mean over the ranks; node MB: stored to ranks of the own node; puts, MB, "
      "signals (without a put), adds: to other nodes; rows: messages if every selection's row were "
      "put by itself\n",
      shape.tokens, shape.hidden, shape.topk, shape.experts, shape.fp8 ? "FP8" : "BF16",
      shape.logfmt ? "LogFMT" : "BF16", arguments.reduce, shape.ranksPerNode);
  TextTable table({"ranks", "call", "node MB", "puts", "MB", "signals", "adds", "rows", "rows MB"},
                  2);
  for (const int ranks : arguments.ranks) {
    shape.ranks = ranks;
    const LowLatencyRoundTrip trip = lowLatencyTraffic(shape);
    for (const bool out : {true, false}) {
      const LowLatencyTraffic& one = out ? trip.dispatch : trip.combine;
      table.add({std::to_string(ranks), out ? "dispatch" : "combine", inMegabytes(one.memoryBytes),
                 fmt::format("{:.0f}", one.puts), inMegabytes(one.putBytes),
                 fmt::format("{:.0f}", one.signals), fmt::format("{:.0f}", one.adds),
                 fmt::format("{:.0f}", one.rows), inMegabytes(one.rowBytes)});
    }
  }
  std::fputs((text + table.text()).c_str(), stdout);
  return kSuccess;
}

}  // namespace

void addTraffic(CLI::App& app, Action& action) {
  auto args = std::make_shared<Arguments>();
  LowLatencyShape& shape = args->shape;
  CLI::App* command = app.add_subcommand(
      "traffic-ll",
      "Works out how many messages and bytes low-latency calls send, for groups of any size");
  const NumberOptions number(*command);
  command
      ->add_option("--ranks", args->ranks,
                   "Numbers of ranks, a list; default 8,16,32,64,128,256,512; 1 to 4096 each")
      ->delimiter(',')
      ->check(CLI::Range(1, kMostRanks).description(""))
      ->type_name("N,...");
  number("--ranks-per-node", shape.ranksPerNode, 1, kMostRanks, "Ranks of a node");
  number("--tokens", shape.tokens, 1, kMaxLowLatencyTokens, "Tokens per rank");
  number("--hidden", shape.hidden, 8, kMaxLowLatencyHidden, "Values per token, a multiple of 8");
  number("--topk", shape.topk, 1, kMaxLowLatencyTopk, "Experts per token");
  number("--experts", shape.experts, 1, kMaxLowLatencyExperts, "Experts of all ranks");
  command->add_flag("--bf16", args->bf16, "Dispatch sends BF16; default: FP8 with its scales");
  command->add_flag("--logfmt", shape.logfmt, "Combine with use_logfmt");
  addCombineReduce(*command, args->reduce);
  command->add_option("--seed", shape.seed, "Of the routing; any number; default 1")
      ->type_name("N");
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace mscclpp::ep::cli
