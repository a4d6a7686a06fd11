// Passes over the ids of a chunk: pairs counted, residuals summed, codes rewritten.
#pragma once
#include "../hashing.h"
#include "../packing.h"

// Of new codes, which are whole integers.
INLINE int64_t code_at(const void *codes, int64_t bytes, int64_t at) {
  if (bytes == 1) return ((const uint8_t *)codes)[at];
  if (bytes == 2) return ((const uint16_t *)codes)[at];
  return ((const int32_t *)codes)[at];
}

// The codes of a chunk: a column of packed codes, whose first id is `base`. With counts of ids, of
// four bits each, pairs of other levels are others; num_levels is 1 without.
struct Column {
  Codes codes;
  int64_t column, base;
  const uint8_t *counts;
  int64_t num_levels;
};

// Codes, levels and mixed ids of [first, first + count), found in vectors ahead of the rows they
// lead to.
struct Ids {
  static const int64_t MOST = 256;
  int64_t count, code[MOST], level[MOST], mixed[MOST];
  // Rows of the codebooks of points: main by level, and helper level by level.
  METHOD int64_t main_row(const Column &c, int64_t i) const {
    return code[i] * c.num_levels + level[i];
  }
  METHOD int64_t helper_row(int64_t i, int64_t b, int64_t num_helper) const {
    return level[i] * num_helper + b;
  }
};

template <typename Code>
INLINE void copy_codes(const uint8_t *from, int64_t stride, int64_t count, int64_t *out) {
  typedef Code Unaligned __attribute__((aligned(1), may_alias));
  for (int64_t i = 0; i < count; i++) out[i] = *(const Unaligned *)(from + i * stride);
}

INLINE void read_codes(const Codes &codes, int64_t column, int64_t first, int64_t count,
                       int64_t *out) {
  const uint8_t *from = codes.byte_of(first, column);
  if (codes.bits == 8) return copy_codes<uint8_t>(from, codes.stride, count, out);
  if (codes.bits == 16) return copy_codes<uint16_t>(from, codes.stride, count, out);
  for (int64_t i = 0; i < count; i++) out[i] = codes.of(first + i, column);
}

INLINE void read_ids(const Column &column, int64_t first, int64_t last, Ids &ids) {
  ids.count = last - first < Ids::MOST ? last - first : Ids::MOST;
  read_codes(column.codes, column.column, first - column.base, ids.count, ids.code);
  for (int64_t i = 0; i < ids.count; i++) ids.mixed[i] = mix(first + i);
  for (int64_t i = 0; i < ids.count; i++) {
    const int64_t at = first - column.base + i;
    ids.level[i] = column.counts ? column.counts[at >> 1] >> (at & 1) * 4 & 15 : 0;
  }
}

INLINE void hash_all(const Ids &ids, int64_t multiplier, int64_t addend, int64_t rows,
                     int64_t *out) {
  for (int64_t i = 0; i < ids.count; i++) out[i] = hashed(ids.mixed[i], multiplier, addend, rows);
}

// New codes are of every pair, or of ids from `first` on.
INLINE int64_t new_code(const void *new_codes, int64_t by_pair, int64_t bytes, int64_t pair,
                        int64_t position) {
  return code_at(new_codes, bytes, by_pair ? pair : position);
}

extern "C" {

// counts[code * num_helper + hash] += weight (1 where weights is null; weights start at id first),
// over ids [first, last).
void cce_count_pairs_leveled(const Column *column, int64_t first, int64_t last,
                             int64_t multiplier, int64_t addend,
                             int64_t num_helper, const int64_t *weights, int64_t *counts) {
  Ids ids;
  int64_t b[Ids::MOST];
  for (int64_t id = first; id < last; id += ids.count) {
    read_ids(*column, id, last, ids);
    hash_all(ids, multiplier, addend, num_helper, b);
    for (int64_t i = 0; i < ids.count; i++)
      counts[ids.main_row(*column, i) * num_helper + b[i]] += weights ? weights[id - first + i] : 1;
  }
}

// Over ids [first, last): sums[new hash] += main[code] + helper[old hash] - centroid[new code],
// sizes[new hash] += 1.
void cce_residuals_leveled(const Column *column, int64_t first, int64_t last,
                           const void *new_codes, int64_t bytes, int64_t by_pair,
                           int64_t old_multiplier, int64_t old_addend, int64_t new_multiplier,
                           int64_t new_addend, int64_t num_helper, int64_t dim,
                           const int32_t *main_points, const int32_t *helper_points,
                           const int32_t *centroids, int64_t *sums, int64_t *sizes) {
  Ids ids;
  int64_t b[Ids::MOST], row[Ids::MOST];
  for (int64_t id = first; id < last; id += ids.count) {
    read_ids(*column, id, last, ids);
    hash_all(ids, old_multiplier, old_addend, num_helper, b);
    hash_all(ids, new_multiplier, new_addend, num_helper, row);
    for (int64_t i = 0; i < ids.count; i++) {
      const int64_t a = ids.main_row(*column, i);
      const int32_t *m = main_points + a * dim;
      const int32_t *h = helper_points + ids.helper_row(i, b[i], num_helper) * dim;
      const int64_t pair = a * num_helper + b[i];
      const int64_t c = new_code(new_codes, by_pair, bytes, pair, id - first + i);
      const int32_t *center = centroids + c * dim;
      int64_t *sum = sums + row[i] * dim;
      for (int64_t d = 0; d < dim; d++) sum[d] += (int64_t)m[d] + h[d] - center[d];
      sizes[row[i]]++;
    }
  }
}

// Writes the new codes of ids [first, last) if `write`; returns how many are others.
int64_t cce_relabel_leveled(const Column *column, int64_t first, int64_t last,
                            const void *new_codes, int64_t bytes, int64_t by_pair,
                            int64_t multiplier, int64_t addend, int64_t num_helper,
                            int64_t write) {
  int64_t changed = 0, b[Ids::MOST];
  Ids ids;
  for (int64_t id = first; id < last; id += ids.count) {
    read_ids(*column, id, last, ids);
    hash_all(ids, multiplier, addend, num_helper, b);
    for (int64_t i = 0; i < ids.count; i++) {
      const int64_t pair = ids.main_row(*column, i) * num_helper + b[i];
      const int64_t c = new_code(new_codes, by_pair, bytes, pair, id - first + i);
      changed += c != ids.code[i];
      if (write) column->codes.set(id + i - column->base, column->column, c);
    }
  }
  return changed;
}

}  // extern "C"
