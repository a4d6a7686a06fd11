// Expansion of one table's ids into codebook rows in one pass: bounds, codes, hashes, rows.
// Loaded by native.py through ctypes; the torch form in expand.py is its reference.
#include <cstdint>

#include "../hashing.h"

static const int64_t TILE = 256;  // ids whose codes are fetched while those before are expanded

// One chunk, as native.py lays it out: column of the codes, then the hashes of main and helper.
struct Chunk { int64_t column, main_multiplier, main_addend, helper_multiplier, helper_addend; };

// Ids [first, last) into `out`, those out of bounds as 0; counts them and keeps the first.
template <typename Id>
INLINE int64_t checked(const Id *ids, int64_t count, int64_t num_embeddings, int64_t *out,
                       int64_t *bad) {
  int64_t invalid = 0;
  for (int64_t i = 0; i < count; i++) {
    const bool inside = (uint64_t)(int64_t)ids[i] < (uint64_t)num_embeddings;
    invalid += !inside;
    out[i] = inside ? (int64_t)ids[i] : 0;
  }
  if (invalid && *bad < 0)
    for (int64_t i = 0; *bad < 0; i++)
      if ((uint64_t)(int64_t)ids[i] >= (uint64_t)num_embeddings) *bad = i;
  return invalid;
}

template <typename Code>
INLINE void fetch(const Code *codes, int64_t stride, const int64_t *ids, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    __builtin_prefetch(codes + ids[i] * stride);
    __builtin_prefetch(codes + ids[i] * stride + stride - 1);
  }
}

// Rows of the ids of one tile and chunk; `codes` is null where the code is the hash.
template <typename Code>
INLINE void rows_of(const int64_t *ids, const int64_t *mixed, int64_t count, const Code *codes,
                    int64_t stride, const Chunk &c, int64_t num_rows, int64_t helper_rows,
                    int64_t *out) {
  int64_t main_row[TILE];
  if (codes)
    for (int64_t i = 0; i < count; i++) main_row[i] = codes[ids[i] * stride + c.column];
  else
    for (int64_t i = 0; i < count; i++)
      main_row[i] = hashed(mixed[i], c.main_multiplier, c.main_addend, num_rows);
  if (!helper_rows) {
    for (int64_t i = 0; i < count; i++) out[i] = main_row[i];
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    out[2 * i] = main_row[i];
    out[2 * i + 1] =
        num_rows + hashed(mixed[i], c.helper_multiplier, c.helper_addend, helper_rows);
  }
}

template <typename Id, typename Code>
INLINE int64_t expand(const Id *ids, int64_t count, int64_t num_embeddings, const Code *codes,
                      int64_t stride, const Chunk *chunks, int64_t num_chunks, int64_t num_rows,
                      int64_t helper_rows, int64_t *out, int64_t *bad) {
  int64_t held[2][TILE], mixed[TILE], invalid = 0;
  const int64_t rows_per_id = helper_rows ? 2 : 1;
  for (int64_t first = -TILE; first < count; first += TILE) {
    int64_t *now = held[(first / TILE) & 1], *next = held[(first / TILE + 1) & 1];
    const int64_t start = first + TILE, ahead = count - start < TILE ? count - start : TILE;
    if (ahead > 0) {
      int64_t found = -1;
      invalid += checked(ids + start, ahead, num_embeddings, next, &found);
      if (found >= 0 && *bad < 0) *bad = start + found;
      if (codes) fetch(codes, stride, next, ahead);
    }
    if (first < 0) continue;
    const int64_t here = count - first < TILE ? count - first : TILE;
    if (helper_rows || !codes)
      for (int64_t i = 0; i < here; i++) mixed[i] = mix(now[i]);
    for (int64_t j = 0; j < num_chunks; j++)
      rows_of(now, mixed, here, codes, stride, chunks[j], num_rows, helper_rows,
              out + (j * count + first) * rows_per_id);
  }
  return invalid;
}

template <typename Id>
INLINE int64_t by_code(const Id *ids, int64_t count, int64_t num_embeddings, const void *codes,
                       int64_t code_bytes, int64_t stride, const Chunk *chunks,
                       int64_t num_chunks, int64_t num_rows, int64_t helper_rows, int64_t *out,
                       int64_t *bad) {
#define EXPAND(type)                                                                      \
  expand(ids, count, num_embeddings, (const type *)codes, stride, chunks, num_chunks,     \
         num_rows, helper_rows, out, bad)
  if (code_bytes == 1) return EXPAND(uint8_t);
  if (code_bytes == 2) return EXPAND(uint16_t);
  return EXPAND(int32_t);
#undef EXPAND
}

extern "C" {

// out[j, i, :] = rows of ids[i] in chunk j, ids out of [0, num_embeddings) read as 0. Returns how
// many those are; *bad is the position of the first, or stays -1. `codes` may be null.
ID_CLONES int64_t cce_expand(const void *ids, int64_t id_bytes, int64_t count,
                          int64_t num_embeddings, const void *codes, int64_t code_bytes,
                          int64_t stride, const Chunk *chunks, int64_t num_chunks,
                          int64_t num_rows, int64_t helper_rows, int64_t *out, int64_t *bad) {
  if (id_bytes == 4)
    return by_code((const int32_t *)ids, count, num_embeddings, codes, code_bytes, stride, chunks,
                   num_chunks, num_rows, helper_rows, out, bad);
  return by_code((const int64_t *)ids, count, num_embeddings, codes, code_bytes, stride, chunks,
                 num_chunks, num_rows, helper_rows, out, bad);
}

// out[i] = ids[i] as int64, those out of [0, num_embeddings) as 0; returns and *bad as above.
ID_CLONES int64_t cce_check_ids(const void *ids, int64_t id_bytes, int64_t count,
                             int64_t num_embeddings, int64_t *out, int64_t *bad) {
  if (id_bytes == 4) return checked((const int32_t *)ids, count, num_embeddings, out, bad);
  return checked((const int64_t *)ids, count, num_embeddings, out, bad);
}

}  // extern "C"
