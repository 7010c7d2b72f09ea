#include "core/transport/verbs/verbs_connection.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::verbs {

namespace {

constexpr uint32_t kMagic = 0x31434256;  // "VBC1"
constexpr size_t kMaxQueuePairs = 16;
constexpr uint32_t kMaxSendDepth = 4096;
constexpr uint64_t kPage = 4096;

struct Address {
  uint32_t magic;
  int32_t rank;
  PortAddress port;
  uint32_t queuePairs;
  uint8_t atomics;
  uint8_t readsAtOnce;
  uint16_t reserved;
  uint32_t controlKey;
  uint64_t control;
  std::array<QueuePairAddress, kMaxQueuePairs> pairs;
};

uint64_t addressOf(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}

uint8_t readsAtOnce(const Nic& nic) {
  return static_cast<uint8_t>(
      std::clamp(std::min(nic.limits().max_qp_rd_atom, nic.limits().max_qp_init_rd_atom), 1, 255));
}

/// As many as operations may be under way, within what the device can do.
uint32_t sendDepthOf(const VerbsEndpoint& endpoint) {
  const ibv_device_attr& limits = endpoint.nic()->limits();
  const int perPair =
      (limits.max_cqe - static_cast<int>(ControlBlock::kAddSlots)) / endpoint.options().queuePairs;
  const int depth = std::min(
      {endpoint.options().queueDepth, limits.max_qp_wr, perPair, static_cast<int>(kMaxSendDepth)});
  check(depth >= 2, ErrorCode::unsupported,
        "verbs: {} allows {} work requests in a queue pair and {} completions: too few for {} "
        "queue pairs",
        endpoint.nic()->name(), limits.max_qp_wr, limits.max_cqe, endpoint.options().queuePairs);
  return static_cast<uint32_t>(depth);
}

Handle<ibv_cq> createCompletions(Nic& nic, uint32_t depth) {
  ibv_cq* const queue =
      library().createCq(nic.context(), static_cast<int>(depth), nullptr, nullptr, 0);
  if (queue == nullptr) {
    throw SystemError(errno, fmt::format("verbs: a completion queue of {} for {} entries (of at "
                                         "most {})",
                                         nic.name(), depth, nic.limits().max_cqe));
  }
  return {queue, library().destroyCq};
}

}  // namespace

VerbsConnection::VerbsConnection(std::shared_ptr<VerbsEndpoint> endpoint, int peer)
    : Connection(Transport::verbs, peer),
      endpoint_(std::move(endpoint)),
      control_(std::make_unique<ControlBlock>()),
      controlRegion_(registerHost(*endpoint_->nic(), control_.get(), sizeof(ControlBlock))),
      sendDepth_(sendDepthOf(*endpoint_)),
      completions_(createCompletions(
          *endpoint_->nic(), sendDepth_ * static_cast<uint32_t>(endpoint_->options().queuePairs) +
                                 ControlBlock::kAddSlots)),
      keepAlive_(endpoint_->tuning().keepAlive) {
  const auto timeout = endpoint_->options().timeout;
  if (timeout.count() > 0) keepAlive_ = std::min(keepAlive_, timeout / 2);
  const auto count = static_cast<unsigned>(endpoint_->options().queuePairs);
  for (unsigned index = 0; index < count; ++index) {
    const uint32_t receives = index == 0 ? ControlBlock::kAddSlots : 1;
    pairs_.push_back(std::make_unique<QueuePair>(endpoint_->nic(), completions_.get(), index,
                                                 QueuePair::Depths{sendDepth_, receives}));
  }
}

ConnectionCapabilities VerbsConnection::capabilities() const noexcept {
  const bool gpu = endpoint_->gpuDirect() != GpuDirect::none;
  return {.oneSidedWrites = true,
          .oneSidedAtomics = hardwareAtomics_,
          .deviceMemory = gpu,
          .deviceCounters = gpu && hardwareAtomics_,
          .deviceSignals = gpu && hardwareAtomics_};
}

std::string VerbsConnection::describe() const {
  return fmt::format(
      "rank {} to rank {}: verbs, {}{}, {} queue pairs of {} work requests, adds by "
      "{}, GPUDirect {}",
      endpoint_->options().rank, peer(), endpoint_->nic()->describe(), peerText_, pairs_.size(),
      sendDepth_, hardwareAtomics_ ? "the peer's NIC" : "the peer's CPU",
      toString(endpoint_->gpuDirect()));
}

