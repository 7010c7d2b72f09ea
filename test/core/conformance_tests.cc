// The transports that the conformance suite runs on.
#include "core/connection_suite.hpp"
#include "core/fake_connection.hpp"
#include "core/transport/tcp/tcp_endpoint.hpp"

namespace mscclpp::test {

const ConnectionInstance& kShm =
    addInstance({.name = "shm",
                 .transport = Transport::shm,
                 .expected = {.oneSidedWrites = true, .oneSidedAtomics = true}});
INSTANTIATE_TEST_SUITE_P(shm, ConnectionSuite, testing::Values("shm"), instancePlatform);

const ConnectionInstance& kTcp = addInstance(
    {.name = "tcp", .transport = Transport::tcp, .options = {.interface = "lo"}, .expected = {}});
INSTANTIATE_TEST_SUITE_P(tcp, ConnectionSuite, testing::Values("tcp"), instancePlatform);

/// The way of GPU memory, through pinned memory and copies on a stream, without a GPU.
const ConnectionInstance& kTcpStaged =
    addInstance({.name = "tcp_staged",
                 .transport = Transport::tcp,
                 .expected = {},
                 .create = [](std::shared_ptr<Device> device, const EndpointOptions& options) {
                   return std::make_shared<transport::tcp::TcpEndpoint>(
                       std::move(device), options, transport::tcp::StagingUse::always);
                 }});
INSTANTIATE_TEST_SUITE_P(tcp_staged, ConnectionSuite, testing::Values("tcp_staged"),
                         instancePlatform);

const ConnectionInstance& kFake = addInstance(
    {.name = "fake",
     .transport = Transport::shm,
     .expected = {},
     .create = [](std::shared_ptr<Device> device, const EndpointOptions& options) {
       return std::make_shared<FakeEndpoint>(std::move(device), options, FakeBehaviour{});
     }});
INSTANTIATE_TEST_SUITE_P(fake, ConnectionSuite, testing::Values("fake"), instancePlatform);

}  // namespace mscclpp::test
