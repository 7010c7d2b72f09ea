// UniqueId, its secret, and the network interfaces.
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/bootstrap/rendezvous.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using detail::Rendezvous;
using test::expectError;
using test::kLongTimeout;
using test::runRanks;

TEST(UniqueId, TextRoundTrip) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  const std::string text = id.toString();
  EXPECT_EQ(text.size(), 256u);
  EXPECT_EQ(UniqueId::fromString(text), id);
  std::string upper = text;
  for (char& c : upper) c = static_cast<char>(toupper(c));
  EXPECT_EQ(UniqueId::fromString(upper), id);
}

TEST(UniqueId, RefusesTextThatIsNoId) {
  const std::string good = TcpBootstrap::createUniqueId().toString();
  expectError(ErrorCode::invalidArgument, {"256", "255 characters"},
              [&] { UniqueId::fromString(good.substr(1)); });
  std::string letter = good;
  letter[7] = 'x';
  expectError(ErrorCode::invalidArgument, {"'x'"}, [&] { UniqueId::fromString(letter); });
  expectError(ErrorCode::invalidArgument, {"no UniqueId"},
              [&] { UniqueId::fromString(std::string(256, '0')); });
  std::string family = good;  // the kind of the first address
  family[2 * 23] = '0';
  family[2 * 23 + 1] = '5';
  expectError(ErrorCode::invalidArgument, {"unknown kind 5"},
              [&] { UniqueId::fromString(family); });
}

TEST(UniqueId, HoldsSecretPortAndBothKindsOfAddress) {
  Rendezvous from;
  for (size_t i = 0; i < from.secret.size(); ++i) from.secret[i] = static_cast<uint8_t>(i * 3);
  from.port = 54321;
  from.addresses = detail::localAddresses("127.0.0.1");
  detail::SocketAddress v6;
  auto* in6 = reinterpret_cast<sockaddr_in6*>(&v6.storage);
  in6->sin6_family = AF_INET6;
  in6->sin6_addr = in6addr_loopback;
  v6.length = sizeof(sockaddr_in6);
  from.addresses.push_back(v6);
  const Rendezvous to = Rendezvous::decode(from.encode());
  EXPECT_EQ(to.secret, from.secret);
  EXPECT_EQ(to.port, 54321);
  ASSERT_EQ(to.addresses.size(), 2u);
  EXPECT_EQ(to.addresses[0].toString(), "127.0.0.1:54321");
  EXPECT_EQ(to.addresses[1].toString(), "[::1]:54321");
}

TEST(UniqueId, SecretsDiffer) {
  const auto first = Rendezvous::decode(TcpBootstrap::createUniqueId()).secret;
  const auto second = Rendezvous::decode(TcpBootstrap::createUniqueId()).secret;
  EXPECT_FALSE(detail::sameSecret(first, second));
  EXPECT_TRUE(detail::sameSecret(first, first));
  auto changed = first;
  changed.back() = static_cast<uint8_t>(changed.back() ^ 1);
  EXPECT_FALSE(detail::sameSecret(first, changed));
}

/// The id of the same place with another secret.
UniqueId withWrongSecret(const UniqueId& id) {
  Rendezvous other = Rendezvous::decode(id);
  other.secret[15] = static_cast<uint8_t>(other.secret[15] ^ 1);
  return other.encode();
}

TEST(Secret, APeerWithAWrongOneIsRefusedAndTheGroupGoesOn) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  log::setLevel(LogLevel::off);
  runRanks(2, [&](int rank) {
    if (rank == 1) {
      // Rank 0 is not complete yet: an accepted stranger would take the place of rank 1.
      expectError(ErrorCode::invalidArgument,
                  {"closed the connection on the hello", "another group"},
                  [&] { TcpBootstrap(1, 2, withWrongSecret(id), kLongTimeout); });
    }
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    group.barrier();
  });
  log::setLevel(LogLevel::warn);
}

int connectTo(uint16_t port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    throw SystemError(errno, "connect");
  }
  return fd;
}

TEST(Secret, IsCheckedBeforeAnythingElseIsRead) {
  const UniqueId id = TcpBootstrap::createUniqueId("127.0.0.1");
  const uint16_t port = Rendezvous::decode(id).port;
  log::setLevel(LogLevel::off);
  runRanks(2, [&](int rank) {
    if (rank == 1) {
      // 16 wrong bytes are enough to be thrown out: nothing after them was waited for.
      const int fd = connectTo(port);
      const std::string garbage = "GET / HTTP/1.1\r\n";
      ASSERT_EQ(garbage.size(), detail::kSecretBytes);
      ASSERT_EQ(::send(fd, garbage.data(), garbage.size(), MSG_NOSIGNAL),
                static_cast<ssize_t>(garbage.size()));
      const timeval patience{60, 0};
      ASSERT_EQ(::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)), 0);
      char byte = 0;
      errno = 0;
      EXPECT_LE(::recv(fd, &byte, 1, 0), 0) << "the root answered a stranger";
      EXPECT_NE(errno, EAGAIN) << "the root waited for more before it checked the secret";
      ::close(fd);
      // A silent one and one that goes away at once do no harm either.
      ::close(connectTo(port));
    }
    const int silent = rank == 1 ? connectTo(port) : -1;
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    group.barrier();
    if (silent >= 0) ::close(silent);
  });
  log::setLevel(LogLevel::warn);
}