std::vector<std::byte> VerbsConnection::address() const {
  Address own{};
  own.magic = kMagic;
  own.rank = endpoint_->options().rank;
  own.port = endpoint_->nic()->address();
  own.queuePairs = static_cast<uint32_t>(pairs_.size());
  own.atomics = endpoint_->atomics() ? 1 : 0;
  own.readsAtOnce = readsAtOnce(*endpoint_->nic());
  own.controlKey = controlRegion_->rkey;
  own.control = addressOf(control_.get());
  std::transform(pairs_.begin(), pairs_.end(), own.pairs.begin(),
                 [](const auto& pair) { return pair->address(); });
  std::vector<std::byte> bytes(sizeof(own));
  std::memcpy(bytes.data(), &own, sizeof(own));
  return bytes;
}

void VerbsConnection::connect(std::span<const std::byte> bytes) {
  Address theirs{};
  if (bytes.size() == sizeof(theirs)) std::memcpy(&theirs, bytes.data(), sizeof(theirs));
  check(theirs.magic == kMagic, ErrorCode::invalidArgument,
        "verbs: {} bytes are no address of this transport: did the peer open another one?",
        bytes.size());
  check(theirs.queuePairs == pairs_.size(), ErrorCode::invalidArgument,
        "verbs: {} queue pairs here, {} at rank {}: give all ranks the same "
        "EndpointOptions::queuePairs",
        pairs_.size(), theirs.queuePairs, peer());
  Nic& nic = *endpoint_->nic();
  check(theirs.port.linkLayer == nic.port().link_layer, ErrorCode::unsupported,
        "verbs: {} is {}, the NIC of rank {} is not: name NICs of one network in "
        "EndpointOptions::interface",
        nic.name(), nic.ethernet() ? "Ethernet" : "InfiniBand", peer());
  // Before the peer can write: receives must be there when its first record comes.
  hardwareAtomics_ = endpoint_->atomics() && theirs.atomics != 0;
  if (!hardwareAtomics_) first().postReceives(ControlBlock::kAddSlots);
  const uint8_t reads = std::min(readsAtOnce(nic), theirs.readsAtOnce);
  for (size_t i = 0; i < pairs_.size(); ++i)
    pairs_[i]->connect(theirs.port, theirs.pairs[i], reads);
  theirControl_ = theirs.control;
  theirControlKey_ = theirs.controlKey;
  const uint64_t limit = nic.port().max_msg_sz;  // 0: not told
  largestPiece_ = endpoint_->tuning().largestPiece;
  if (limit > 0) largestPiece_ = std::min(largestPiece_, limit);
  ibv_gid gid{};
  std::copy(theirs.port.gid.begin(), theirs.port.gid.end(), gid.raw);
  peerText_ = fmt::format(" to {} (LID {})", gidText(gid), theirs.port.lid);
  lastSign_ = std::chrono::steady_clock::now();
  connected_ = true;
}

std::shared_ptr<RemoteMemory> VerbsConnection::importMemory(
    std::span<const std::byte> description) {
  return VerbsRemoteMemory::make(description);
}

bool VerbsConnection::canPost() const {
  return failed() || posted() - completed_ < static_cast<uint64_t>(endpoint_->options().queueDepth);
}

void VerbsConnection::doWrite(const Write& write) {
  const auto* local = static_cast<const VerbsMemory*>(write.local);
  const auto* remote = static_cast<const VerbsRemoteMemory*>(write.remote);
  lastOnDevice_ = remote->onDevice();
  operations_.push_back({.readByCpu = !local->onDevice(),
                         .remoteOnDevice = remote->onDevice(),
                         .localKey = local->localKey(),
                         .remoteKey = remote->key(),
                         .local = addressOf(local->memory().data()) + write.localOffset,
                         .remote = remote->address() + write.remoteOffset,
                         .bytes = write.bytes});
}

void VerbsConnection::doAdd(const Add& add) {
  const auto* remote = static_cast<const VerbsRemoteMemory*>(add.remote);
  operations_.push_back({.isAdd = true,
                         .remoteOnDevice = remote->onDevice(),
                         .remoteKey = remote->key(),
                         .remote = remote->address() + add.offset,
                         .value = add.value});
}

void VerbsConnection::doSignal(SignalTarget& target) {
  // Beside the data that it follows it needs no fence.
  const bool onDevice = target.device != nullptr && capabilities().deviceSignals && lastOnDevice_;
  (onDevice ? target.sentToDevice : target.sentToHost) += 1;
  doAdd({.remote = onDevice ? target.device : target.host,
         .offset = onDevice ? target.deviceOffset : target.hostOffset,
         .value = 1});
}

