// Expansion of tables' ids into codebook rows in one pass: bounds, codes, hashes, rows; sums of
// bags' lengths; and how often ids were trained. Loaded by native.py through ctypes; the torch forms in expansion.py, bags.py
// and counts.py are its references.
#include <cstdint>
#include <cstring>

#include "../hashing.h"
#include "../packing.h"

static const int64_t MOST_WORDS = 16;  // of a row whose words are all loaded ahead
static const int64_t TILE = 256;  // ids whose codes are fetched while those before are expanded

// One chunk, as native.py lays it out: column of the codes, then the hashes of main and helper.
struct Chunk { int64_t column, main_multiplier, main_addend, helper_multiplier, helper_addend; };

// The ids of one table, likewise. A plain table has no chunks; without codes the code is the hash.
// The number of ids out of bounds is written to `invalid`, the place of the first to `bad`.
struct Job {
  const void *ids;
  int64_t id_bytes, count, num_embeddings;
  Codes codes;
  const Chunk *chunks;
  int64_t num_chunks, num_rows, helper_rows;
  int64_t *out, invalid, bad;
};

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

// A row of packed codes as words, for the ids of a tile: [words][TILE].
typedef uint64_t Words[MOST_WORDS][TILE];

// Loads in a row wait for memory together.
template <typename Word>
INLINE void load(const Codes &codes, const int64_t *ids, int64_t count, int64_t skip,
                 uint64_t *words) {
  typedef Word Unaligned __attribute__((aligned(1), may_alias));
  const uint8_t *at = codes.at + skip;
  for (int64_t i = 0; i < count; i++)
    words[i] = *(const Unaligned *)(at + (ids[i] >> codes.shift) * codes.stride);
}

INLINE bool reach_end(const Codes &codes, const int64_t *ids, int64_t count) {
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) last = ids[i] > last ? ids[i] : last;
  return codes.at + (last >> codes.shift) * codes.stride + 8 * MOST_WORDS > codes.end;
}

INLINE void load_rows(const Codes &codes, const int64_t *ids, int64_t count, Words &words) {
  if (codes.stride == 4) load<uint32_t>(codes, ids, count, 0, words[0]);
  else if (codes.stride == 8) load<uint64_t>(codes, ids, count, 0, words[0]);
  else if (codes.stride > 8 * MOST_WORDS)
    for (int64_t i = 0; i < count; i++) __builtin_prefetch(codes.byte_of(ids[i], 0));
  else if (reach_end(codes, ids, count))
    for (int64_t skip = 0; skip < codes.stride; skip += 8)
      for (int64_t i = 0; i < count; i++)
        words[skip / 8][i] = codes.word(codes.at + (ids[i] >> codes.shift) * codes.stride + skip);
  else
    for (int64_t skip = 0; skip < codes.stride; skip += 8)
      load<uint64_t>(codes, ids, count, skip, words[skip / 8]);
}

// Codes of one chunk, from rows that `load_rows` has read.
INLINE void codes_of(const Codes &codes, const int64_t *ids, int64_t count, const Words &words,
                     int64_t column, int64_t *out) {
  const int64_t begin = 8 * codes.width * column, word = begin / 64, low = begin % 64;
  const uint64_t mask = codes.mask();
  if (codes.stride > 8 * MOST_WORDS)
    for (int64_t i = 0; i < count; i++) out[i] = codes.of(ids[i], column);
  else if (low + 8 * codes.width > 64)  // a chunk's bytes are in two words
    for (int64_t i = 0; i < count; i++) {
      const uint64_t unit = words[word][i] >> low | words[word + 1][i] << (64 - low);
      out[i] = (unit >> codes.bit_of(ids[i])) & mask;
    }
  else if (codes.shift)
    for (int64_t i = 0; i < count; i++)
      out[i] = (words[word][i] >> (low + codes.bit_of(ids[i]))) & mask;
  else
    for (int64_t i = 0; i < count; i++) out[i] = (words[word][i] >> low) & mask;
}

