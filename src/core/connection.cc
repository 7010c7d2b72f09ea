#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include <mscclpp/connection.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp {

namespace {

void checkRange(const char* what, const char* side, uint64_t offset, uint64_t bytes,
                uint64_t size) {
  check(offset <= size && bytes <= size - offset, ErrorCode::invalidArgument,
        "{}: {} bytes at offset {} of the {} memory, which has {} bytes", what, bytes, offset, side,
        size);
}

}  // namespace

void Connection::write(const Write& write) {
  check(write.local != nullptr && write.remote != nullptr, ErrorCode::invalidArgument,
        "Connection::write: the {} memory is null", write.local == nullptr ? "local" : "remote");
  checkRange("Connection::write", "local", write.localOffset, write.bytes, write.local->size());
  checkRange("Connection::write", "remote", write.remoteOffset, write.bytes, write.remote->size());
  if (failed()) return;
  ++posted_;
  doWrite(write);
}

void Connection::atomicAdd(const Add& add) {
  check(add.remote != nullptr, ErrorCode::invalidArgument,
        "Connection::atomicAdd: the remote memory is null");
  check(add.offset % 8 == 0, ErrorCode::invalidArgument,
        "Connection::atomicAdd: offset {}: a counter lies at a multiple of 8 bytes", add.offset);
  checkRange("Connection::atomicAdd", "remote", add.offset, 8, add.remote->size());
  if (add.remote->onDevice() && !capabilities().deviceCounters) {
    mscclpp::fail(
        ErrorCode::unsupported,
        "Connection::atomicAdd: the counter lies in GPU memory, where {} cannot add: keep "
        "counters in host memory",
        toString(transport_));
  }
  if (failed()) return;
  ++posted_;
  doAdd(add);
}

void Connection::signal(SignalTarget& target) {
  if (failed()) return;
  ++posted_;
  doSignal(target);
}

void Connection::doSignal(SignalTarget& target) {
  doAdd({.remote = target.host, .offset = target.hostOffset, .value = 1});
}

void Connection::flush(std::chrono::nanoseconds timeout) {
  submit();
  const auto start = std::chrono::steady_clock::now();
  while (completed() < posted() || failed()) {
    if (failed())
      throw PeerError(peer_, fmt::format("connection to rank {}: {}", peer_, failure()));
    if (progress()) continue;
    check(timeout.count() == 0 || std::chrono::steady_clock::now() - start < timeout,
          ErrorCode::timeout,
          "flush: {} of {} operations to rank {} over {} are not complete after {:.1f} s",
          posted() - completed(), posted(), peer_, toString(transport_),
          static_cast<double>(timeout.count()) / 1e9);
    std::this_thread::yield();
  }
}

void Connection::fail(const std::string& why) noexcept {
  if (failed()) return;
  runNoThrow("connection", [&] { failure_ = why; });
  failed_.store(true, std::memory_order_release);
}

namespace {

/// Whether a rank could do its part, and if not, why.
struct Verdict {
  uint32_t failed = 0;
  char text[508] = {};

