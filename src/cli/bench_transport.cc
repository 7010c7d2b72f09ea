#include "bench_transport.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>
#include <mscclpp/port_channel.hpp>

#include "ext/ep/rails.hpp"

namespace mscclpp::ep::cli {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::uint64_t kPieceBytes = 1 << 20;
constexpr int kPiecesAtOnce = 16;  ///< handed to the transport together
constexpr std::chrono::seconds kLimit{100};
/// Counters that peers add to: rounds whose data is here, and rounds that peers are done with.
enum Word : std::uint64_t { kData, kDone, kWords };

std::uint8_t patternOf(int rank) {
  return static_cast<std::uint8_t>(rank % 251 + 1);
}
/// Of a rank's tokens, how many go to some rank of the node.
std::uint64_t tokensTo(const BenchRouting& routing, const Topology& topology, int rank, int tokens,
                       int node) {
  std::uint64_t count = 0;
  for (int t = 0; t < tokens; ++t) {
    const std::vector<int>& to = routing.targets(rank, t);
    count += std::ranges::any_of(to, [&](int r) { return topology.nodeOf(r) == node; }) ? 1 : 0;
  }
  return count;
}

}  // namespace

TransportRoofline::TransportRoofline(const BenchOptions& options, const RankContext& context,
                                     const RankDevice& device, const BenchRouting& routing,
                                     const Topology& topology, std::size_t rowBytes)
    : options_(options), context_(context), device_(device) {
  const std::uint64_t slot = static_cast<std::uint64_t>(options.tokens) * rowBytes;
  const RailFlows flows = railFlows(topology, context.rank);
  for (const RailFlow& flow : flows.out) {
    out_.push_back({flow.peer,
                    rowBytes * tokensTo(routing, topology, context.rank, options.tokens, flow.node),
                    slot * static_cast<std::uint64_t>(flow.ring)});
  }
  for (std::size_t i = 0; i < flows.in.size(); ++i) {
    const int peer = flows.in[i].peer;
    in_.push_back({peer,
                   rowBytes * tokensTo(routing, topology, peer, options.tokens,
                                       topology.nodeOf(context.rank)),
                   slot * i});
  }
  const auto opened = Device::open(options.platform, device.device().index());
  farBytes_ = std::max<std::size_t>(slot * in_.size(), 1);
  const std::size_t nearBytes = std::max<std::size_t>(slot, 1);
  near_ = opened->allocateExportable(nearBytes);
  far_ = opened->allocateExportable(farBytes_);
  counters_ = allocateHostMemory(opened, kWords * sizeof(std::uint64_t));
  endpoint_ = Endpoint::create(topology.transport().value(), opened,
                               {.rank = context.rank, .timeout = kLimit});
  connections_ = connectAll(*context.bootstrap, *endpoint_,
                            [&](int peer) { return topology.link(peer) == LinkKind::port; });
  local_ = endpoint_->registerMemory({opened, near_, nearBytes});
  target_ = endpoint_->registerMemory({opened, far_, farBytes_});
  words_ = endpoint_->registerMemory(counters_);
  remote_ = exchangeMemories(*context.bootstrap, connections_, *target_);
  remoteWords_ = exchangeMemories(*context.bootstrap, connections_, *words_);
  for (const auto& connection : connections_) peers_ += connection ? 1 : 0;
  fillMemories();
}

TransportRoofline::~TransportRoofline() {
  for (const auto& connection : connections_) {
    if (connection) connection->close();
  }
}

void TransportRoofline::fillMemories() {
  Device& device = device_.device();
  device.fill(near_.get(), patternOf(context_.rank), local_->size(), device_.stream());
  device.fill(far_.get(), 0, farBytes_, device_.stream());
  device_.stream().synchronize();
  context_.bootstrap->barrier();
}

double TransportRoofline::bytes() const {
  double sum = 0;
  for (const Flow& flow : out_) sum += static_cast<double>(flow.bytes);
  return sum;
}

