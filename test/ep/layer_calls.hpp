#pragma once

#include "ep/low_latency_scenario.hpp"
#include "ep/scenario.hpp"

/// What ranks that are processes do: some calls of every kind, checked bit for bit.
namespace mscclpp::ep::testing {

World layerWorld(int ranks);
/// High-throughput calls, in an order that one handle after the other survives.
void runLayerCalls(RankContext& rank);

inline constexpr int kDecodingHidden = 264;
LowLatencyWorld decodingWorld(int ranks);
/// Of a Buffer for the calls below.
BufferOptions decodingOptions(int ranks);
/// Low-latency calls, whole and in halves.
void runDecodingCalls(RankContext& rank);

}  // namespace mscclpp::ep::testing
