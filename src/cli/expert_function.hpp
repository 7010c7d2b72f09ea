#pragma once

#include <mscclpp/device/platform.hpp>

/// What an expert of the demo computes: a rotation of each pair of columns, a scale, a shift and a
/// nonlinearity, different for every expert. Only additions, multiplications and divisions, so that
/// CPU and GPU give the same bits.
namespace mscclpp::ep::cli {

struct ExpertParameters {
  float scale;
  float cosine;
  float sine;
  float shift;
};

namespace MSCCLPP_PLATFORM_NS {

__host__ __device__ inline float softsign(float v) {
  return v / (1.0f + (v < 0.0f ? -v : v));
}

/// Columns 2i and 2i + 1 of one token, in place.
__host__ __device__ inline void applyExpert(const ExpertParameters& p, float& even, float& odd) {
  const float a = p.scale * (even * p.cosine - odd * p.sine) + p.shift;
  const float b = p.scale * (even * p.sine + odd * p.cosine) - p.shift;
  even = softsign(a);
  odd = softsign(b);
}

}  // namespace MSCCLPP_PLATFORM_NS
}  // namespace mscclpp::ep::cli
