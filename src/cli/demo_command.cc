#include <fstream>
#include <iterator>
#include <memory>

#include <mscclpp/format.hpp>

#include "commands.hpp"
#include "default_text.hpp"
#include "demo.hpp"
#include "device_memory.hpp"
#include "node_options.hpp"
#include "number_options.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kMaxRanks = 64, kMaxTokens = 1 << 20, kMaxHidden = 65536, kMaxTopk = 32;
constexpr int kMaxExperts = 4096, kMaxSms = 1024, kMaxIterations = 1000000;

struct DemoArguments {
  DemoOptions demo;
  RankOptions ranks;
  std::string dtype = "bf16";
  std::string transport;
  std::string platform;
};

std::string readText(const std::string& path) {
  if (path.empty()) return std::string(defaultText());
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.good() && !file.eof()) {
    throw CLI::ValidationError("--text", fmt::format("cannot read {}", path));
  }
  if (text.empty()) {
    throw CLI::ValidationError("--text",
                               fmt::format("{} is empty: at least 1 byte is needed", path));
  }
  return text;
}

int runDemo(DemoArguments arguments) {
  ModelShape& shape = arguments.demo.shape;
  checkHidden(shape.hidden);
  checkExpertsPerRank(shape.experts, shape.ranks);
  ranksPerNode(shape.ranks, shape.nodes);  // complains
  if (!arguments.transport.empty()) arguments.demo.transport = parseTransport(arguments.transport);
  checkTopk(shape.topk, shape.experts);
  if (arguments.demo.plantErrorRank >= shape.ranks) {
    throw CLI::ValidationError("--plant-error", fmt::format("ranks are 0 to {}", shape.ranks - 1));
  }
  shape.fp8 = arguments.dtype == "fp8";
  arguments.demo.text = readText(arguments.demo.textPath);
  arguments.demo.platform = choosePlatform(arguments.platform);
  arguments.ranks.ranks = shape.ranks;
  deviceOfRank(arguments.demo.platform, 0);  // complain once, not on every rank
  const bool processes = arguments.ranks.processes;
  return runRanks(arguments.ranks, [&](const RankContext& context) {
    return runDemoRank(arguments.demo, context, processes);
  });
}

}  // namespace

void addDemo(CLI::App& app, const std::vector<std::string>& arguments, Action& action) {
  auto args = std::make_shared<DemoArguments>();
  args->ranks.arguments = arguments;
  DemoOptions& demo = args->demo;
  ModelShape& shape = demo.shape;
  CLI::App* command = app.add_subcommand(
      "demo",
      "Runs a mixture-of-experts layer over a text on several ranks and checks every value");
  const NumberOptions number(*command);
  command
      ->add_option("--text", demo.textPath,
                   "Text file to read; default: the one built in, data/demo.txt of the sources")
      ->check(CLI::ExistingFile.description(""))
      ->type_name("FILE");
  number("--ranks", shape.ranks, 1, kMaxRanks, "Number of ranks");
  number("--nodes", shape.nodes, 1, kMaxRanks,
         "Nodes that the ranks play on this host: between them, proxies carry the data");
  addTransportOption(*command, args->transport);
  number("--tokens", shape.tokens, 0, kMaxTokens,
         "Tokens per rank and iteration; a token is a byte of the text");
  number("--hidden", shape.hidden, 8, kMaxHidden, "Values per token, a multiple of 8");
  number("--topk", shape.topk, 1, kMaxTopk, "Experts per token, at most");
  number("--experts", shape.experts, 1, kMaxExperts,
         "Experts of all ranks, divisible by the ranks");
  command
      ->add_option(
          "--dtype", args->dtype,
          "What is dispatched: bf16, or fp8 (e4m3, one fp32 scale per 128 values); default bf16")
      ->check(CLI::IsMember({"bf16", "fp8"}).description(""))
      ->type_name("NAME");
  command
      ->add_option("--platform", args->platform,
                   "cpu, or cuda (rank r uses GPU r modulo their number); default: "
                   "MSCCLPP_EP_PLATFORM, else cuda if there is a GPU, else cpu")
      ->check(CLI::IsMember({"cpu", "cuda"}).description(""))
      ->type_name("NAME");
  command->add_flag("--processes", args->ranks.processes,
                    "Ranks are processes; default: threads of one process");
  number("--sms", demo.sms, 1, kMaxSms, "Blocks per communication kernel, on cpu at most 4");
  command
      ->add_option("--seed", shape.seed, "Of embeddings, router and experts; any number; default 1")
      ->type_name("N");
  number("--iterations", demo.iterations, 1, kMaxIterations,
         "Times the layer runs, each on the next piece of the text");
  command->add_option("--plant-error", demo.plantErrorRank, "This rank's experts make one error")
      ->check(CLI::Range(0, kMaxRanks))
      ->group("");
  addMember(*command, args->ranks);
  command->callback([args, &action] { action = [args] { return runDemo(*args); }; });
}

}  // namespace mscclpp::ep::cli
