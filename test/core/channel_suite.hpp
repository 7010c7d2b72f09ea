// The conformance suite of semaphores and memory channels, instantiated for each platform.
#pragma once

#include "core/device_suite.hpp"

namespace mscclpp::test {

class ChannelSuite : public PlatformTest {};

}  // namespace mscclpp::test
