#include "core/port_suite.hpp"

namespace mscclpp::test {

INSTANTIATE_TEST_SUITE_P(shm, PortSuite,
                         testing::Values(PortSetup{.name = "shm",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::shm},
                                         PortSetup{.name = "shmTinyFifo",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::shm,
                                                   .queueDepth = 2,
                                                   .fifoDepth = 4,
                                                   .fifoPerBlock = false},
                                         PortSetup{.name = "shmThreadsAndWraps",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::shm,
                                                   .threads = 2,
                                                   .fifoDepth = 16,
                                                   .fifoStart = (uint64_t{1} << 32) - 32},
                                         PortSetup{.name = "shmSigned",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::shm,
                                                   .fifoDepth = 8,
                                                   .fifoStart = (uint64_t{1} << 31) - 8,
                                                   .fifoPerBlock = false}),
                         portName);

INSTANTIATE_TEST_SUITE_P(late, PortSuite,
                         testing::Values(PortSetup{.name = "late",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::shm,
                                                   .queueDepth = 8,
                                                   .fifoDepth = 16,
                                                   .late = true}),
                         portName);

INSTANTIATE_TEST_SUITE_P(tcp, PortSuite,
                         testing::Values(PortSetup{.name = "tcp",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::tcp},
                                         PortSetup{.name = "tcpTiny",
                                                   .platform = Platform::cpu,
                                                   .transport = Transport::tcp,
                                                   .queueDepth = 2,
                                                   .fifoDepth = 4,
                                                   .fifoPerBlock = false}),
                         portName);

}  // namespace mscclpp::test
