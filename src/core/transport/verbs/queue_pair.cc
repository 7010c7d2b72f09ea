#include "core/transport/verbs/queue_pair.hpp"

#include <algorithm>
#include <cerrno>
#include <random>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::verbs {

namespace {

constexpr uint32_t kInlineBytes = 64;
constexpr uint32_t kPacketNumbers = 1U << 24;
/// An acknowledgement is waited for 4.096 us * 2^14 = 67 ms (some NICs take up to four times that),
/// and the packet sent again 6 times: a dead peer is noticed after half a second to two. 7 retries
/// would mean "for ever" on some devices, soft-RoCE among them.
constexpr uint8_t kAckTimeout = 14;
constexpr uint8_t kRetries = 6;
/// A receiver that has no receive ready gets this many tries (7 = for ever): none should be needed,
/// the sender knows how many there are.
constexpr uint8_t kReceiverRetries = 6;
constexpr uint8_t kReceiverDelay = 12;  // 0.64 ms
constexpr uint8_t kHops = 64;

ibv_qp* create(Nic& nic, ibv_cq* completions, QueuePair::Depths depths, uint32_t& maxInline) {
  ibv_qp_init_attr attributes{};
  attributes.send_cq = completions;
  attributes.recv_cq = completions;
  attributes.qp_type = IBV_QPT_RC;
  attributes.cap = {.max_send_wr = depths.sends,
                    .max_recv_wr = depths.receives,
                    .max_send_sge = 1,
                    .max_recv_sge = 1,
                    .max_inline_data = kInlineBytes};
  ibv_qp* const pair = library().createQp(nic.pd(), &attributes);
  if (pair == nullptr) {
    throw SystemError(
        errno, fmt::format("verbs: a queue pair of {} for {} sends and {} receives (it has {} "
                           "queue pairs in all, of at most {} work requests)",
                           nic.name(), depths.sends, depths.receives, nic.limits().max_qp,
                           nic.limits().max_qp_wr));
  }
  maxInline = attributes.cap.max_inline_data;
  return pair;
}

}  // namespace

QueuePair::QueuePair(std::shared_ptr<Nic> nic, ibv_cq* completions, unsigned index, Depths depths)
    : nic_(std::move(nic)),
      index_(index),
      depths_(depths),
      pair_(create(*nic_, completions, depths, maxInline_), library().destroyQp),
      firstPacket_(std::random_device()() % kPacketNumbers),
      operations_(depths.sends) {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = nic_->portNumber();
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
                               (nic_->atomics() ? IBV_ACCESS_REMOTE_ATOMIC : 0);
  modify(attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, "INIT");
}

QueuePair::~QueuePair() {
  const uint32_t number = pair_->qp_num;
  pair_.reset();
  nic_->events().forget(number);
}

void QueuePair::modify(ibv_qp_attr& attributes, int mask, const char* to) {
  const int error = library().modifyQp(pair_.get(), &attributes, mask);
  if (error != 0) {
    throw SystemError(
        error, fmt::format("verbs: queue pair {} of {} to {}", pair_->qp_num, nic_->name(), to));
  }
}

void QueuePair::connect(const PortAddress& port, const QueuePairAddress& peer,
                        uint8_t readsAtOnce) {
  const PortAddress own = nic_->address();
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = static_cast<ibv_mtu>(std::min(own.mtu, port.mtu));
  attributes.dest_qp_num = peer.number;
  attributes.rq_psn = peer.firstPacket;
  attributes.max_dest_rd_atomic = readsAtOnce;
  attributes.min_rnr_timer = kReceiverDelay;
  ibv_ah_attr& path = attributes.ah_attr;
  path.port_num = nic_->portNumber();
  path.dlid = port.lid;
  // Within a subnet of InfiniBand the LID is enough; RoCE has none.
  constexpr int kPrefixBytes = 8;
  path.is_global = nic_->ethernet() ||
                   !std::equal(own.gid.begin(), own.gid.begin() + kPrefixBytes, port.gid.begin());
  std::copy(port.gid.begin(), port.gid.end(), path.grh.dgid.raw);
  path.grh.sgid_index = nic_->gidIndex();
  path.grh.hop_limit = kHops;
  modify(attributes,
         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
         "RTR");
  attributes = {};
  attributes.qp_state = IBV_QPS_RTS;
  attributes.timeout = kAckTimeout;
  attributes.retry_cnt = kRetries;
  attributes.rnr_retry = kReceiverRetries;
  attributes.sq_psn = firstPacket_;
  attributes.max_rd_atomic = readsAtOnce;
  modify(attributes,
         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
             IBV_QP_MAX_QP_RD_ATOMIC,
         "RTS");
  peer_ = peer.number;
}

void QueuePair::append(const Work& work) {
  ibv_send_wr& request = chain_[chained_];
  ibv_sge& piece = pieces_[chained_];
  piece = {.addr = work.local, .length = work.bytes, .lkey = work.localKey};
  request = {};
  request.wr_id = posted_ * kMaxPairs + index_;
  request.sg_list = &piece;
  request.num_sge = work.bytes == 0 ? 0 : 1;
  request.opcode = work.opcode;
  if (work.fence) request.send_flags |= IBV_SEND_FENCE;
  if (work.readByCpu && work.bytes <= maxInline_) request.send_flags |= IBV_SEND_INLINE;
  if (work.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
    request.wr.atomic.remote_addr = work.remote;
    request.wr.atomic.rkey = work.remoteKey;
    request.wr.atomic.compare_add = work.add;
  } else {
    request.wr.rdma.remote_addr = work.remote;
    request.wr.rdma.rkey = work.remoteKey;
    request.imm_data = htobe32(work.immediate);
  }
  if (chained_ > 0) chain_[chained_ - 1].next = &request;
  operations_[posted_ % operations_.size()] = work.operation;
  ++posted_;
  if (++chained_ == kChain) submit();
}

void QueuePair::submit() {
  if (chained_ == 0) return;
  // One completion for the chain: those before it are done as well.
  chain_[chained_ - 1].send_flags |= IBV_SEND_SIGNALED;
  chained_ = 0;
  ibv_send_wr* bad = nullptr;
  const int error = ibv_post_send(pair_.get(), chain_.data(), &bad);
  if (error != 0) {
    throw SystemError(
        error, fmt::format("ibv_post_send on queue pair {} of {}", pair_->qp_num, nic_->name()));
  }
}

void QueuePair::postReceives(uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    ibv_recv_wr request{};
    request.wr_id = index_;
    ibv_recv_wr* bad = nullptr;
    const int error = ibv_post_recv(pair_.get(), &request, &bad);
    if (error != 0) {
      throw SystemError(
          error, fmt::format("ibv_post_recv on queue pair {} of {}", pair_->qp_num, nic_->name()));
    }
  }
}

}  // namespace mscclpp::transport::verbs
