#pragma once

#include "ep/harness.hpp"
#include "ext/ep/reference_low_latency.hpp"

/// A routing among ranks and what the low-latency calls must return for it.
namespace mscclpp::ep::testing {

struct LowLatencySpec {
  int ranks = 2;
  std::vector<int> tokens = {5};  ///< per rank; starts again when there are more ranks
  int topk = 2;
  int experts = 8;
  reference::Pattern pattern = reference::Pattern::uniform;
  int maxTokens = 0;  ///< 0: as many as some rank has
  std::uint64_t seed = 1;
};

class LowLatencyWorld {
 public:
  explicit LowLatencyWorld(const LowLatencySpec& spec);

  const LowLatencySpec& spec() const { return spec_; }
  int ranks() const { return spec_.ranks; }
  int tokens(int rank) const;
  int maxTokens() const { return maxTokens_; }
  int localExperts() const { return received_.at(0).localExperts; }
  /// Rows of a received tensor, used or not.
  int slots() const { return localExperts() * ranks() * maxTokens(); }
  const reference::Placement& placement() const { return placement_; }
  const reference::Routing& routing(int rank) const;
  const reference::LowLatencyReceived& received(int rank) const;
  const std::vector<reference::LowLatencyReceived>& allReceived() const { return received_; }

 private:
  LowLatencySpec spec_;
  int maxTokens_ = 0;
  reference::Placement placement_;
  std::vector<reference::Routing> routing_;
  std::vector<reference::LowLatencyReceived> received_;
};

struct LowLatencyCase {
  std::uint64_t id = 1;  ///< keys the payload
  int hidden = 64;
  bool fp8 = false;
  bool roundScale = false;
  bool ue8m0 = false;
  bool hook = false;
  bool logfmt = false;   ///< combine's sums travel that way
  bool outputs = false;  ///< the caller brings them, poisoned
  int numSms = 0;
  bool source = false;  ///< the combine is reduced at home
};

/// Options of a Buffer whose region holds every case with this hidden on this world that is reduced
/// on the experts' ranks.
BufferOptions lowLatencyOptions(const LowLatencyWorld& world, int hidden);
/// The same for cases that are reduced at home. `spansNodes`: also when they go between nodes.
BufferOptions sourceOptions(const LowLatencyWorld& world, int hidden, bool spansNodes);
/// The same for all, on any nodes.
BufferOptions roomForBoth(const LowLatencyWorld& world, int hidden);

LowLatencyDispatchResult lowLatencyDispatch(RankContext& rank, const LowLatencyWorld& world,
                                            const LowLatencyCase& call);
/// Every output, bit for bit. Waits for the rank's compute stream.
void expectLowLatencyDispatch(RankContext& rank, const LowLatencyWorld& world,
                              const LowLatencyCase& call, const LowLatencyDispatchResult& result);

/// Experts' outputs keyed by rank, expert and row: rows that nobody may read are NaN.
std::vector<std::uint16_t> lowLatencyExperts(const LowLatencyWorld& world, std::uint64_t id,
                                             int hidden, int rank);
LowLatencyCombineResult lowLatencyCombine(RankContext& rank, const LowLatencyWorld& world,
                                          const LowLatencyCase& call,
                                          const LowLatencyHandle& handle);
/// What rank `home` must get when the experts return `y`, per rank.
std::vector<std::uint16_t> combinedReference(const LowLatencyWorld& world,
                                             const LowLatencyCase& call,
                                             const std::vector<std::vector<std::uint16_t>>& y,
                                             int home);
void expectLowLatencyCombine(RankContext& rank, const LowLatencyWorld& world,
                             const LowLatencyCase& call, const LowLatencyCombineResult& result);
/// Dispatch as `sent` says, combine as `back` says, hooks included; then both are checked.
void lowLatencyRoundTrip(RankContext& rank, const LowLatencyWorld& world,
                         const LowLatencyCase& sent, const LowLatencyCase& back);
inline void lowLatencyRoundTrip(RankContext& rank, const LowLatencyWorld& world,
                                const LowLatencyCase& call) {
  lowLatencyRoundTrip(rank, world, call, call);
}

/// Two ranks combine after the same dispatch, rank 0 as `odd` says, rank 1 plainly: what each
/// throws, with a limit of a second.
std::vector<std::string> combineUnequally(const LowLatencyCase& odd);

}  // namespace mscclpp::ep::testing