TEST(Secret, IsNeverLogged) {
  log::setLevel(LogLevel::trace);
  testing::internal::CaptureStderr();
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::string errors;
  runRanks(2, [&](int rank) {
    if (rank == 1) {
      try {
        TcpBootstrap(1, 2, withWrongSecret(id), kLongTimeout);
      } catch (const Error& error) {
        errors += error.what();
      }
    }
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    group.barrier();
  });
  const std::string text = testing::internal::GetCapturedStderr() + errors;
  log::setLevel(LogLevel::warn);
  EXPECT_NE(text.find("wrong secret"), std::string::npos) << "nothing was logged at all: " << text;
  const std::string hex = id.toString().substr(2 * 4, 2 * detail::kSecretBytes);
  EXPECT_EQ(text.find(hex.substr(0, 12)), std::string::npos) << text;
}

// --- interfaces ----------------------------------------------------------------------------------

void joinOver(const std::string& interface) {
  const UniqueId id = TcpBootstrap::createUniqueId(interface);
  runRanks(3, [&](int rank) {
    TcpBootstrap group(rank, 3, id, kLongTimeout);
    group.barrier();
  });
}

TEST(Interfaces, LoopbackByNameAndAddress) {
  joinOver("lo");
  joinOver("127.0.0.1");
}

TEST(Interfaces, Ipv6) {
  try {
    static_cast<void>(detail::localAddresses("::1"));
  } catch (const Error& error) {
    GTEST_SKIP() << "no IPv6 on this machine: " << error.what();
  }
  joinOver("::1");
}

TEST(Interfaces, AChosenInterfaceIsTheOnlyOneListenedOn) {
  const Rendezvous chosen = Rendezvous::decode(TcpBootstrap::createUniqueId("lo"));
  ASSERT_EQ(chosen.addresses.size(), 1u);
  EXPECT_EQ(chosen.addresses[0].toString(), fmt::format("127.0.0.1:{}", chosen.port));
}

TEST(Interfaces, AnUnknownOneIsAnErrorThatListsTheOthers) {
  expectError(ErrorCode::invalidArgument, {"'eth99'", "lo"},
              [] { TcpBootstrap::createUniqueId("eth99"); });
}

/// A network of its own in which only loopback exists.
void enterLoopbackOnlyNetwork() {
  if (::unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0 && ::unshare(CLONE_NEWNET) != 0) {
    throw SystemError(errno, "unshare");
  }
  const int fd = ::socket(AF_INET, SOCK_DGRAM, 0);
  ifreq request{};
  std::strcpy(request.ifr_name, "lo");
  request.ifr_flags = IFF_UP | IFF_RUNNING | IFF_LOOPBACK;
  if (::ioctl(fd, SIOCSIFFLAGS, &request) != 0) throw SystemError(errno, "lo up");
  ::close(fd);
}

const test::RoleRegistration kLoopbackOnly("loopback-only", [](const auto&) {
  try {
    enterLoopbackOnlyNetwork();
  } catch (const Error& error) {
    test::tellParent(std::string("skip ") + error.what());
    return 0;
  }
  const UniqueId id = TcpBootstrap::createUniqueId();
  const auto failures = test::failuresOfRanks(4, [&](int rank) {
    TcpBootstrap group(rank, 4, id, kLongTimeout);
    group.barrier();
  });
  for (const auto& text : failures) {
    if (!text.empty()) throw Error(ErrorCode::internal, text);
  }
  test::tellParent("addresses " + Rendezvous::decode(id).addresses.front().toString());
  return 0;
});

TEST(InterfacesProcess, AMachineWithOnlyLoopbackWorks) {
  test::Child child("loopback-only", {}, {"MSCCLPP_SOCKET_INTERFACE="});
  const std::string said = child.hear();
  if (said.starts_with("skip")) GTEST_SKIP() << "no network namespace can be made here: " << said;
  EXPECT_TRUE(said.starts_with("addresses 127.0.0.1:")) << said;
  EXPECT_EQ(child.wait(), 0);
}

const test::RoleRegistration kChosenByVariable("chosen-by-variable", [](const auto&) {
  test::tellParent(Rendezvous::decode(TcpBootstrap::createUniqueId()).addresses.front().toString());
  return 0;
});

TEST(InterfacesProcess, TheVariableChoosesTheInterface) {
  test::Child child("chosen-by-variable", {}, {"MSCCLPP_SOCKET_INTERFACE=lo"});
  EXPECT_TRUE(child.hear().starts_with("127.0.0.1:"));
}

}  // namespace
}  // namespace mscclpp
