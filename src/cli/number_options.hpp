#pragma once

#include <optional>
#include <string>

#include <CLI/CLI.hpp>

/// Options that are whole numbers, and options and checks of shapes that commands share.
namespace mscclpp::ep::cli {

/// Adds such options to a command; the help text ends with what is allowed.
class NumberOptions {
 public:
  explicit NumberOptions(CLI::App& command) : command_(command) {}
  /// The value it has is the default, which the help text says too.
  void operator()(const char* name, int& value, int least, int most, const std::string& help) const;
  /// The help text says itself what the default is.
  void operator()(const char* name, std::optional<int>& value, int least, int most,
                  const std::string& help) const;

 private:
  CLI::App& command_;
};

/// --combine-reduce of the low-latency commands: "rank" or "source".
void addCombineReduce(CLI::App& command, std::string& reduce);

/// @throws CLI::ValidationError that names the option and what is allowed.
void checkHidden(int hidden);
/// Only sums travel so.
void checkLogfmt(bool logfmt, const std::string& reduce);
void checkTopk(int topk, int experts);
void checkExpertsPerRank(int experts, int ranks);

}  // namespace mscclpp::ep::cli