// Rows of the ids of one tile and chunk; the code is the hash where codes have no bits.
INLINE void rows_of(const int64_t *ids, const int64_t *mixed, int64_t count, const Codes &codes,
                    const Words &words, const Chunk &c, int64_t num_rows, int64_t helper_rows,
                    int64_t *out) {
  int64_t main_row[TILE];
  if (codes.bits) codes_of(codes, ids, count, words, c.column, main_row);
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

template <typename Id>
INLINE int64_t expand(const Id *ids, int64_t count, int64_t num_embeddings, const Codes &codes,
                      const Chunk *chunks, int64_t num_chunks, int64_t num_rows,
                      int64_t helper_rows, int64_t *out, int64_t *bad) {
  int64_t held[2][TILE], mixed[TILE], invalid = 0;
  Words words[2];
  const int64_t rows_per_id = helper_rows ? 2 : 1;
  for (int64_t first = -TILE; first < count; first += TILE) {
    const int64_t turn = (first / TILE) & 1;
    int64_t *now = held[turn], *next = held[!turn];
    const int64_t start = first + TILE, ahead = count - start < TILE ? count - start : TILE;
    if (ahead > 0) {
      int64_t found = -1;
      invalid += checked(ids + start, ahead, num_embeddings, next, &found);
      if (found >= 0 && *bad < 0) *bad = start + found;
      if (codes.bits) load_rows(codes, next, ahead, words[!turn]);
    }
    if (first < 0) continue;
    const int64_t here = count - first < TILE ? count - first : TILE;
    if (helper_rows || !codes.bits)
      for (int64_t i = 0; i < here; i++) mixed[i] = mix(now[i]);
    for (int64_t j = 0; j < num_chunks; j++)
      rows_of(now, mixed, here, codes, words[turn], chunks[j], num_rows, helper_rows,
              out + (j * count + first) * rows_per_id);
  }
  return invalid;
}

template <typename Id>
INLINE int64_t by_code(Job &job) {
  const Id *ids = (const Id *)job.ids;
  if (!job.num_chunks) return checked(ids, job.count, job.num_embeddings, job.out, &job.bad);
  return expand(ids, job.count, job.num_embeddings, job.codes, job.chunks, job.num_chunks,
                job.num_rows, job.helper_rows, job.out, &job.bad);
}

// out[j, i, :] = rows of ids[i] in chunk j of each job, ids out of [0, num_embeddings) read as 0;
// of a plain table, the ids. Returns how many those are in all.
extern "C" int64_t cce_expand_packed(Job *jobs, int64_t num_jobs) {
  int64_t invalid = 0;
  for (Job *job = jobs; job < jobs + num_jobs; job++) {
    job->invalid = job->id_bytes == 4 ? by_code<int32_t>(*job) : by_code<int64_t>(*job);
    invalid += job->invalid;
  }
  return invalid;
}

template <typename Length>
INLINE void count_bags(const Length *lengths, const int64_t *sizes, int64_t num_keys,
                       int64_t *out) {
  Length low = *lengths, high = *lengths;
  for (int64_t key = 0; key < num_keys; lengths += sizes[key++]) {
    uint64_t sum = 0;  // absurd lengths are told by their bounds; a signed sum must not wrap
    for (int64_t i = 0; i < sizes[key]; i++) {
      sum += (uint64_t)lengths[i];
      low = lengths[i] < low ? lengths[i] : low;
      high = lengths[i] > high ? lengths[i] : high;
    }
    out[key] = (int64_t)sum;
  }
  out[num_keys] = low;
  out[num_keys + 1] = high;
}

// out: for each key the sum of the lengths of its `sizes[key]` bags, then the least and the greatest
// length of all. There is at least one bag.
extern "C" void cce_count_bags(const void *lengths, int64_t length_bytes,
                               const int64_t *sizes, int64_t num_keys, int64_t *out) {
  if (length_bytes == 4) count_bags((const int32_t *)lengths, sizes, num_keys, out);
  else count_bags((const int64_t *)lengths, sizes, num_keys, out);
}

// A feature of `count` ids: those of its table start at `first`, and `size` of them are its own.
struct IdRange {
  int64_t count, first, size;
  int64_t checked;       // whether ids out of bounds are read as the feature's 0
  int64_t hashed, key;   // whether ids are raw, and what they are xored with
  int64_t bad, first_bad;  // the result: ids out of bounds, and the position of the first
};

template <typename Id>
INLINE int64_t into_ranges(const Id *ids, IdRange *features, int64_t num_features, int64_t *out) {
  int64_t total = 0;
  for (IdRange *f = features; f < features + num_features; f++) {
    f->bad = 0, f->first_bad = -1;
    if (f->hashed)
      for (int64_t i = 0; i < f->count; i++) {
        const uint64_t upper = (uint64_t)mix((int64_t)ids[i] ^ f->key) >> 1;
        out[i] = f->first + (int64_t)(upper % (uint64_t)f->size);
      }
    else
      for (int64_t i = 0; i < f->count; i++) {
        const bool bad = f->checked && (uint64_t)(int64_t)ids[i] >= (uint64_t)f->size;
        f->bad += bad;
        out[i] = f->first + (bad ? 0 : (int64_t)ids[i]);
      }
    for (int64_t i = 0; f->bad && f->first_bad < 0; i++)
      if ((uint64_t)(int64_t)ids[i] >= (uint64_t)f->size) f->first_bad = i;
    total += f->bad, ids += f->count, out += f->count;
  }
  return total;
}

// Ids of `features`, one's after the other's, as their tables count them; returns how many are out
// of bounds.
extern "C" int64_t cce_into_ranges(const void *ids, int64_t id_bytes, IdRange *features,
                                   int64_t num_features, int64_t *out) {
  return id_bytes == 4 ? into_ranges((const int32_t *)ids, features, num_features, out)
                       : into_ranges((const int64_t *)ids, features, num_features, out);
}

// Counts a batch for the ids of it, as counts.py does: `counts` and `ids` begin at the id `first` of
// the table, which has `size` of them from there on, and ids that are not among these are read as
// the first. The level of an id rises if its hashed bits are below its chance. All levels are read
// before any is written, or an id that is there twice would rise twice. `levels` is scratch.
extern "C" void cce_count_ids(uint8_t *counts, const int64_t *ids, int64_t count,
                              int64_t first, int64_t size, int64_t multiplier,
                              int64_t addend, const int64_t *chances, uint8_t *levels) {
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = (uint64_t)ids[i] < (uint64_t)size ? ids[i] : 0;
    const int64_t level = counts[id >> 1] >> 4 * (id & 1) & 15;
    const int64_t bits = hashed(mix(first + id), multiplier, addend, (int64_t)1 << 31);
    levels[i] = level + (bits < chances[level]);
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = (uint64_t)ids[i] < (uint64_t)size ? ids[i] : 0;
    uint8_t *two = counts + (id >> 1);
    *two = id & 1 ? (*two & 15) | levels[i] << 4 : (*two & 240) | levels[i];
  }
}
