// Vectors as wide as the registers of the level that this is compiled for: wider ones, which the
// compiler would cut up, took 2 to 17 times longer. No result depends on the width.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "../hashing.h"
#include "../lanes.h"

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

// Candidate: the best score of each lane so far, and the group it came from.
struct Best { vf score; vi group; };

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }

INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vi smaller(vi a, vi b) { return a < b ? a : b; }

template <int... I>
INLINE vi counted(std::integer_sequence<int, I...>) { return (vi){I...}; }
INLINE vi lanes() { return counted(std::make_integer_sequence<int, LANES>()); }

// Lane i of the result is lane i ^ HALF.
#if defined(__clang__)
template <int HALF, typename V, int... I>
INLINE V shuffled(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ HALF)...);
}
template <int HALF, typename V>
INLINE V swapped(V v) { return shuffled<HALF>(v, std::make_integer_sequence<int, LANES>()); }
#else
template <int HALF, typename V>
INLINE V swapped(V v) { return __builtin_shuffle(v, lanes() ^ HALF); }
#endif

template <int HALF = LANES / 2>
INLINE float top_of(vf v) {
  if constexpr (HALF == 1) return v[0] > v[1] ? v[0] : v[1];
  else return top_of<HALF / 2>(larger(v, swapped<HALF>(v)));
}

template <int HALF = LANES / 2>
INLINE int32_t lowest_of(vi v) {
  if constexpr (HALF == 1) return v[0] < v[1] ? v[0] : v[1];
  else return lowest_of<HALF / 2>(smaller(v, swapped<HALF>(v)));
}

INLINE void keep_larger(Best &best, vf score, int64_t group) {
  const vi better = score > best.score;
  best.score = better ? score : best.score;
  best.group = better ? (vi){} + (int32_t)group : best.group;
}
