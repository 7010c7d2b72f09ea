// Runs the tests, or, started by one of them, a role.
#include <malloc.h>
#include <signal.h>

#include <cstdlib>
#include <cstring>

#include <gtest/gtest.h>

#include "core/processes.hpp"

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  mallopt(M_PERTURB, 0x5A);  // memory that nobody has written is never zero by luck
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // ranks that share a GPU as threads
  int exitCode = 0;
  if (mscclpp::test::runRole(argc, argv, exitCode)) return exitCode;
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    constexpr const char* kPlatform = "--platform=";
    if (std::strncmp(argv[i], kPlatform, std::strlen(kPlatform)) == 0) {
      setenv("MSCCLPP_TEST_PLATFORM", argv[i] + std::strlen(kPlatform), 1);
    }
  }
  return RUN_ALL_TESTS();
}
