// Runs the tests, or, started by one of them, a role. --platform=NAME, and --ranks-per-node=N and
// --transport=NAME for groups that do not say themselves what their nodes are.
#include <malloc.h>
#include <signal.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include <gtest/gtest.h>

#include "core/processes.hpp"

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  mallopt(M_PERTURB, 0x5A);  // memory that nobody has written is never zero by luck
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // ranks that share a GPU as threads
  setenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", "32", 0);
  int exitCode = 0;
  if (mscclpp::test::runRole(argc, argv, exitCode)) return exitCode;
  testing::InitGoogleTest(&argc, argv);
  constexpr std::pair<const char*, const char*> kArguments[] = {
      {"--platform=", "MSCCLPP_TEST_PLATFORM"},
      {"--ranks-per-node=", "MSCCLPP_EP_RANKS_PER_NODE"},
      {"--transport=", "MSCCLPP_EP_TRANSPORT"}};
  for (int i = 1; i < argc; ++i) {
    for (const auto& [argument, variable] : kArguments) {
      const std::size_t length = std::strlen(argument);
      if (std::strncmp(argv[i], argument, length) == 0) setenv(variable, argv[i] + length, 1);
    }
  }
  return RUN_ALL_TESTS();
}
