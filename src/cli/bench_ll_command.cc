#include <algorithm>
#include <memory>
#include <optional>

#include <mscclpp/format.hpp>

#include "bench_ll.hpp"
#include "commands.hpp"
#include "device_memory.hpp"
#include "ext/ep/plan/low_latency_plan.hpp"
#include "node_options.hpp"
#include "number_options.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kMaxRanks = 64, kMaxCalls = 100000;

struct Arguments {
  LowLatencyBenchOptions bench;
  RankOptions ranks;
  NodeOptions nodes;
  std::string platform;
  std::optional<int> rankCount, hidden, topk, experts, calls, iterations;
};

int run(Arguments arguments) {
  LowLatencyBenchOptions& bench = arguments.bench;
  bench.platform = choosePlatform(arguments.platform);
  deviceOfRank(bench.platform, 0);  // complain once, not on every rank
  const bool cuda = bench.platform == Platform::cuda;
  const int gpus = std::max(1, Device::count(bench.platform));
  bench.ranks = arguments.rankCount.value_or(cuda ? gpus : 2);
  bench.hidden = arguments.hidden.value_or(cuda ? 7168 : 1024);
  bench.topk = arguments.topk.value_or(cuda ? 8 : 4);
  bench.experts = arguments.experts.value_or(cuda ? 288 : 32);
  bench.calls = arguments.calls.value_or(cuda ? 20 : 2);
  bench.iterations = arguments.iterations.value_or(cuda ? 40 : 5);
  if (bench.tokens.empty()) {
    bench.tokens = cuda ? std::vector<int>{128, 32, 8, 1} : std::vector<int>{16, 1};
  }
  checkHidden(bench.hidden);
  checkLogfmt(bench.logfmt, bench.combineReduce);
  bench.topology = topologyOf(arguments.nodes, bench.ranks);
  checkTopk(bench.topk, bench.experts);
  if (bench.phases && arguments.nodes.nodes.value_or(1) < 2) {
    throw CLI::ValidationError("--phases",
                               "is about messages between nodes: pass --nodes = 2 or more");
  }
  arguments.ranks.ranks = bench.ranks;
  bench.processes = arguments.ranks.processes;
  return runRanks(arguments.ranks,
                  [&](const RankContext& context) { return runLowLatencyBench(bench, context); });
}

}  // namespace

void addLowLatencyBench(CLI::App& app, const std::vector<std::string>& arguments, Action& action) {
  auto args = std::make_shared<Arguments>();
  args->ranks.arguments = arguments;
  LowLatencyBenchOptions& bench = args->bench;
  CLI::App* command = app.add_subcommand(
      "bench-ll",
      "Times the low-latency dispatch and combine, whole and in halves, and checks them");
  const NumberOptions number(*command);
  number("--ranks", args->rankCount, 1, kMaxRanks,
         "Number of ranks; default: one per GPU, 2 on cpu");
  addNodeOptions(*command, args->nodes);
  command
      ->add_option("--tokens", bench.tokens,
                   "Tokens per rank, a list; default 128,32,8,1, on cpu 16,1")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxLowLatencyTokens).description(""))
      ->type_name("N,...");
  number("--hidden", args->hidden, 8, kMaxLowLatencyHidden,
         "Values per token, a multiple of 8; default 7168, on cpu 1024");
  number("--topk", args->topk, 1, kMaxLowLatencyTopk, "Experts per token; default 8, on cpu 4");
  number("--experts", args->experts, 1, kMaxLowLatencyExperts,
         "Experts of all ranks; default 288, on cpu 32");
  number("--calls", args->calls, 1, kMaxCalls,
         "Calls per timing, on cuda one graph of them; default 20, on cpu 2");
  number("--iterations", args->iterations, 1, kMaxCalls, "Timings; default 40, on cpu 5");
  command->add_option("--sms", bench.numSms, "Blocks per kernel at most; default 0: all")
      ->check(CLI::Range(0, 1024).description(""))
      ->type_name("N");
  command->add_flag("--logfmt", bench.logfmt,
                    "Combine with use_logfmt: sums travel as 10-bit logarithmic values");
  addCombineReduce(*command, bench.combineReduce);
  command->add_option("--seed", bench.seed, "Of routing and contents; any number; default 1")
      ->type_name("N");
  command
      ->add_option("--platform", args->platform,
                   "cpu, or cuda (rank r uses GPU r modulo their number); default: "
                   "MSCCLPP_EP_PLATFORM, else cuda if there is a GPU, else cpu")
      ->check(CLI::IsMember({"cpu", "cuda"}).description(""))
      ->type_name("NAME");
  command->add_flag("--processes", args->ranks.processes,
                    "Ranks are processes; default: threads of one process");
  command->add_flag("--phases", bench.phases,
                    "With --nodes: also where the time goes: kernel, FIFO, proxy, wire; of eager "
                    "calls, one at a time");
  command->add_option("--json", bench.jsonPath, "Also write the results to this file as JSON")
      ->type_name("FILE");
  command->add_flag("--plant-error", bench.plantError, "Expect wrong values in every result")
      ->group("");
  addMember(*command, args->ranks);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace mscclpp::ep::cli
