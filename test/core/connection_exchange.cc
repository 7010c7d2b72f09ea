#include "core/connection_exchange.hpp"

#include <algorithm>
#include <utility>

namespace mscclpp::test {

namespace {

/// Every rank sends messages to every other one, with at most kSlots unread, and checks what it
/// gets. A thread of its own posts and progresses, as a proxy does; the caller's reads, as a kernel
/// does: it knows of a message only from the counter or signal behind it.
class Exchange {
 public:
  static constexpr size_t kMaxBytes = size_t{256} << 10;

  Exchange(Rank& rank, int rounds, Notify notify)
      : rank_(rank),
        rounds_(rounds),
        notify_(notify),
        sends_(static_cast<size_t>(rank.size())),
        consumed_(static_cast<size_t>(rank.size())) {}

  void run() {
    rank_.data().fill(0, kPoison, 2 * slots() * kSlotBytes);
    rank_.bootstrap().barrier();
    ProxyThread proxy([this] { work(); });
    const auto limit = std::chrono::steady_clock::now() + kPatience;
    std::vector<int> read(sends_.size(), 0);
    for (int missing = rounds_ * (rank_.size() - 1); missing > 0 || !allSent_;) {
      require(std::chrono::steady_clock::now() < limit, "rank {}: {} messages are missing",
              rank_.rank(), missing);
      if (proxy.broken()) proxy.stop();
      for (int peer = 0; peer < rank_.size(); ++peer) {
        int& next = read[static_cast<size_t>(peer)];
        if (peer == rank_.rank() || next == rounds_ || arrived(peer) <= next) continue;
        readMessage(peer, next++);
        consumed_[static_cast<size_t>(peer)].store(next, std::memory_order_release);
        --missing;
      }
      std::this_thread::yield();
    }
    proxy.stop();
  }

 private:
  static constexpr int kSlots = 2;
  static constexpr size_t kMargin = 256;
  static constexpr size_t kSlotBytes = kMaxBytes + 2 * kMargin;
  static constexpr unsigned char kPoison = 0xA5;

  struct Message {
    uint64_t key;
    size_t bytes;
    size_t sourceShift;
    size_t targetShift;  ///< below kMargin
  };
  struct Sends {
    int next = 0;
    uint64_t busyUntil[kSlots] = {};  ///< operations that must be complete before the slot is free
    int64_t creditsReturned = 0;
    Connection::SignalTarget signal;
  };

  size_t slots() const { return sends_.size() * kSlots; }
  size_t sourceAt(int peer, int round) const {
    return (static_cast<size_t>(peer) * kSlots + static_cast<size_t>(round % kSlots)) * kSlotBytes;
  }
  size_t targetAt(int sender, int round) const {
    return slots() * kSlotBytes + sourceAt(sender, round);
  }
  static Message message(int from, int to, int round) {
    const uint64_t key = mix(static_cast<uint64_t>(from * 1000 + to), static_cast<uint64_t>(round));
    const uint64_t limit = uint64_t{1} << (mix(key, 1) % 19);  // as many small ones as large ones
    return {.key = key,
            .bytes = mix(key, 2) % (limit + 1),
            .sourceShift = mix(key, 3) % kMargin,
            .targetShift = mix(key, 4) % kMargin};
  }

  int64_t arrived(int peer) {
    const auto index = Rank::kArrivals + static_cast<size_t>(peer);
    int64_t count = rank_.word(index);
    if (notify_ == Notify::signal && rank_.to(peer).capabilities().deviceSignals) {
      int64_t onDevice = 0;
      const auto bytes = rank_.deviceWords().get(index * sizeof(int64_t), sizeof(int64_t));
      std::copy(bytes.begin(), bytes.end(), reinterpret_cast<unsigned char*>(&onDevice));
      count += onDevice;
    }
    return count;
  }

  void readMessage(int peer, int round) {
    const Message expected = message(peer, rank_.rank(), round);
    const size_t at = targetAt(peer, round);
    const auto found = rank_.data().get(at, expected.bytes + 2 * kMargin);
    std::vector<unsigned char> whole(found.size(), kPoison);
    std::ranges::copy(payload(expected.key, expected.bytes),
                      whole.begin() + static_cast<ptrdiff_t>(expected.targetShift));
    requireBytes(fmt::format("rank {}: message {} from rank {}, {} bytes at {}", rank_.rank(),
                             round, peer, expected.bytes, expected.targetShift),
                 found, whole);
    rank_.data().fill(at, kPoison, found.size());
  }

  void work() {
    bool all = true;
    for (int peer = 0; peer < rank_.size(); ++peer) {
      if (peer == rank_.rank()) continue;
      Sends& sends = sends_[static_cast<size_t>(peer)];
      if (sends.next < rounds_) sendNext(peer, sends);
      all = all && sends.next == rounds_;
      const int64_t consumed = consumed_[static_cast<size_t>(peer)].load(std::memory_order_acquire);
      if (consumed > sends.creditsReturned) {
        rank_.add(peer, Rank::kCredits + static_cast<size_t>(rank_.rank()),
                  consumed - std::exchange(sends.creditsReturned, consumed));
      }
    }
    if (all) allSent_.store(true, std::memory_order_relaxed);
    rank_.waitFor("nothing", [] { return true; });  // throws when a connection is broken
    if (!rank_.progress()) std::this_thread::yield();
  }

  void sendNext(int peer, Sends& sends) {
    const auto own = static_cast<size_t>(rank_.rank());
    const int64_t credits = rank_.word(Rank::kCredits + static_cast<size_t>(peer));
    uint64_t& busyUntil = sends.busyUntil[sends.next % kSlots];
    Connection& connection = rank_.to(peer);
    if (sends.next >= credits + kSlots || connection.completed() < busyUntil) return;
    const Message next = message(rank_.rank(), peer, sends.next);
    const size_t from = sourceAt(peer, sends.next) + next.sourceShift;
    rank_.data().put(from, payload(next.key, next.bytes));
    rank_.write(peer, from, targetAt(rank_.rank(), sends.next) + next.targetShift, next.bytes);
    busyUntil = connection.posted();
    if (notify_ == Notify::counter) {
      rank_.add(peer, Rank::kArrivals + own, 1);
    } else {
      const uint64_t offset = (Rank::kArrivals + own) * sizeof(int64_t);
      sends.signal.host = &rank_.wordsOf(peer);
      sends.signal.hostOffset = offset;
      if (connection.capabilities().deviceSignals) sends.signal.device = &rank_.deviceWordsOf(peer);
      sends.signal.deviceOffset = offset;
      rank_.postable(peer).signal(sends.signal);
    }
    ++sends.next;
  }

  Rank& rank_;
  const int rounds_;
  const Notify notify_;
  std::vector<Sends> sends_;
  std::vector<std::atomic<int64_t>> consumed_;
  std::atomic<bool> allSent_ = false;
};

}  // namespace

void exchange(Rank& rank, int rounds, Notify notify) {
  Exchange(rank, rounds, notify).run();
  rank.finish();
}

}  // namespace mscclpp::test
