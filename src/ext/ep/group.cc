#include "group.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>

#include "common_options.hpp"
#include "platform_kernels.hpp"

namespace mscclpp::ep {
namespace {

/// On the CPU platform blocks cost time and add no bandwidth; a few keep the protocol honest.
constexpr int kMostCpuBlocks = 4;
/// Left free for proxies' copies between ranks that share a GPU.
constexpr int kCopyMultiprocessors = 12;
/// Of a rank that has its GPU for itself.
constexpr int kCopyStreams = 4;
/// Looking for a failed device costs more than a poll.
constexpr unsigned kPollsPerErrorCheck = 1024;

/// Bytes for the rings between nodes.
std::size_t railBudget(const BufferOptions& options) {
  const bool own = !options.lowLatencyMode && options.numRdmaBytes > 0;
  return own ? options.numRdmaBytes : options.numNvlBytes / 4;
}

MemoryPlan makePlan(const BufferOptions& options, const Topology& topology, std::size_t railBytes) {
  const int ranks = topology.ranks();
  check(options.maxExpertsPerRank >= 1, ErrorCode::invalidArgument,
        "max_experts_per_rank = {} must be at least 1", options.maxExpertsPerRank);
  check(options.stagingBytes <= options.numNvlBytes, ErrorCode::invalidArgument,
        "staging_bytes = {} must not exceed num_nvl_bytes = {}", options.stagingBytes,
        options.numNvlBytes);
  MemoryPlan plan;
  plan.ranks = ranks;
  plan.railBytes = railBytes;
  plan.maxExpertsPerRank = options.maxExpertsPerRank;
  plan.stagingBytes = options.stagingBytes ? options.stagingBytes : options.numNvlBytes / 4;
  plan.poolBytes = options.numNvlBytes - plan.stagingBytes;
  if (options.lowLatencyMode) {
    const std::size_t least = LowLatencyPlan::bytesFor(ranks, device::kLineSize);
    check(options.numRdmaBytes >= least, ErrorCode::invalidArgument,
          "low_latency_mode with num_rdma_bytes = {}: it needs {} at least; "
          "get_low_latency_rdma_size_hint() tells how many for a shape",
          options.numRdmaBytes, least);
    plan.lowLatencyBytes = options.numRdmaBytes;
    if (topology.nodes() > 1) {
      plan.lowLatencyOutboxBytes = 4 * LowLatencyPlan{ranks, plan.lowLatencyBytes}.areaBytes();
    }
  }
  return plan;
}

std::uint64_t limitNanoseconds(const BufferOptions& options) {
  if (options.timeoutSeconds < 0) return static_cast<std::uint64_t>(env().timeout.count());
  return static_cast<std::uint64_t>(options.timeoutSeconds * 1e9);
}

/// What kind of error a failure record tells of.
ErrorCode codeOf(const FailureRecord& record) {
  if (record.what == kWaitProxyFailed) return ErrorCode::peerFailure;
  if (record.what >= kWaitReserved) return ErrorCode::timeout;
  const auto what = static_cast<WaitWhat>(record.what);
  const bool isWait = what <= WaitWhat::pipeline ||
                      (what >= WaitWhat::lowLatencyRoom && what < WaitWhat::lowLatencyShape) ||
                      (what >= WaitWhat::railCounts && what < WaitWhat::railProtocol);
  return isWait ? ErrorCode::timeout : ErrorCode::invalidArgument;
}

std::uint64_t nextGroupId() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Group::Group(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
    : bootstrap_(std::move(bootstrap)),
      options_(options),
      device_(Device::open(options.platform, options.deviceIndex)),
      topology_(Topology::discover(*bootstrap_, device_, options.topology)),
      internodeKernels_(&internodeKernelsOf(options.platform)),
      railPlan_(makeRailPlan(topology_, internodeKernels_->lanes(), options.maxExpertsPerRank,
                             railBudget(options))),
      plan_(makePlan(options, topology_, railPlan_.total())),
      pool_(plan_.pool(), plan_.poolBytes),
      kernels_(&kernelsOf(options.platform)),
      lowLatencyPlan_{bootstrap_->size(), plan_.lowLatencyBytes},
      lowLatencyKernels_(&lowLatencyKernelsOf(options.platform)),
      id_(nextGroupId()) {
  check(topology_.nodes() == 1 || internodeKernels_->fits(railPlan_.members, railPlan_.rings),
        ErrorCode::invalidArgument,
        "{} nodes of up to {} ranks: the kernels between nodes keep words of every node in a "
        "multiprocessor's shared memory, which has room for some 500 nodes",
        topology_.nodes(), railPlan_.members);
  sharers_ =
      compareOptions(*bootstrap_, options_, plan_.stagingBytes, *device_, topology_.nodes() > 1);
  comm_ = device_->createStream(true, rank());
  reclaim_ = device_->createStream(false, rank());
  heap_ = device_->allocateExportable(plan_.total());
  failure_ = device_->allocatePinned(sizeof(FailureRecord));
  notifyResult_ = device_->allocatePinned(sizeof(NotifyResult) +
                                          static_cast<std::size_t>(options_.maxExpertsPerRank) * 4);
  {
    const DeviceScope scope(*device_);
    kernels_->prepare();
    if (topology_.nodes() > 1) internodeKernels_->prepare();
    if (options_.lowLatencyMode) lowLatencyKernels_->prepare();
  }
  mapPeers();
}

Group::~Group() {
  runNoThrow("~Group", [&] {
    if (comm_) comm_.synchronize();
  });
  runNoThrow("~Group", [&] { pool_.drain(); });
}

void Group::mapPeers() {
  std::vector<MemoryHandle> handles(static_cast<std::size_t>(ranks()));
  handles[static_cast<std::size_t>(rank())] = device_->exportMemory(heap_.get(), plan_.total());
  bootstrap_->allGather(handles);
  std::vector<char*> bases;
  for (int r = 0; r < ranks(); ++r) {
    const LinkKind link = topology_.link(r);
    peers_.push_back(link == LinkKind::self ? heap_
                     : link == LinkKind::memory
                         ? device_->importMemory(handles[static_cast<std::size_t>(r)])
                         : nullptr);
    bases.push_back(static_cast<char*>(peers_.back().get()));
  }
  const std::size_t tableBytes = bases.size() * sizeof(char*);
  heapTable_ = device_->allocateExportable(tableBytes);  // device memory; never exported
  // Every flag starts one behind the first epoch, so that none is reached before it is set.
  LocalWords words{};
  words.epoch = options_.firstEpoch;
  std::vector<char> control(plan_.staging(), 0);
  std::memcpy(control.data() + plan_.localWords(), &words, sizeof(words));
  for (int r = 0; r < ranks(); ++r) {
    PeerBox box{};
    box.entry.epoch = box.counts.epoch = box.done.epoch = options_.firstEpoch;
    std::memcpy(control.data() + plan_.peerBox(r), &box, sizeof(box));
    std::vector<std::uint32_t> flags(kMaxChunks, options_.firstEpoch);
    std::memcpy(control.data() + plan_.chunkFlags(r), flags.data(), flags.size() * 4);
  }
  device_->copy(heap_.get(), control.data(), control.size(), comm_);
  device_->copy(heapTable_.get(), bases.data(), tableBytes, comm_);
  if (options_.lowLatencyMode) initialiseLowLatency();
  comm_.synchronize();
  if (topology_.nodes() > 1) {
    ports_ = std::make_unique<PortPeers>(
        *bootstrap_, topology_,
        PortPeers::Options{.device = device_,
                           .heap = heap_,
                           .heapBytes = plan_.total(),
                           .record = static_cast<FailureRecord*>(failure_.get()),
                           .timeout = std::chrono::nanoseconds(limitNanoseconds(options_)),
                           .copyStreams = sharers_ > 1 ? 1 : kCopyStreams});
    rails_ = std::make_unique<Rails>(topology_, railPlan_, *ports_, device_);
  }
  bootstrap_->barrier();  // nobody writes into a heap that is not initialised
}

void Group::initialiseLowLatency() {
  const std::uint64_t first = options_.firstEpoch;
  std::vector<char> head(lowLatencyPlan_.head(), 0);
  auto& words = *reinterpret_cast<LowLatencyWords*>(head.data() + lowLatencyPlan_.words());
  for (int k = 0; k < kLowLatencyKinds; ++k) {
    words.sent[k] = first * kEpochStep;
    for (unsigned parity = 0; parity < 2; ++parity) {
      const std::uint64_t calls = callsUntil(first, parity);
      const auto finished = static_cast<std::uint32_t>(epochOfCalls(calls, parity));
      words.received[k][parity] = calls * kEpochStep;
      words.toldPorts[k][parity] = epochOfCalls(calls, parity);
      for (int r = 0; r < ranks(); ++r) {
        auto& peer = *reinterpret_cast<LowLatencyPeer*>(head.data() + lowLatencyPlan_.peer(r));
        peer.finished[k][parity] = finished;
        char* const hello =
            head.data() + lowLatencyPlan_.hello(static_cast<LowLatencyKind>(k), parity + 1, r);
        auto* const units = reinterpret_cast<device::LineTail*>(hello);
        units[device::kLineUnits].second = finished;
      }
    }
  }
  device_->copy(lowLatencyRegion(), head.data(), head.size(), comm_);
  comm_.synchronize();  // `head` is read until here
}

LowLatencyGroup Group::lowLatencyArgs() const {
  LowLatencyGroup args;
  args.heaps = static_cast<char* const*>(heapTable_.get());
  args.region = lowLatencyRegion();
  args.regionOffset = plan_.lowLatency();
  for (int r = 0; r < std::min(ranks(), kInlineRanks); ++r) {
    char* const heap = static_cast<char*>(peers_[static_cast<std::size_t>(r)].get());
    if (heap != nullptr) args.regions[r] = heap + args.regionOffset;
  }
  if (ports_) {
    args.ports = {.channels = {ports_->table(PortUse::lowLatencyDispatch),
                               ports_->table(PortUse::lowLatencyCombine)},
                  .outboxOffset = plan_.lowLatencyOutbox(),
                  .firstEpoch = options_.firstEpoch,
                  .words = ports_->words()};
  }
  args.plan = lowLatencyPlan_;
  args.ranks = ranks();
  args.rank = rank();
  args.wait = this->args().wait;
  args.shrink = options_.enableShrink;
  args.alone = sharers_ == 1;
  return args;
}

namespace {

/// False when one of them is captured into a graph and the other is not: then there is no order
/// between them but the one in which the graph is launched.
bool join(Stream& waiter, Stream& other) {
  if (waiter.capturing() != other.capturing()) return false;
  waiter.wait(other.record(false));
  return true;
}

}  // namespace

void Group::enterComm() {
  if (callerUsed_) {
    Stream last = borrow(lastCaller_);
    if (join(comm_, last)) callerUsed_ = false;
  }
  commUsed_ = true;
}

void Group::enterCaller(Stream& caller) {
  if (callerUsed_ && lastCaller_ != caller.native()) {
    Stream last = borrow(lastCaller_);
    join(caller, last);
  }
  if (commUsed_ && join(caller, comm_)) commUsed_ = false;
  lastCaller_ = caller.native();
  callerUsed_ = true;
}

void Group::synchronize() {
  comm_.synchronize();
  if (callerUsed_) borrow(lastCaller_).synchronize();
  callerUsed_ = false;
}

bool Group::inPool(const void* p) const {
  const char* at = static_cast<const char*>(p);
  return at >= heap() + plan_.pool() && at < heap() + plan_.poolEnd();
}

int Group::blocks(int wanted) const {
  // Copies inside a GPU need multiprocessors too: proxies of ranks that share one would wait for
  // kernels that wait for them.
  const int kept = ports_ && sharers_ > 1 ? kCopyMultiprocessors : 0;
  const int most = options_.platform == Platform::cpu
                       ? kMostCpuBlocks
                       : (device_->multiprocessors() - kept) / sharers_;
  return std::clamp(wanted, 1, std::max(most, 1));
}

GroupArgs Group::args() const {
  GroupArgs args;
  args.heaps = static_cast<char* const*>(heapTable_.get());
  args.plan = plan_;
  args.ranks = ranks();
  args.rank = rank();
  args.wait.record = static_cast<FailureRecord*>(failure_.get());
  args.wait.limitNs = limitNanoseconds(options_);
  args.wait.rank = rank();
  return args;
}

void Group::raiseIfFailed() {
  const auto& record = *static_cast<const FailureRecord*>(failure_.get());
  const bool isNew = broken_.empty() && failurePublished(record);
  if (isNew) {
    broken_ = record.what == kWaitProxyFailed && ports_ ? "EP: " + ports_->failure()
                                                        : describeFailure(record);
    // What the kernels told the peers must reach them before this rank goes: it may be all that
    // they learn.
    if (ports_) runNoThrow("telling the peers of other nodes", [&] { ports_->drain(); });
  }
  if (broken_.empty()) return;
  throwError(codeOf(record), isNew ? broken_ : "the Buffer is of no use since: " + broken_);
}

void Group::awaitNotify(std::uint32_t sequence) {
  if (options_.platform == Platform::cpu) {
    comm_.synchronize();
  } else {
    const NotifyResult& result = notifyResult();
    // The device's own waits are bounded, so that it always answers, unless it has failed.
    for (unsigned polls = 1; __atomic_load_n(&result.sequence, __ATOMIC_ACQUIRE) != sequence;
         ++polls) {
      if (polls % kPollsPerErrorCheck == 0) device_->checkAsyncErrors();
      std::this_thread::yield();
    }
  }
  raiseIfFailed();
}

std::vector<Event> Group::usersNow(void* owner) {
  std::vector<Event> users;
  users.push_back(borrow(owner).record(false));
  users.push_back(comm_.record(false));
  return users;
}

std::shared_ptr<void> Group::allocate(std::size_t bytes, Stream& allocateOn, void* owner) {
  void* memory = device_->allocate(bytes, allocateOn);
  auto giveBack = [group = shared_from_this(), owner](void* p) {
    runNoThrow("releasing a tensor", [&] {
      const std::lock_guard lock(group->reclaimMutex_);
      for (const Event& event : group->usersNow(owner)) group->reclaim_.wait(event);
      group->device_->release(p, group->reclaim_);
    });
  };
  return std::shared_ptr<void>(memory, std::move(giveBack));
}

std::shared_ptr<void> Group::takeFromPool(std::size_t bytes, Stream& useOn, void* owner) {
  const std::optional<std::size_t> offset = pool_.take(bytes, useOn);
  if (!offset) return nullptr;
  auto giveBack = [group = shared_from_this(), owner, at = *offset](void*) {
    runNoThrow("releasing a pool tensor", [&] {
      const std::lock_guard lock(group->reclaimMutex_);
      group->pool_.release(at, group->usersNow(owner));
    });
  };
  return std::shared_ptr<void>(heap() + *offset, std::move(giveBack));
}

void Group::drain() {
  synchronize();
  if (ports_ && !broken()) ports_->drain();
}

void Group::close() {
  synchronize();
  pool_.drain();
  if (!broken()) bootstrap_->barrier();  // peers may still be reading or writing here
  if (ports_ && !broken()) ports_->close(*bootstrap_);
  ports_.reset();
  peers_.clear();
  if (!broken()) bootstrap_->barrier();  // nobody frees memory that a peer has mapped
}

}  // namespace mscclpp::ep
