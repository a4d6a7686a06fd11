// Packed codes as kernels read and write them; packing.py says how they lie.
#pragma once
#include <cstdint>
#include <cstring>

#include "hashing.h"

#define METHOD inline __attribute__((always_inline))

// As compiled.py's `packed_codes` describes them.
struct Codes {
  uint8_t *at, *end;
  int64_t bits;
  int64_t shift;   // a row has the codes of 1 << shift ids
  int64_t width;   // bytes of a chunk in a row
  int64_t stride;  // bytes of a row

  METHOD uint64_t mask() const { return ((uint64_t)1 << bits) - 1; }
  METHOD int64_t bit_of(int64_t id) const { return (id & ((1 << shift) - 1)) * bits; }
  METHOD uint8_t *byte_of(int64_t id, int64_t column) const {
    return at + (id >> shift) * stride + column * width + (bit_of(id) >> 3);
  }
  // The eight bytes from `from` on, those beyond the end as 0.
  METHOD uint64_t word(const uint8_t *from) const {
    uint64_t found = 0;
    // Codes of no bits are nowhere, which memcpy may not be given.
    if (from < end) std::memcpy(&found, from, end - from < 8 ? end - from : 8);
    return found;
  }
  METHOD int64_t of(int64_t id, int64_t column) const {
    const uint8_t *from = byte_of(id, column);
    uint64_t found;
    if (end - from >= 8) std::memcpy(&found, from, 8);
    else found = word(from);
    return (found >> (bit_of(id) & 7)) & mask();
  }
  // Not for several threads at once: codes of neighbours share bytes.
  METHOD void set(int64_t id, int64_t column, uint64_t code) const {
    uint8_t *to = byte_of(id, column);
    const int64_t low = bit_of(id) & 7, size = (low + bits + 7) >> 3;
    const uint64_t found = (word(to) & ~(mask() << low)) | (code << low);
    if (size) std::memcpy(to, &found, size);
  }
};
