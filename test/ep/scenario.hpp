#pragma once

#include <map>
#include <mutex>

#include "ep/harness.hpp"
#include "ext/ep/reference.hpp"

/// A routing among ranks, the calls that follow it, and what every one of them must return.
namespace mscclpp::ep::testing {

/// How FP8 scales lie in memory.
enum class Scales {
  f32,
  i32,
  transposed,  ///< f32, token stride 1
  padded,      ///< f32, rows with a gap
};

struct WorldSpec {
  int ranks = 2;
  std::vector<int> tokens = {17};  ///< per rank; starts again when there are more ranks
  int topk = 2;
  int experts = 8;
  reference::Pattern pattern = reference::Pattern::uniform;
  bool mapped = false;  ///< explicit, uneven expert map; also used when ranks do not divide experts
  std::uint64_t seed = 1;
};

/// One routing of all ranks and what follows from it. Shared by the ranks' threads, read only.
class World {
 public:
  explicit World(const WorldSpec& spec);

  const WorldSpec& spec() const { return spec_; }
  int ranks() const { return spec_.ranks; }
  int tokens(int rank) const;
  int maxTokens() const;
  /// Rows of the rank that receives most.
  int maxRows() const;
  bool mapped() const { return mapped_; }
  const reference::Placement& placement() const { return placement_; }
  const reference::Routing& routing(int rank) const;
  const reference::Received& received(int rank) const;
  const std::vector<reference::Received>& allReceived() const { return received_; }

  /// Experts' outputs of every rank (bf16 [rows, hidden], keyed by rank and row), made once.
  using AllRows = std::vector<std::vector<std::uint16_t>>;
  std::shared_ptr<const AllRows> experts(std::uint64_t id, int hidden) const;

 private:
  WorldSpec spec_;
  bool mapped_;
  reference::Placement placement_;
  std::vector<reference::Routing> routing_;
  std::vector<reference::Received> received_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<std::uint64_t, int>, std::shared_ptr<const AllRows>> experts_;
};

struct DispatchCase {
  std::uint64_t id = 1;  ///< keys the payload: another call, other data
  int hidden = 64;
  DType dtype = DType::bf16;
  Scales scales = Scales::f32;  ///< with e4m3
  bool withTopk = true;
  int numSms = 2;
  int worst = 0;
  int alignment = 1;
  DispatchHandle handle = {};  ///< set: a cached dispatch
  bool commStreamOwns = false;
};
DispatchRequest makeDispatch(RankContext& rank, const World& world, const DispatchCase& call);
/// makeDispatch and the call.
DispatchResult dispatch(RankContext& rank, const World& world, const DispatchCase& call);
/// Every output, bit for bit. Waits for the rank's compute stream.
void expectDispatch(RankContext& rank, const World& world, const DispatchCase& call,
                    const DispatchResult& result);
/// Only that the first rows of `recvX` are the ones that were sent.
void expectRows(RankContext& rank, const World& world, const DispatchCase& call,
                const Tensor& recvX);

struct CombineCase {
  std::uint64_t id = 2;
  int hidden = 64;
  bool inPool = true;  ///< the experts' output comes from the pool, as far as it has room
  int biases = 0;
  int weightColumns = 0;  ///< > 0: combine weights [rows, weightColumns] too
  int numSms = 2;
};
CombineRequest makeCombine(RankContext& rank, const World& world, const CombineCase& call,
                           const DispatchHandle& handle);
CombineResult combine(RankContext& rank, const World& world, const CombineCase& call,
                      const DispatchHandle& handle);
void expectCombine(RankContext& rank, const World& world, const CombineCase& call,
                   const CombineResult& result);

/// An explicit map when the world has one.
ExpertMap expertMapOf(RankContext& rank, const World& world);
/// x of one rank, the bytes of [tokens, hidden].
std::vector<std::uint8_t> inputRows(const World& world, const DispatchCase& call, int rank);

}  // namespace mscclpp::ep::testing
