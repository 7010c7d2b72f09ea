#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

#include "buffer_impl.hpp"
#include "checks.hpp"
#include "handle.hpp"
#include "tensors.hpp"

namespace mscclpp::ep {

ExpertMap Buffer::createExpertMap(const std::vector<int>& rankOfExpert) {
  Group& group = impl_->alive();
  const int experts = static_cast<int>(rankOfExpert.size()), ranks = group.ranks();
  check(experts >= 1 && experts <= CallShape::kMaxExperts, ErrorCode::invalidArgument,
        "the expert map has {} experts: allowed are 1 .. {}", experts, CallShape::kMaxExperts);
  auto state = std::make_shared<ExpertMapState>();
  state->groupId = group.id();
  state->experts = experts;
  state->hash = 1469598103934665603ull;  // FNV-1a
  std::vector<std::int32_t> rankOf(rankOfExpert.begin(), rankOfExpert.end()), indexOf, listed;
  std::vector<std::vector<std::int32_t>> byRank(static_cast<std::size_t>(ranks));
  for (int e = 0; e < experts; ++e) {
    const int r = rankOfExpert[static_cast<std::size_t>(e)];
    check(r >= 0 && r < ranks, ErrorCode::invalidArgument,
          "the expert map puts expert {} on rank {}: ranks are 0 .. {}", e, r, ranks - 1);
    auto& hosted = byRank[static_cast<std::size_t>(r)];
    indexOf.push_back(static_cast<std::int32_t>(hosted.size()));
    hosted.push_back(e);
    state->hash = (state->hash ^ static_cast<std::uint64_t>(r)) * 1099511628211ull;
  }
  for (const auto& hosted : byRank) {
    check(static_cast<int>(hosted.size()) <= group.options().maxExpertsPerRank,
          ErrorCode::invalidArgument,
          "the expert map puts {} experts on one rank, more than max_experts_per_rank = {}",
          hosted.size(), group.options().maxExpertsPerRank);
    state->firstOf.push_back(static_cast<std::int32_t>(listed.size()));
    listed.insert(listed.end(), hosted.begin(), hosted.end());
  }
  state->firstOf.push_back(experts);
  std::vector<std::int32_t> tables;
  for (const auto* part : {&rankOf, &indexOf, &listed, &state->firstOf}) {
    tables.insert(tables.end(), part->begin(), part->end());
  }
  void* commStream = group.comm().native();
  state->tables = viewOf(group.allocate(tables.size() * 4, group.comm(), commStream), 0, DType::i32,
                         {static_cast<std::int64_t>(tables.size())}, group);
  group.device().copy(state->tables.data, tables.data(), tables.size() * 4, group.comm());
  group.comm().synchronize();
  return ExpertMap(std::move(state));
}

ExpertArgs ExpertMapState::args(int rank) const {
  ExpertArgs out;
  const auto at = static_cast<std::size_t>(rank);
  out.experts = experts;
  out.localExperts = firstOf[at + 1] - firstOf[at];
  out.rankOf = tables.as<const std::int32_t>();
  out.indexOf = out.rankOf + experts;
  out.listed = out.indexOf + experts;
  out.firstOf = out.listed + experts;
  return out;
}

}  // namespace mscclpp::ep
