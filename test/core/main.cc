// Runs the tests, or, started by one of them, a role.
#include <signal.h>
#include <stdlib.h>

#include <gtest/gtest.h>

#include "core/processes.hpp"

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);  // a child that died is an error of the test, not the test's end
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // ranks that share a GPU as threads
  setenv("CUDA_DEVICE_MAX_COPY_CONNECTIONS", "32", 0);
  int exitCode = 0;
  if (mscclpp::test::runRole(argc, argv, exitCode)) return exitCode;
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
