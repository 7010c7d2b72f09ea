// The transports that the conformance suite runs on.
#include "core/connection_suite.hpp"
#include "core/fake_connection.hpp"
#include "core/transport/tcp/tcp_endpoint.hpp"
#ifdef MSCCLPP_HAVE_VERBS
#include "core/transport/verbs/verbs_endpoint.hpp"
#endif

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

#ifdef MSCCLPP_HAVE_VERBS
// Skipped where there is no RDMA device; tools/rxe_vm has two of them, and ranks take turns.
using transport::verbs::Tuning;
using transport::verbs::VerbsEndpoint;

const ConnectionInstance& kVerbs =
    addInstance({.name = "verbs",
                 .transport = Transport::verbs,
                 .expected = {.oneSidedWrites = true, .oneSidedAtomics = true},
                 .requiredInCi = false});
INSTANTIATE_TEST_SUITE_P(verbs, ConnectionSuite, testing::Values("verbs"), instancePlatform);

/// Writes from 16 KiB on go round three queue pairs; adds wait for all of them.
const ConnectionInstance& kVerbsStriped =
    addInstance({.name = "verbs_striped",
                 .transport = Transport::verbs,
                 .options = {.queuePairs = 3},
                 .expected = {.oneSidedWrites = true, .oneSidedAtomics = true},
                 .requiredInCi = false,
                 .create = [](std::shared_ptr<Device> device, const EndpointOptions& options) {
                   return std::make_shared<VerbsEndpoint>(std::move(device), options,
                                                          Tuning{.stripeBytes = 16384});
                 }});
INSTANTIATE_TEST_SUITE_P(verbs_striped, ConnectionSuite, testing::Values("verbs_striped"),
                         instancePlatform);

/// As with NICs that have no atomics.
const ConnectionInstance& kVerbsCpuAdds =
    addInstance({.name = "verbs_cpu_adds",
                 .transport = Transport::verbs,
                 .expected = {.oneSidedWrites = true},
                 .requiredInCi = false,
                 .create = [](std::shared_ptr<Device> device, const EndpointOptions& options) {
                   return std::make_shared<VerbsEndpoint>(std::move(device), options,
                                                          Tuning{.hardwareAtomics = false});
                 }});
INSTANTIATE_TEST_SUITE_P(verbs_cpu_adds, ConnectionSuite, testing::Values("verbs_cpu_adds"),
                         instancePlatform);
#endif

}  // namespace mscclpp::test
