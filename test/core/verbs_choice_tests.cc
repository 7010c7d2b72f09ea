// Decisions of the transport verbs that need no device.
#include <cstring>
#include <optional>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"
#include "core/transport/verbs/choice.hpp"
#include "core/transport/verbs/event_log.hpp"
#include "core/transport/verbs/library.hpp"
#include "core/verbs_world.hpp"

namespace mscclpp::test {
namespace {

using namespace transport::verbs;  // NOLINT: the names under test

ibv_gid_entry entry(uint32_t index, uint32_t type, const std::string& address, uint32_t port = 1) {
  ibv_gid_entry result{};
  result.gid = parseWanted(address).address.value();
  result.gid_index = index;
  result.port_num = port;
  result.gid_type = type;
  return result;
}

TEST(VerbsChoice, InterfaceNamesDevicePortOrAddress) {
  EXPECT_EQ(parseWanted("").name, "");
  EXPECT_EQ(parseWanted("mlx5_0").name, "mlx5_0");
  EXPECT_EQ(parseWanted("mlx5_0").port, 0);
  EXPECT_EQ(parseWanted("mlx5_3:2").name, "mlx5_3");
  EXPECT_EQ(parseWanted("mlx5_3:2").port, 2);
  EXPECT_EQ(gidText(parseWanted("10.9.0.1").address.value()), "10.9.0.1");
  EXPECT_EQ(gidText(parseWanted("fe80::12").address.value()), "fe80::12");
  for (const char* bad : {"mlx5_0:", "mlx5_0:0", "mlx5_0:256", "mlx5_0:1x"}) {
    expectError(ErrorCode::invalidArgument, {bad, "mlx5_0:1"}, [&] { parseWanted(bad); });
  }
}

TEST(VerbsChoice, RoceAddressIsFoundByTypeNotByPlace) {
  const std::vector<ibv_gid_entry> table{
      entry(0, IBV_GID_TYPE_ROCE_V1, "fe80::1"),     entry(1, IBV_GID_TYPE_ROCE_V2, "fe80::1"),
      entry(2, IBV_GID_TYPE_ROCE_V1, "10.0.0.1"),    entry(3, IBV_GID_TYPE_ROCE_V2, "169.254.0.9"),
      entry(4, IBV_GID_TYPE_ROCE_V2, "2001:db8::1"), entry(5, IBV_GID_TYPE_ROCE_V2, "10.0.0.1"),
      entry(6, IBV_GID_TYPE_ROCE_V2, "10.1.0.1"),    entry(7, IBV_GID_TYPE_ROCE_V2, "10.0.0.7", 2),
      entry(8, IBV_GID_TYPE_IB, "fe80::2"),
  };
  const auto index = [&](size_t entries, int port, const char* address) {
    const auto wanted = address == nullptr ? std::nullopt : parseWanted(address).address;
    const auto* found = chooseGid(std::span(table).first(entries), port, true, wanted);
    return found == nullptr ? -1 : static_cast<int>(found->gid_index);
  };
  EXPECT_EQ(index(9, 1, nullptr), 5);
  EXPECT_EQ(index(9, 2, nullptr), 7);
  EXPECT_EQ(index(9, 3, nullptr), -1);
  EXPECT_EQ(index(1, 1, nullptr), -1);  // RoCE v1 only
  EXPECT_EQ(index(3, 1, nullptr), 1);   // link-local, but nothing else there
  EXPECT_EQ(index(5, 1, nullptr), 4);
  EXPECT_EQ(index(9, 1, "10.1.0.1"), 6);
  EXPECT_EQ(index(9, 1, "10.0.0.2"), -1);
  EXPECT_EQ(chooseGid(table, 1, false, std::nullopt)->gid_index, 8U);
}

TEST(VerbsChoice, NearIsManyCommonFolders) {
  const std::string gpu = "/sys/devices/pci0000:16/0000:16:01.0/0000:17:00.0/0000:18:00.0";
  const auto common = [&](const char* nic) { return commonFolders(gpu, nic); };
  const int sameSwitch = common("/sys/devices/pci0000:16/0000:16:01.0/0000:17:00.0/0000:19:00.0");
  const int sameRoot = common("/sys/devices/pci0000:16/0000:16:02.0/0000:1a:00.0");
  const int otherRoot = common("/sys/devices/pci0000:97/0000:97:01.0/0000:98:00.0");
  EXPECT_GT(sameSwitch, sameRoot);
  EXPECT_GT(sameRoot, otherRoot);
  EXPECT_GT(otherRoot, common(""));
}

TEST(VerbsChoice, NumaDistancesAreFoundInTheirLine) {
  EXPECT_EQ(numaDistanceIn("10 21 31", 0), 10);
  EXPECT_EQ(numaDistanceIn("10 21 31", 2), 31);
  EXPECT_EQ(numaDistanceIn("10 21 31", 3), std::nullopt);
  EXPECT_EQ(numaDistanceIn("10", -1), std::nullopt);
  EXPECT_EQ(numaDistanceIn("", 0), std::nullopt);
}

TEST(VerbsChoice, EventsMeanWhatTheyAreAbout) {
  EventLog log;
  ibv_qp pair{};
  pair.qp_num = 17;
  ibv_async_event event{};
  event.event_type = IBV_EVENT_QP_FATAL;
  event.element.qp = &pair;
  log.note(event, 1, "queue pair error");
  EXPECT_EQ(log.failureOf(17), "queue pair 17 reported: queue pair error");
  EXPECT_EQ(log.failureOf(18), "");
  log.forget(17);
  EXPECT_EQ(log.failureOf(17), "");

  event.event_type = IBV_EVENT_PORT_ERR;
  event.element.port_num = 2;
  log.note(event, 1, "port error");
  EXPECT_EQ(log.portTrouble(), "");
  event.element.port_num = 1;
  log.note(event, 1, "port error");
  EXPECT_EQ(log.portTrouble(), "port error");
  EXPECT_EQ(log.failureOf(17), "");
  event.event_type = IBV_EVENT_PORT_ACTIVE;
  log.note(event, 1, "port active");
  EXPECT_EQ(log.portTrouble(), "");

  event.event_type = IBV_EVENT_DEVICE_FATAL;
  log.note(event, 1, "fatal");
  EXPECT_EQ(log.failureOf(17), "the device reported: fatal");
  EXPECT_EQ(log.count(), 5U);
}

TEST(VerbsChoice, MissingLibraryIsNamed) {
  expectError(ErrorCode::unsupported, {"libnotthere.so.9", "install rdma-core"},
              [] { loadLibrary("libnotthere.so.9"); });
  expectError(ErrorCode::unsupported, {"libc.so.6 has no ibv_get_device_list"},
              [] { loadLibrary("libc.so.6"); });
}

TEST(VerbsChoice, MissingDeviceIsNamed) {
  const std::string reason = whyNoVerbs();
  if (reason.empty()) GTEST_SKIP() << "there is a device";
  EXPECT_FALSE(verbsRequired()) << reason;
  EXPECT_NE(reason.find("transport verbs: "), std::string::npos) << reason;
}

}  // namespace
}  // namespace mscclpp::test
