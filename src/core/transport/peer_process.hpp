// Whether the process of a peer on this host still lives.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include <mscclpp/registered_memory.hpp>

namespace mscclpp::transport {

/// One side's view of the other: notices that the peer's process ended without a good-bye.
/// Transports whose peer takes no part (mapped memory) have no other way to see that.
class PeerProcess {
 public:
  /// Plain bytes, for the peer's connect().
  struct Address {
    MemoryHandle goodbye;
    int32_t rank;
    uint32_t reserved;
  };

  explicit PeerProcess(int ownRank);
  ~PeerProcess();
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;

  Address address() const;
  /// @throws as Device::importMemory.
  void connect(const Address& theirs);
  /// Why the peer counts as dead; empty while it lives, after its good-bye, and for a peer of this
  /// process. Looks at most every few milliseconds, so it may be called in a loop.
  std::string death();
  /// Tells the peer that the end of this process is no death.
  void sayGoodbye() noexcept;

 private:
  int rank_;
  RegisteredMemory own_;
  RegisteredMemory theirs_;
  int32_t pid_ = 0;
  int theirRank_ = -1;
  int descriptor_ = -1;  ///< of the process; -1 for this process itself
  std::chrono::steady_clock::time_point nextLook_;
};

}  // namespace mscclpp::transport
