#include <algorithm>
#include <memory>
#include <optional>

#include <mscclpp/format.hpp>

#include "bench.hpp"
#include "commands.hpp"
#include "device_memory.hpp"
#include "node_options.hpp"
#include "number_options.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kMaxRanks = 64, kMaxTokens = 1 << 20, kMaxHidden = 65536, kMaxTopk = 32;
constexpr int kMaxExperts = 4096, kMaxBlocks = 1024, kMaxCalls = 1000000;

/// Options that have another default on each platform.
struct Defaults {
  int ranks, tokens, hidden, topk, experts, warmup, iterations;
  std::vector<int> blocks;
};

Defaults defaultsOf(Platform platform) {
  if (platform == Platform::cpu) return {4, 64, 1024, 4, 32, 1, 5, {1, 2, 4}};
  const int gpus = std::max(1, Device::count(platform));
  return {gpus, 4096, 7168, 8, 256, 5, 30, {4, 8, 12, 16, 20, 24, 32}};
}

struct BenchArguments {
  BenchOptions bench;
  RankOptions ranks;
  NodeOptions nodes;
  std::string platform;
  std::optional<int> rankCount, tokens, hidden, topk, experts, warmup, iterations;
  std::vector<std::string> cases;
};

std::vector<std::string> caseNames() {
  std::vector<std::string> names;
  for (int i = 0; i < kBenchCases; ++i) names.emplace_back(nameOf(static_cast<BenchCase>(i)));
  return names;
}

void applyDefaults(BenchArguments& arguments) {
  BenchOptions& bench = arguments.bench;
  const Defaults defaults = defaultsOf(bench.platform);
  bench.ranks = arguments.rankCount.value_or(defaults.ranks);
  bench.tokens = arguments.tokens.value_or(defaults.tokens);
  bench.hidden = arguments.hidden.value_or(defaults.hidden);
  bench.topk = arguments.topk.value_or(defaults.topk);
  bench.experts = arguments.experts.value_or(defaults.experts);
  bench.warmup = arguments.warmup.value_or(defaults.warmup);
  bench.iterations = arguments.iterations.value_or(defaults.iterations);
  if (bench.blocks.empty()) bench.blocks = defaults.blocks;
  const std::vector<std::string> names = caseNames();
  for (const std::string& name : arguments.cases.empty() ? names : arguments.cases) {
    const auto at = std::find(names.begin(), names.end(), name) - names.begin();
    bench.cases.push_back(static_cast<BenchCase>(at));
  }
}

void checkShape(const BenchOptions& bench) {
  checkHidden(bench.hidden);
  checkExpertsPerRank(bench.experts, bench.ranks);
  checkTopk(bench.topk, bench.experts);
}

int runBench(BenchArguments arguments) {
  BenchOptions& bench = arguments.bench;
  bench.platform = choosePlatform(arguments.platform);
  deviceOfRank(bench.platform, 0);  // complain once, not on every rank
  applyDefaults(arguments);
  checkShape(bench);
  bench.topology = topologyOf(arguments.nodes, bench.ranks);
  arguments.ranks.ranks = bench.ranks;
  bench.processes = arguments.ranks.processes;
  return runRanks(arguments.ranks,
                  [&](const RankContext& context) { return runBenchRank(bench, context); });
}

}  // namespace

void addBench(CLI::App& app, const std::vector<std::string>& arguments, Action& action) {
  auto args = std::make_shared<BenchArguments>();
  args->ranks.arguments = arguments;
  BenchOptions& bench = args->bench;
  CLI::App* command = app.add_subcommand(
      "bench",
      "Times dispatch and combine against a plain copy of the same rows, between nodes against the "
      "bare transport, and checks them");
  const NumberOptions number(*command);
  number("--ranks", args->rankCount, 1, kMaxRanks,
         "Number of ranks; default: one per GPU, 4 on cpu");
  addNodeOptions(*command, args->nodes);
  number("--tokens", args->tokens, 1, kMaxTokens, "Tokens per rank; default 4096, on cpu 64");
  number("--hidden", args->hidden, 8, kMaxHidden,
         "Values per token, a multiple of 8; default 7168, on cpu 1024");
  number("--topk", args->topk, 1, kMaxTopk, "Experts per token; default 8, on cpu 4");
  number("--experts", args->experts, 1, kMaxExperts,
         "Experts of all ranks, divisible by the ranks; default 256, on cpu 32");
  command
      ->add_option(
          "--blocks", bench.blocks,
          "Blocks per kernel, a list such as 8,16; default 4,8,12,16,20,24,32, on cpu 1,2,4")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxBlocks).description(""))
      ->type_name("N,...");
  command
      ->add_option("--cases", args->cases,
                   "What is timed, a list; default: all of dispatch-bf16, dispatch-fp8, "
                   "dispatch-uncached, combine-pool, combine-plain, layout")
      ->delimiter(',')
      ->check(CLI::IsMember(caseNames()).description(""))
      ->type_name("NAME,...");
  number("--warmup", args->warmup, 0, kMaxCalls,
         "Calls before those that count; default 5, on cpu 1");
  number("--iterations", args->iterations, 1, kMaxCalls, "Calls that count; default 30, on cpu 5");
  command->add_flag(
      "--flush", bench.flush,
      "Before every call: overwrite 256 MiB and align the ranks, outside the timed part");
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
  command->add_option("--json", bench.jsonPath, "Also write the results to this file as JSON")
      ->type_name("FILE");
  command->add_flag("--plant-error", bench.plantError, "Expect a wrong byte in every result")
      ->group("");
  addMember(*command, args->ranks);
  command->callback([args, &action] { action = [args] { return runBench(*args); }; });
}

}  // namespace mscclpp::ep::cli
