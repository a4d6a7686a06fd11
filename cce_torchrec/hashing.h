// The hash of hashing.py for the compiled kernels: an id is mixed once, then hashed to rows.
#pragma once
#include <cstdint>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t mix(int64_t id) {
  uint64_t z = (uint64_t)id;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (int64_t)(z ^ (z >> 31));
}

INLINE int64_t hashed(int64_t mixed, int64_t multiplier, int64_t addend, int64_t rows) {
  const uint64_t bits = ((uint64_t)mixed * (uint64_t)multiplier + (uint64_t)addend) >> 33;
  return (int64_t)((bits * (uint64_t)rows) >> 31);
}
