#include "core/transport/peer_process.hpp"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include <mscclpp/errors.hpp>

#include "core/platform/allocations.hpp"

namespace mscclpp::transport {

namespace {

constexpr std::chrono::milliseconds kLookEvery(2);
constexpr size_t kGoodbyeBytes = 64;

uint32_t* goodbyeWord(const RegisteredMemory& memory) {
  return reinterpret_cast<uint32_t*>(memory.data());
}

}  // namespace

PeerProcess::PeerProcess(int ownRank) : rank_(ownRank) {
  const auto cpu = Device::open(Platform::cpu);
  own_ = RegisteredMemory(cpu, cpu->allocateExportable(kGoodbyeBytes), kGoodbyeBytes);
}

PeerProcess::~PeerProcess() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

PeerProcess::Address PeerProcess::address() const {
  return {.goodbye = own_.handle(), .rank = rank_, .reserved = 0};
}

void PeerProcess::connect(const Address& theirs) {
  theirs_ = RegisteredMemory::import(own_.device(), theirs.goodbye);
  theirRank_ = theirs.rank;
  pid_ = theirs.goodbye.pid;
  const detail::ProcessToken self = detail::processToken();
  if (self == detail::ProcessToken{pid_, theirs.goodbye.processRandom}) return;
  descriptor_ = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));
  if (descriptor_ < 0) {
    throw SystemError(errno, fmt::format("watching process {} of rank {}", pid_, theirRank_));
  }
}

std::string PeerProcess::death() {
  if (descriptor_ < 0) return {};
  const auto now = std::chrono::steady_clock::now();
  if (now < nextLook_) return {};
  nextLook_ = now + kLookEvery;
  pollfd ended{.fd = descriptor_, .events = POLLIN, .revents = 0};
  if (::poll(&ended, 1, 0) <= 0) return {};
  if (__atomic_load_n(goodbyeWord(theirs_), __ATOMIC_ACQUIRE) != 0) return {};
  return fmt::format("process {} of rank {} has ended without a good-bye", pid_, theirRank_);
}

void PeerProcess::sayGoodbye() noexcept {
  __atomic_store_n(goodbyeWord(own_), 1, __ATOMIC_RELEASE);
}

}  // namespace mscclpp::transport
