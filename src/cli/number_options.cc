#include "number_options.hpp"

#include <mscclpp/format.hpp>

namespace mscclpp::ep::cli {
namespace {

void limit(CLI::Option& option, int least, int most) {
  option.check(CLI::Range(least, most).description(""))->type_name("N");
}

}  // namespace

void NumberOptions::operator()(const char* name, int& value, int least, int most,
                               const std::string& help) const {
  limit(*command_.add_option(name, value,
                             fmt::format("{}; {} to {}; default {}", help, least, most, value)),
        least, most);
}
void NumberOptions::operator()(const char* name, std::optional<int>& value, int least, int most,
                               const std::string& help) const {
  limit(*command_.add_option(name, value, fmt::format("{}; {} to {}", help, least, most)), least,
        most);
}

void addCombineReduce(CLI::App& command, std::string& reduce) {
  command
      .add_option(
          "--combine-reduce", reduce,
          "Where a token's rows are added: rank (of the experts: fewest bytes) or source (its "
          "home: rounded once); default rank")
      ->check(CLI::IsMember({"rank", "source"}).description(""))
      ->type_name("NAME");
}

void checkLogfmt(bool logfmt, const std::string& reduce) {
  if (!logfmt || reduce == "rank") return;
  throw CLI::ValidationError("--logfmt", "needs --combine-reduce rank: only sums travel so");
}
void checkHidden(int hidden) {
  if (hidden % 8 == 0) return;
  throw CLI::ValidationError("--hidden", fmt::format("{} is not a multiple of 8", hidden));
}
void checkTopk(int topk, int experts) {
  if (topk <= experts) return;
  throw CLI::ValidationError(
      "--topk", fmt::format("{} is more than the {} experts (--experts)", topk, experts));
}
void checkExpertsPerRank(int experts, int ranks) {
  if (experts % ranks == 0) return;
  throw CLI::ValidationError(
      "--experts",
      fmt::format("{} is not divisible by the {} ranks (--ranks): allowed are {}, {}, ...", experts,
                  ranks, ranks, 2 * ranks));
}

}  // namespace mscclpp::ep::cli
