#include "core/channel_suite.hpp"

namespace mscclpp::test {
INSTANTIATE_TEST_SUITE_P(Platforms, ChannelSuite, testing::Values(Platform::cpu), platformName);
}  // namespace mscclpp::test
