// The conformance suite over transports with GPU memory.
#include "core/connection_suite.hpp"

namespace mscclpp::test {

const ConnectionInstance& kTcp = addInstance({.name = "tcp",
                                              .transport = Transport::tcp,
                                              .platform = Platform::cuda,
                                              .options = {.interface = "lo"},
                                              .expected = {.deviceMemory = true},
                                              .requiredInCi = false});
INSTANTIATE_TEST_SUITE_P(tcp, ConnectionSuite, testing::Values("tcp"), instancePlatform);

}  // namespace mscclpp::test
