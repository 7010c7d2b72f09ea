// {fmt}, in a form that nvcc compiles: fmt 9 switches constexpr off for nvcc, which then cannot
// evaluate fmt's compile-time check of format strings.
#pragma once

#if defined(__CUDACC__) && !defined(FMT_USE_CONSTEXPR)
#define FMT_USE_CONSTEXPR 1
#endif

#include <fmt/format.h>
