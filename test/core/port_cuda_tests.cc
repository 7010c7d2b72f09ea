#include "core/port_suite.hpp"

namespace mscclpp::test {

INSTANTIATE_TEST_SUITE_P(
    cuda, PortSuite,
    testing::Values(
        PortSetup{.name = "cudaIpc", .platform = Platform::cuda, .transport = Transport::cudaIpc},
        PortSetup{.name = "cudaIpcTiny",
                  .platform = Platform::cuda,
                  .transport = Transport::cudaIpc,
                  .queueDepth = 2,
                  .fifoDepth = 4,
                  .fifoPerBlock = false},
        PortSetup{.name = "cudaIpcThreadsAndWraps",
                  .platform = Platform::cuda,
                  .transport = Transport::cudaIpc,
                  .threads = 2,
                  .fifoDepth = 16,
                  .fifoStart = (uint64_t{1} << 32) - 32},
        PortSetup{.name = "tcp", .platform = Platform::cuda, .transport = Transport::tcp}),
    portName);

}  // namespace mscclpp::test
