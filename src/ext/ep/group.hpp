#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/platform.hpp>

#include "kernels/api.cuh"
#include "kernels/internode_api.cuh"
#include "kernels/low_latency_api.cuh"
#include "low_latency_calls.hpp"
#include "pool.hpp"
#include "port_peers.hpp"
#include "rails.hpp"

namespace mscclpp::ep {

/// Text for what a kernel left in the failure record.
std::string describeFailure(const FailureRecord& record);

/// A rank's place in the group: its heap and its peers', streams, failure record, kernels. Shared
/// by the Buffer and by every tensor it has handed out, so that memory outlives the Buffer if it
/// must.
class Group : public std::enable_shared_from_this<Group> {
 public:
  /// Collective: compares options among the ranks, allocates the heap, maps the peers'.
  Group(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options);
  /// Waits for this rank's own work, also for what callers enqueued on pool tensors they dropped.
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return bootstrap_->rank(); }
  int ranks() const { return bootstrap_->size(); }
  std::uint64_t id() const { return id_; }
  const BufferOptions& options() const { return options_; }
  const Topology& topology() const { return topology_; }
  std::vector<ProxyStatistics> proxyStatistics() const {
    return ports_ ? ports_->statistics() : std::vector<ProxyStatistics>{};
  }
  /// Null when all ranks share a node.
  PortPeers* ports() const { return ports_.get(); }
  /// Only when the group spans nodes.
  const RailArgs& rails() const { return rails_->args(); }
  const RailPlan& railPlan() const { return railPlan_; }
  const InternodeKernels& internodeKernels() const { return *internodeKernels_; }
  const MemoryPlan& plan() const { return plan_; }
  Device& device() const { return *device_; }
  Stream& comm() { return comm_; }
  /// Calls of a group never run side by side: two kernels that wait for their peers could shut each
  /// other out. These make the communication stream, or a caller's, the one that goes on; it waits
  /// for what the group did on another.
  void enterComm();
  void enterCaller(Stream& caller);
  /// Blocks until everything that the group has enqueued is done.
  void synchronize();
  /// The same, and until this rank's proxies have delivered what that work told peers of other
  /// nodes: they may still need it when this rank is done.
  void drain();
  Pool& pool() { return pool_; }
  const IntranodeKernels& kernels() const { return *kernels_; }
  char* heap() const { return static_cast<char*>(heap_.get()); }
  bool inPool(const void* p) const;
  /// Blocks that a kernel may use: `wanted`, but no more than this rank's share of the device.
  int blocks(int wanted) const;
  GroupArgs args() const;
  const LowLatencyKernels& lowLatencyKernels() const { return *lowLatencyKernels_; }
  const LowLatencyPlan& lowLatencyPlan() const { return lowLatencyPlan_; }
  LowLatencyGroup lowLatencyArgs() const;
  LowLatencyCalls& lowLatencyCalls(LowLatencyKind kind) {
    return lowLatencyCalls_[static_cast<int>(kind)];
  }
  /// Blocks for a low-latency kernel that asked for `wanted`, 0 = as many as there are.
  int lowLatencyBlocks(int wanted) const {
    return blocks(wanted > 0 ? wanted : device_->multiprocessors());
  }
  /// Of this rank's heap, as the host knows it: a device address.
  char* lowLatencyRegion() const { return heap() + plan_.lowLatency(); }

  /// Throws what the kernels reported; the group then stays broken.
  void raiseIfFailed();
  bool broken() const { return !broken_.empty(); }

  NotifyResult& notifyResult() const { return *static_cast<NotifyResult*>(notifyResult_.get()); }
  /// Runs nothing: waits on the host until notify number `sequence` has answered.
  void awaitNotify(std::uint32_t sequence);
  std::uint32_t nextSequence() { return ++sequence_; }

  /// Wraps the caller's stream. Null is the host on the CPU platform, the default stream on CUDA.
  Stream borrow(void* computeStream) const { return device_->borrowStream(computeStream); }

  /// Ordinary memory, allocated on `allocateOn`; given back when both `owner`'s work and the
  /// communication enqueued at that time are done.
  std::shared_ptr<void> allocate(std::size_t bytes, Stream& allocateOn, void* owner);
  /// A piece of the pool, or null when it is full. Released as above.
  std::shared_ptr<void> takeFromPool(std::size_t bytes, Stream& useOn, void* owner);

  /// Waits for all work and all peers, then unmaps them. Collective.
  void close();

 private:
  void mapPeers();
  void initialiseLowLatency();
  /// The caller's stream `owner` and the communication stream, as of now.
  std::vector<Event> usersNow(void* owner);

  std::shared_ptr<Bootstrap> bootstrap_;
  BufferOptions options_;
  std::shared_ptr<Device> device_;
  Topology topology_;
  const InternodeKernels* internodeKernels_;
  RailPlan railPlan_;
  MemoryPlan plan_;
  Stream comm_, reclaim_;
  bool commUsed_ = false;       ///< since a caller's stream last waited for it
  bool callerUsed_ = false;     ///< lastCaller_ has work that comm_ has not waited for
  void* lastCaller_ = nullptr;  ///< native; borrowed
  std::mutex reclaimMutex_;     // tensors are dropped from any thread
  std::shared_ptr<void> heap_;
  std::vector<std::shared_ptr<void>> peers_;
  std::shared_ptr<void> heapTable_, failure_, notifyResult_;
  std::unique_ptr<PortPeers> ports_;  // its proxies use what is above
  std::unique_ptr<Rails> rails_;
  Pool pool_;
  const IntranodeKernels* kernels_ = nullptr;
  LowLatencyPlan lowLatencyPlan_;
  const LowLatencyKernels* lowLatencyKernels_ = nullptr;
  LowLatencyCalls lowLatencyCalls_[kLowLatencyKinds];
  int sharers_ = 1;  // ranks on this device
  std::uint64_t id_ = 0;
  std::uint32_t sequence_ = 0;
  std::string broken_;
};

}  // namespace mscclpp::ep