std::uint64_t TransportRoofline::counter(std::uint64_t word) const {
  return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(counters_.data()) + word,
                         __ATOMIC_ACQUIRE);
}
void TransportRoofline::add(int peer, std::uint64_t word) {
  const auto at = static_cast<std::size_t>(peer);
  connections_[at]->atomicAdd(
      {.remote = remoteWords_[at].get(), .offset = word * sizeof(std::uint64_t), .value = 1});
  connections_[at]->submit();
}
/// Moves all connections along. True when everything posted is complete.
bool TransportRoofline::progress() {
  bool complete = true;
  for (const auto& connection : connections_) {
    if (!connection) continue;
    connection->progress();
    if (connection->failed()) {
      throw PeerError(connection->peer(), fmt::format("bench: {}", connection->failure()));
    }
    complete = connection->completed() == connection->posted() && complete;
  }
  return complete;
}

/// Pieces in turn, so that all flows are under way together.
void TransportRoofline::write() {
  std::uint64_t most = 0;
  for (const Flow& flow : out_) most = std::max(most, flow.bytes);
  int gathered = 0;
  for (std::uint64_t at = 0; at < most; at += kPieceBytes) {
    for (const Flow& flow : out_) {
      if (at >= flow.bytes) continue;
      const auto peer = static_cast<std::size_t>(flow.peer);
      Connection& connection = *connections_[peer];
      while (!connection.canPost()) progress();
      connection.write({.local = local_.get(),
                        .remote = remote_[peer].get(),
                        .localOffset = at,
                        .remoteOffset = flow.remoteOffset + at,
                        .bytes = std::min(kPieceBytes, flow.bytes - at)});
      if (++gathered % kPiecesAtOnce == 0) connection.submit();
    }
    progress();
  }
}

/// One round of all ranks. A rank moves its connections along until its peers are done, too: their
/// transport may need its help.
double TransportRoofline::round() {
  context_.bootstrap->barrier();
  const auto begin = Clock::now();
  const auto waitFor = [&](auto&& done) {
    while (!done()) {
      std::this_thread::yield();  // others may share this core
      check(Clock::now() - begin < kLimit, ErrorCode::timeout,
            "bench: the bare transport took more than {} s", kLimit.count());
    }
  };
  ++rounds_;
  write();
  for (const Flow& flow : out_) add(flow.peer, kData);
  waitFor([&] { return progress() && counter(kData) == rounds_ * in_.size(); });
  const double us = std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
  for (std::size_t peer = 0; peer < connections_.size(); ++peer) {
    if (connections_[peer]) add(static_cast<int>(peer), kDone);
  }
  waitFor([&] { return progress() && counter(kDone) == rounds_ * peers_; });
  return us;
}

bool TransportRoofline::arrived() const {
  std::vector<std::uint8_t> far(farBytes_);
  Device& device = device_.device();
  device.copy(far.data(), far_.get(), farBytes_, device_.stream());
  device_.stream().synchronize();
  return std::ranges::all_of(in_, [&](const Flow& flow) {
    const auto first = far.begin() + static_cast<std::ptrdiff_t>(flow.remoteOffset);
    return std::all_of(first, first + static_cast<std::ptrdiff_t>(flow.bytes),
                       [&](std::uint8_t byte) { return byte == patternOf(flow.peer); });
  });
}

Timing TransportRoofline::measure() {
  for (int i = 0; i < options_.warmup; ++i) round();
  const auto rounds = static_cast<std::size_t>(std::max(options_.iterations, 1));
  std::vector<double> all(rounds * static_cast<std::size_t>(context_.ranks));
  for (std::size_t i = 0; i < rounds; ++i) {
    all[static_cast<std::size_t>(context_.rank) * rounds + i] = round();
  }
  context_.bootstrap->allGather(all.data(), rounds * sizeof(double));
  std::vector<double> slowest(rounds, 0.0);
  for (std::size_t i = 0; i < all.size(); ++i) {
    slowest[i % rounds] = std::max(slowest[i % rounds], all[i]);
  }
  std::ranges::sort(slowest);
  std::vector<std::uint8_t> correct(static_cast<std::size_t>(context_.ranks));
  correct[static_cast<std::size_t>(context_.rank)] = arrived() ? 1 : 0;
  context_.bootstrap->allGather(correct);
  Timing timing;
  timing.measured = true;
  timing.median = slowest[rounds / 2];
  timing.least = slowest.front();
  timing.most = slowest.back();
  timing.correct = std::ranges::all_of(correct, [](std::uint8_t one) { return one != 0; });
  return timing;
}

}  // namespace mscclpp::ep::cli