void VerbsConnection::submit() {
  guarded([&] { pump(); });
}

bool VerbsConnection::progress() {
  bool moved = false;
  guarded([&] {
    moved = pollCompletions();
    moved = noticeApplied() || moved;
    const uint64_t before = next_;
    tellApplied();
    pump();
    keepAlive();
    lookForEvents();
    moved = moved || next_ != before;
  });
  return moved;
}

void VerbsConnection::pump() {
  for (; next_ < posted(); ++next_) {
    Operation& operation = at(next_);
    if (!(operation.isAdd ? postAdd(operation) : postWrite(operation))) break;
  }
  for (const auto& pair : pairs_) pair->submit();
  retire();
}

bool VerbsConnection::postWrite(Operation& operation) {
  const bool striped = pairs_.size() > 1 && operation.bytes >= endpoint_->tuning().stripeBytes;
  const uint64_t share = (operation.bytes / pairs_.size() + kPage) / kPage * kPage;
  const uint64_t piece = striped ? std::min(share, largestPiece_) : largestPiece_;
  while (operation.sent < operation.bytes) {
    QueuePair& pair = *pairs_[striped ? operation.sent / piece % pairs_.size() : 0];
    if (pair.room() == 0) return false;
    const auto bytes = static_cast<uint32_t>(std::min(piece, operation.bytes - operation.sent));
    pair.append({.opcode = IBV_WR_RDMA_WRITE,
                 .local = operation.local + operation.sent,
                 .bytes = bytes,
                 .localKey = operation.localKey,
                 .readByCpu = operation.readByCpu,
                 .remote = operation.remote + operation.sent,
                 .remoteKey = operation.remoteKey,
                 .operation = next_});
    operation.sent += bytes;
    ++operation.outstanding;
    unordered_[operation.remoteOnDevice ? 1 : 0] = {true, operation.remote + operation.sent - 1,
                                                    operation.remoteKey};
  }
  return true;
}

bool VerbsConnection::postAdd(Operation& operation) {
  const bool othersIdle =
      std::all_of(pairs_.begin() + 1, pairs_.end(), [](const auto& pair) { return pair->idle(); });
  if (!othersIdle) return false;
  Unordered& here = unordered_[operation.remoteOnDevice ? 1 : 0];
  Unordered& there = unordered_[operation.remoteOnDevice ? 0 : 1];
  Unordered& elsewhere = endpoint_->tuning().fenceEveryAdd ? here : there;
  if (first().room() < (elsewhere.any ? 2U : 1U)) return false;
  if (!hardwareAtomics_ && recordsSent_ - recordsAnswered_ == ControlBlock::kAddSlots) return false;
  QueuePair::Work work{.fence = elsewhere.any, .operation = next_};
  if (elsewhere.any) postFence(elsewhere);
  elsewhere.any = false;
  operation.outstanding = 1;
  if (hardwareAtomics_) {
    work.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
    work.local = addressOf(&control_->result);
    work.bytes = sizeof(control_->result);
    work.remote = operation.remote;
    work.remoteKey = operation.remoteKey;
    work.add = static_cast<uint64_t>(operation.value);
  } else {
    const auto slot = static_cast<uint32_t>(recordsSent_++ % ControlBlock::kAddSlots);
    ControlBlock::AddRecord& record = control_->addsOut[slot];
    record = {operation.remote, operation.value, operation.remoteKey};
    work.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    work.local = addressOf(&record);
    work.bytes = sizeof(record);
    work.readByCpu = true;
    work.remote = theirControl_ + offsetof(ControlBlock, addsIn) + slot * sizeof(record);
    work.remoteKey = theirControlKey_;
    work.immediate = slot;
    awaitingApplied_.push_back(next_);
    ++operation.outstanding;
  }
  work.localKey = controlRegion_->lkey;
  first().append(work);
  here = {true, operation.remote, operation.remoteKey};
  return true;
}

void VerbsConnection::postFence(const Unordered& place) {
  first().append({.opcode = IBV_WR_RDMA_READ,
                  .local = addressOf(&control_->result),
                  .bytes = 1,
                  .localKey = controlRegion_->lkey,
                  .remote = place.address,
                  .remoteKey = place.key,
                  .operation = kNoOperation});
}

}  // namespace mscclpp::transport::verbs