  void set(const std::string& why) {
    failed = 1;
    why.copy(text, sizeof(text) - 1);
  }
};

/// No rank may go on, or give up, alone: the verdicts of all decide.
void agree(Bootstrap& bootstrap, const char* what, const Verdict& own) {
  std::vector<Verdict> verdicts(static_cast<size_t>(bootstrap.size()));
  verdicts[static_cast<size_t>(bootstrap.rank())] = own;
  bootstrap.allGather(verdicts);
  for (size_t rank = 0; rank < verdicts.size(); ++rank) {
    check(verdicts[rank].failed == 0, ErrorCode::unsupported, "{}: rank {}: {}", what, rank,
          verdicts[rank].text);
  }
}

/// Everybody's piece of equal size for everybody: pieces[p] of this rank arrives at rank p.
std::vector<std::vector<std::byte>> exchangePieces(
    Bootstrap& bootstrap, const std::vector<std::vector<std::byte>>& pieces) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  const auto own = static_cast<size_t>(bootstrap.rank());
  size_t bytes = 0;
  for (const auto& piece : pieces) bytes = std::max(bytes, piece.size());
  std::vector<std::byte> all(ranks * ranks * bytes);
  for (size_t rank = 0; rank < ranks; ++rank) {
    std::copy(pieces[rank].begin(), pieces[rank].end(),
              all.begin() + static_cast<ptrdiff_t>((own * ranks + rank) * bytes));
  }
  if (bytes > 0) bootstrap.allGather(all.data(), ranks * bytes);
  std::vector<std::vector<std::byte>> result(ranks);
  for (size_t rank = 0; rank < ranks; ++rank) {
    const auto begin = all.begin() + static_cast<ptrdiff_t>((rank * ranks + own) * bytes);
    result[rank].assign(begin, begin + static_cast<ptrdiff_t>(bytes));
  }
  return result;
}

/// Runs `action(rank)` for every rank that `wanted` has; the verdict says what it threw first.
template <class Wanted, class F>
Verdict forPeers(size_t ranks, Wanted&& wanted, F&& action) {
  Verdict verdict;
  for (size_t rank = 0; rank < ranks && verdict.failed == 0; ++rank) {
    if (!wanted(rank)) continue;
    try {
      action(rank);
    } catch (const std::exception& error) {
      verdict.set(fmt::format("to rank {}: {}", rank, error.what()));
    }
  }
  return verdict;
}

}  // namespace

std::vector<std::shared_ptr<Connection>> connectAll(Bootstrap& bootstrap, Endpoint& endpoint,
                                                    const std::function<bool(int)>& wanted) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  const auto isPeer = [&](size_t rank) {
    const int peer = static_cast<int>(rank);
    return peer != bootstrap.rank() && (!wanted || wanted(peer));
  };
  std::vector<std::shared_ptr<Connection>> connections(ranks);
  std::vector<std::vector<std::byte>> addresses(ranks);
  const Verdict opened = forPeers(ranks, isPeer, [&](size_t rank) {
    connections[rank] = endpoint.open(static_cast<int>(rank));
    addresses[rank] = connections[rank]->address();
  });
  agree(bootstrap, "opening connections", opened);
  const auto theirs = exchangePieces(bootstrap, addresses);
  const Verdict connected =
      forPeers(ranks, isPeer, [&](size_t rank) { connections[rank]->connect(theirs[rank]); });
  agree(bootstrap, "connecting", connected);
  return connections;
}

std::vector<std::shared_ptr<RemoteMemory>> exchangeMemories(
    Bootstrap& bootstrap, const std::vector<std::shared_ptr<Connection>>& connections,
    const LocalMemory& local) {
  const auto ranks = static_cast<size_t>(bootstrap.size());
  check(connections.size() == ranks, ErrorCode::invalidArgument,
        "exchangeMemories: {} connections for {} ranks: pass what connectAll() returned",
        connections.size(), ranks);
  const std::vector<std::byte> own = local.describe();
  std::vector<std::byte> all(ranks * own.size());
  std::copy(
      own.begin(), own.end(),
      all.begin() + static_cast<ptrdiff_t>(static_cast<size_t>(bootstrap.rank()) * own.size()));
  bootstrap.allGather(all.data(), own.size());
  std::vector<std::shared_ptr<RemoteMemory>> memories(ranks);
  const auto connected = [&](size_t rank) { return connections[rank] != nullptr; };
  const Verdict imported = forPeers(ranks, connected, [&](size_t rank) {
    memories[rank] = connections[rank]->importMemory(
        std::span<const std::byte>(all).subspan(rank * own.size(), own.size()));
  });
  agree(bootstrap, "exchanging memories", imported);
  return memories;
}

}  // namespace mscclpp
