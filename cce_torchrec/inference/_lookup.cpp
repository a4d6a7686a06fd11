// The lookup of packed tables in one pass over ids: codes unpacked, rows dequantised and pooled.
// An operator of torch, in a library that needs libtorch alone and no Python; native.py builds and
// loads it. portable.py is its reference, in operators of torch and FBGEMM.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../hashing.h"

namespace {

const int64_t TILE = 16;     // ids that are at one stage together; longer bags are a tile of their own
const int64_t STREAMED = 4 << 20;  // bytes of output from which it is written past the caches
const int64_t GRAIN = 4096;  // ids that are worth a thread of their own

// What is said of a feature; numbers_of in lookup.py has the columns in this order.
struct Feature {
  int64_t own, first, key, raw, start, bits, num_rows, helper_rows, reads, hashed, mask;
  int64_t row_start, row_bytes, type, width, chunks, mean, input, column, first_chunk;
};
const int64_t FIELDS = sizeof(Feature) / sizeof(int64_t);
enum Type { FP32, FP16, INT8, INT4 };

typedef const uint8_t *Row;

// Bags of one feature whose rows were found: `rows` [ids * reads][chunks], `weights` [ids * reads]
// or null. Bag i has the ids from starts[i] to starts[i + 1], of which `begin` is the first here.
struct Found {
  Row const *rows;
  const float *weights;
  const int64_t *starts;
  int64_t begin, num_bags, reads, chunks, width, first_chunk;
  bool mean;
  float *out;  // of the first bag
  int64_t stride;
};

// Inlined into `Isa::pool`, so that what it calls is compiled for the same machine. WIDTH is that of
// the chunks, or 0 for any; STREAM has output written past the caches, which it would not stay in:
// to fetch its lines before they are overwritten takes longer than all else.
template <typename Isa, int TYPE, int WIDTH, bool STREAM>
INLINE void pool_bags(const Found &found) {
  const int64_t width = WIDTH ? WIDTH : found.width;
  for (int64_t bag = 0; bag < found.num_bags; bag++) {
    const int64_t from = (found.starts[bag] - found.begin) * found.reads;
    const int64_t size = found.starts[bag + 1] - found.starts[bag];
    const float *weights = found.weights ? found.weights + from : nullptr;
    float *out = found.out + bag * found.stride;
    for (int64_t place = 0, j = found.first_chunk; place < found.chunks; place++) {
      Isa::template chunk<TYPE, STREAM>(found.rows + from * found.chunks + j, size * found.reads,
                                found.chunks, weights, width, out + place * width);
      j = j + 1 < found.chunks ? j + 1 : 0;
    }
    if (found.mean && size > 1)
      for (int64_t d = 0; d < found.chunks * width; d++) out[d] /= (float)size;
  }
}

// Sums of rows, each times a weight where there are some, in the order in which FBGEMM adds them up.
struct Plain {
  static float half(const uint8_t *at) {
    uint16_t h;
    std::memcpy(&h, at, 2);
    return c10::detail::fp16_ieee_to_fp32_value(h);
  }
  template <int TYPE>
  static float value(Row row, int64_t d) {
    float found;
    if (TYPE == FP32) std::memcpy(&found, row + 4 * d, 4);
    if (TYPE == FP16) found = half(row + 2 * d);
    if (TYPE == INT8) found = row[4 + d];
    if (TYPE == INT4) found = row[4 + d / 2] >> 4 * (d & 1) & 15;
    return found;
  }
  // Column d of the chunk `rows`, a row every `chunks`.
  template <int TYPE>
  static float sum(Row const *rows, int64_t count, int64_t chunks, const float *weights, int64_t d) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) {
      const Row row = rows[i * chunks];
      const float weight = weights ? weights[i] : 1;
      if (TYPE >= INT8) sum += half(row + 2) * weight;
      sum += value<TYPE>(row, d) * (TYPE >= INT8 ? half(row) * weight : weight);
    }
    return sum;
  }
  template <int TYPE, bool STREAM>
  static void chunk(Row const *rows, int64_t count, int64_t chunks, const float *weights,
                    int64_t width, float *out) {
    for (int64_t d = 0; d < width; d++) out[d] = sum<TYPE>(rows, count, chunks, weights, d);
  }
  template <int TYPE, int WIDTH, bool STREAM>
  static void pool(const Found &found) { pool_bags<Plain, TYPE, WIDTH, STREAM>(found); }
};

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

struct Avx2 {
  template <int TYPE>
  static __m256 eight(Row row, int64_t d) {
    if (TYPE == FP32) return _mm256_loadu_ps((const float *)row + d);
    if (TYPE == FP16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(row + 2 * d)));
    __m128i bytes;
    if (TYPE == INT8) bytes = _mm_loadl_epi64((const __m128i *)(row + 4 + d));
    if (TYPE == INT4) {
      int32_t pairs;
      std::memcpy(&pairs, row + 4 + d / 2, 4);
      bytes = of_pairs(_mm_cvtsi32_si128(pairs));
    }
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  }
  template <int TYPE>
  static __m128 four(Row row, int64_t d) {
    if (TYPE == FP32) return _mm_loadu_ps((const float *)row + d);
    if (TYPE == FP16) return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(row + 2 * d)));
    int32_t bits = 0;
    std::memcpy(&bits, row + 4 + (TYPE == INT8 ? d : d / 2), TYPE == INT8 ? 4 : 2);
    const __m128i bytes = _mm_cvtsi32_si128(bits);
    return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(TYPE == INT8 ? bytes : of_pairs(bytes)));
  }
  static __m128i of_pairs(__m128i pairs) {
    const __m128i low = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(pairs, low),
                             _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  }
  // Scale and bias, both times the weight.
  static __m128 header(Row row, float weight) {
    int32_t both;
    std::memcpy(&both, row, 4);
    return _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(both)), _mm_set1_ps(weight));
  }
  static __m256 wide(__m128 header, int lane) {
    const __m128 own = lane ? _mm_movehdup_ps(header) : header;
    return _mm256_broadcastss_ps(own);
  }
  // N * 8 values of all rows of a bag, in as many registers.
  template <int TYPE, bool STREAM, int N>
  static void block(Row const *rows, int64_t count, int64_t chunks, const float *weights, int64_t d,
                    float *out) {
    __m256 sum[N];
    for (int n = 0; n < N; n++) sum[n] = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i++) {
      const Row row = rows[i * chunks];
      const float weight = weights ? weights[i] : 1;
      __m256 times = _mm256_set1_ps(weight);
      if (TYPE >= INT8) {
        const __m128 own = header(row, weight);
        const __m256 bias = wide(own, 1);
        times = wide(own, 0);
        for (int n = 0; n < N; n++) sum[n] = _mm256_add_ps(sum[n], bias);
      }
      for (int n = 0; n < N; n++)
        sum[n] = _mm256_fmadd_ps(eight<TYPE>(row, d + 8 * n), times, sum[n]);
    }
    for (int n = 0; n < N; n++)
      if (STREAM) _mm256_stream_ps(out + d + 8 * n, sum[n]);
      else _mm256_storeu_ps(out + d + 8 * n, sum[n]);
  }
  template <int TYPE>
  static void block_of_four(Row const *rows, int64_t count, int64_t chunks, const float *weights,
                            int64_t d, float *out) {
    __m128 sum = _mm_setzero_ps();
    for (int64_t i = 0; i < count; i++) {
      const Row row = rows[i * chunks];
      const float weight = weights ? weights[i] : 1;
      __m128 times = _mm_set1_ps(weight);
      if (TYPE >= INT8) {
        const __m128 own = header(row, weight);
        sum = _mm_add_ps(sum, _mm_shuffle_ps(own, own, 0x55));
        times = _mm_broadcastss_ps(own);
      }
      sum = _mm_fmadd_ps(four<TYPE>(row, d), times, sum);
    }
    _mm_storeu_ps(out + d, sum);
  }
  template <int TYPE, bool STREAM>
  static void chunk(Row const *rows, int64_t count, int64_t chunks, const float *weights,
                    int64_t width, float *out) {
    int64_t d = 0;
    for (; d + 32 <= width; d += 32) block<TYPE, STREAM, 4>(rows, count, chunks, weights, d, out);
    for (; d + 16 <= width; d += 16) block<TYPE, STREAM, 2>(rows, count, chunks, weights, d, out);
    for (; d + 8 <= width; d += 8) block<TYPE, STREAM, 1>(rows, count, chunks, weights, d, out);
    for (; d + 4 <= width; d += 4) block_of_four<TYPE>(rows, count, chunks, weights, d, out);
    // Widths of plain tables need not be multiples of 4.
    for (; d < width; d++) out[d] = last<TYPE>(rows, count, chunks, weights, d);
  }
  template <int TYPE>
  static float last(Row const *rows, int64_t count, int64_t chunks, const float *weights, int64_t d) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) {
      const Row row = rows[i * chunks];
      const float weight = weights ? weights[i] : 1;
      if (TYPE >= INT8) sum += Plain::half(row + 2) * weight;
      const float times = TYPE >= INT8 ? Plain::half(row) * weight : weight;
      sum = __builtin_fmaf(Plain::value<TYPE>(row, d), times, sum);
    }
    return sum;
  }
  template <int TYPE, int WIDTH, bool STREAM>
  __attribute__((flatten)) static void pool(const Found &found) {
    pool_bags<Avx2, TYPE, WIDTH, STREAM>(found);
    if (STREAM) _mm_sfence();  // before another thread may read it
  }
};

#pragma GCC pop_options
#endif

typedef void (*Pool)(const Found &);

template <typename Isa, int TYPE, bool STREAM>
Pool pool_of_width(int64_t width) {
  switch (width) {
    case 4: return Isa::template pool<TYPE, 4, STREAM>;
    case 8: return Isa::template pool<TYPE, 8, STREAM>;
    case 16: return Isa::template pool<TYPE, 16, STREAM>;
    case 32: return Isa::template pool<TYPE, 32, STREAM>;
    default: return Isa::template pool<TYPE, 0, STREAM>;
  }
}

template <typename Isa, bool STREAM>
Pool pool_of(int64_t type, int64_t width) {
  switch (type) {
    case FP32: return pool_of_width<Isa, FP32, STREAM>(width);
    case FP16: return pool_of_width<Isa, FP16, STREAM>(width);
    case INT8: return pool_of_width<Isa, INT8, STREAM>(width);
    default: return pool_of_width<Isa, INT4, STREAM>(width);
  }
}

Pool best_pool(const Feature &f, int64_t num_bags, int64_t total_dim) {
#if defined(__x86_64__) && defined(__GNUC__)
  // cpu_level.py has the rule; a server has this library without Python.
  static const char *level = std::getenv("CCE_CPU_LEVEL");
  static const bool vectors = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                              __builtin_cpu_supports("f16c") &&
                              !(level && !std::strcmp(level, "none"));
  // Whole vectors, each at a multiple of its size, that are not read again to be divided.
  const bool streams = num_bags * total_dim * 4 >= STREAMED && !f.mean &&
                       (f.width | f.column | total_dim) % 8 == 0;
  if (vectors && streams) return pool_of<Avx2, true>(f.type, f.width);
  if (vectors) return pool_of<Avx2, false>(f.type, f.width);
#endif
  return pool_of<Plain, false>(f.type, f.width);
}

// All that a lookup reads, the same for every thread.
template <typename Id>
struct Batch {
  const Feature *features;
  int64_t num_features, num_bags;
  const uint8_t *codes, *rows;
  const int64_t *hashes;  // [features, 4, most_chunks]
  int64_t most_chunks;
  bool ignores;
  const Id *ids;
  const int64_t *starts;  // of the bags [inputs, num_bags] among the ids, and the end of the last
  const float *weights;   // of the ids, or null
  float *out;             // [num_bags, total_dim]
  int64_t total_dim;
};

// The table's id, or -1 where the feature has no such id and that is to be told.
INLINE int64_t id_of(const Feature &f, int64_t id, bool ignores) {
  if (f.raw) return f.first + (int64_t)(((uint64_t)mix(id ^ f.key) >> 1) % (uint64_t)f.own);
  if ((uint64_t)id < (uint64_t)f.own) return f.first + id;
  return ignores ? f.first : -1;
}

// A stream of codes from the bit `at` on; a word is read for as many of them as it has.
struct Bits {
  const uint8_t *bytes;
  int64_t at, left = 0;
  uint64_t word = 0;

  inline __attribute__((always_inline)) int64_t next(int64_t bits) {
    if (left < bits) {
      std::memcpy(&word, bytes + (at >> 3), 8);  // codes end with a word that is no table's
      word >>= at & 7, left = 64 - (at & 7);
    }
    const uint64_t found = word;
    word >>= bits, left -= bits, at += bits;
    return (int64_t)found;
  }
};

// Both ends without a question, whose answer nobody could predict.
INLINE void fetch(const uint8_t *at, int64_t nbytes) {
  __builtin_prefetch(at);
  __builtin_prefetch(at + nbytes - 1);
}

// Some bags of a feature, at one of three stages: their ids are known, and the codes on the way; rows
// are known, and on the way; rows are pooled.
struct Tile {
  int64_t feature = 0;
  int64_t first = 0, last = 0;   // bags
  int64_t begin = 0, count = 0;  // ids
  std::vector<int64_t> ids;      // as the table counts them
  std::vector<Row> rows;
  std::vector<float> weights;
};

// The bags [first, last) of all features, feature by feature. Three tiles are at work at the same
// time, one at each stage, so that none waits.
template <typename Id>
struct Lookup {
  const Batch<Id> &batch;
  int64_t first, last, next, feature = 0;
  bool bad = false;
  Tile tiles[3];

  Lookup(const Batch<Id> &of, int64_t from, int64_t to)
      : batch(of), first(from), last(to), next(from) {}

  // Takes the next bags, if there are any left.
  bool begin(Tile &tile) {
    if (next == last) feature++, next = first;
    if (feature == batch.num_features) return false;
    const Feature &f = batch.features[feature];
    const int64_t *starts = batch.starts + f.input * batch.num_bags;
    int64_t end = next + 1;
    while (end < last && starts[end + 1] - starts[next] <= TILE) end++;
    tile.feature = feature, tile.first = next, tile.last = next = end;
    tile.begin = starts[tile.first], tile.count = starts[end] - tile.begin;
    if ((int64_t)tile.ids.size() < tile.count) tile.ids.resize(tile.count);
    const uint8_t *codes = batch.codes + f.start;
    const int64_t code_bits = f.chunks * f.bits;
    for (int64_t i = 0; i < tile.count; i++) {
      const int64_t id = id_of(f, batch.ids[tile.begin + i], batch.ignores);
      bad |= id < 0;
      tile.ids[i] = id < 0 ? f.first : id;
      if (f.bits) fetch(codes + (tile.ids[i] * code_bits >> 3), (code_bits + 14) >> 3);
    }
    return true;
  }

  // Where the rows of all ids are, [ids][reads][chunks].
  template <bool CODED, bool HELPED>
  void find_rows(Tile &tile, const Feature &f) {
    const int64_t reads = HELPED ? 2 : 1, count = tile.count, chunks = f.chunks;
    const int64_t size = count * reads * chunks;
    if ((int64_t)tile.rows.size() < size) tile.rows.resize(size);
    // What is written here could be any of these, for all that the compiler knows.
    const int64_t row_bytes = f.row_bytes, num_rows = f.num_rows, helper_rows = f.helper_rows;
    const int64_t main_bytes = num_rows * row_bytes;
    const int64_t chunk_bytes = main_bytes + (HELPED ? helper_rows * row_bytes : 0);
    const int64_t bits = f.bits, mask = f.mask, hashed = f.hashed, most = batch.most_chunks;
    const int64_t *hashes = batch.hashes + tile.feature * 4 * most, *ids = tile.ids.data();
    const uint8_t *rows = batch.rows + f.row_start;
    Row *at = tile.rows.data();
    for (int64_t i = 0; i < count; i++, at += reads * chunks) {
      const int64_t id = ids[i], mixed = HELPED || !CODED ? mix(id) : 0;
      const uint8_t *chunk = rows;
      Bits codes = {batch.codes + f.start, id * chunks * bits};
      for (int64_t j = 0; j < chunks; j++, chunk += chunk_bytes) {
        int64_t row = id;  // of a plain table
        if (CODED) row = codes.next(bits) & mask;
        else if (hashed) row = ::hashed(mixed, hashes[j], hashes[most + j], num_rows);
        fetch(at[j] = chunk + row * row_bytes, row_bytes);
        if (HELPED) {
          row = ::hashed(mixed, hashes[2 * most + j], hashes[3 * most + j], helper_rows);
          fetch(at[chunks + j] = chunk + main_bytes + row * row_bytes, row_bytes);
        }
      }
    }
    if (batch.weights) {
      tile.weights.resize(count * reads);
      for (int64_t i = 0; i < count * reads; i++)
        tile.weights[i] = batch.weights[tile.begin + i / reads];
    }
  }

  void find(Tile &tile) {
    const Feature &f = batch.features[tile.feature];
    if (f.bits) f.reads == 2 ? find_rows<true, true>(tile, f) : find_rows<true, false>(tile, f);
    else f.reads == 2 ? find_rows<false, true>(tile, f) : find_rows<false, false>(tile, f);
  }

  void pool(const Tile &tile, const Pool *pools) const {
    const Feature &f = batch.features[tile.feature];
    pools[tile.feature]({tile.rows.data(), batch.weights ? tile.weights.data() : nullptr,
                         batch.starts + f.input * batch.num_bags + tile.first, tile.begin,
                         tile.last - tile.first, f.reads, f.chunks, f.width, f.first_chunk, f.mean != 0,
                         batch.out + tile.first * batch.total_dim + f.column, batch.total_dim});
  }

  void run(const Pool *pools) {
    for (int64_t turn = 0, open = 0, more = 1; more || open; turn++) {
      more = more && begin(tiles[turn % 3]);
      if (open & 1) find(tiles[(turn + 2) % 3]);
      if (open & 2) pool(tiles[(turn + 1) % 3], pools);
      open = (open << 1 | more) & 3;
    }
  }
};

std::vector<int64_t> starts_of(const at::Tensor &lengths, int64_t num_ids) {
  std::vector<int64_t> starts(lengths.numel() + 1);
  const auto add = [&](const auto *own) {
    for (int64_t i = 0; i < lengths.numel(); i++) {
      // Each by itself, as a sum of huge ones may come out right.
      TORCH_CHECK_VALUE(own[i] >= 0 && own[i] <= num_ids - starts[i], "length ", own[i], " of bag ",
                        i, " is negative, or more than what is left of the ", num_ids, " values");
      starts[i + 1] = starts[i] + own[i];
    }
  };
  if (lengths.scalar_type() == at::kInt) add(lengths.const_data_ptr<int32_t>());
  else add(lengths.const_data_ptr<int64_t>());
  return starts;
}

bool whole(const at::Tensor &tensor) {
  const auto type = tensor.scalar_type();
  return (type == at::kInt || type == at::kLong) && tensor.dim() == 1 && tensor.device().is_cpu();
}

template <typename Id>
void refuse(const Batch<Id> &batch, const c10::List<std::string> &names) {
  for (int64_t number = 0; number < batch.num_features; number++) {
    const Feature &f = batch.features[number];
    const int64_t *starts = batch.starts + f.input * batch.num_bags;
    for (int64_t i = starts[0]; i < starts[batch.num_bags]; i++)
      TORCH_CHECK_VALUE(id_of(f, batch.ids[i], false) >= 0, names.get(number), ": id ",
                        (int64_t)batch.ids[i], " is outside [0, ", f.own, "); map the ids into range, "
                        "or export with ignores=True, which reads id 0 instead");
  }
}

template <typename Id>
void look_up(const Batch<Id> &batch, int64_t num_ids, const c10::List<std::string> &names) {
  std::vector<Pool> pools(batch.num_features);
  for (int64_t i = 0; i < batch.num_features; i++)
    pools[i] = best_pool(batch.features[i], batch.num_bags, batch.total_dim);
  const int64_t ids_of_bag = std::max<int64_t>(1, num_ids / batch.num_bags);
  std::atomic<bool> bad = false;
  at::parallel_for(0, batch.num_bags, std::max<int64_t>(1, GRAIN / ids_of_bag),
                   [&](int64_t from, int64_t to) {
                     Lookup<Id> own(batch, from, to);
                     own.run(pools.data());
                     if (own.bad) bad = true;
                   });
  if (bad) refuse(batch, names);
}

at::Tensor lookup(const at::Tensor &values, const at::Tensor &lengths,
                  const std::optional<at::Tensor> &weights, const at::Tensor &codes,
                  const at::Tensor &rows, const at::Tensor &numbers, const at::Tensor &hashes,
                  int64_t num_inputs, int64_t total_dim, bool ignores,
                  const c10::List<std::string> &names) {
  TORCH_CHECK_VALUE(whole(values) && whole(lengths),
                    "values and lengths must be int32 or int64 [n] on the CPU; got ",
                    values.scalar_type(), " ", values.sizes(), " and ", lengths.scalar_type(), " ",
                    lengths.sizes());
  TORCH_CHECK_VALUE(lengths.numel() % num_inputs == 0, lengths.numel(), " lengths are no batch of ",
                    num_inputs, " features");
  const int64_t num_bags = lengths.numel() / num_inputs;
  const at::Tensor ids = values.contiguous();
  const std::vector<int64_t> starts = starts_of(lengths.contiguous(), ids.numel());
  TORCH_CHECK_VALUE(starts.back() == ids.numel(), "lengths add up to ", starts.back(), ", and ",
                    ids.numel(), " values were given");
  at::Tensor weight;
  if (weights) {
    TORCH_CHECK_VALUE(weights->numel() == ids.numel(), weights->numel(), " weights for ",
                      ids.numel(), " values");
    weight = weights->to(at::kFloat).contiguous();
  }
  TORCH_CHECK(numbers.size(1) == FIELDS && numbers.is_contiguous() && hashes.is_contiguous() &&
                  codes.is_contiguous() && rows.is_contiguous(),
              "these tables were packed by another version");
  const at::Tensor out = at::empty({num_bags, total_dim}, at::kFloat);
  const auto look_up_as = [&](auto id) {
    look_up<decltype(id)>(
        {(const Feature *)numbers.const_data_ptr<int64_t>(), numbers.size(0), num_bags,
         (const uint8_t *)codes.const_data_ptr(), rows.const_data_ptr<uint8_t>(),
         hashes.const_data_ptr<int64_t>(), hashes.size(2), ignores,
         ids.const_data_ptr<decltype(id)>(), starts.data(),
         weights ? weight.const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>(), total_dim},
        ids.numel(), names);
  };
  if (!num_bags || !numbers.size(0)) return out;
  if (ids.scalar_type() == at::kInt) look_up_as(int32_t());
  else look_up_as(int64_t());
  return out;
}

at::Tensor lookup_meta(const at::Tensor &values, const at::Tensor &lengths,
                       const std::optional<at::Tensor> &weights, const at::Tensor &codes,
                       const at::Tensor &rows, const at::Tensor &numbers, const at::Tensor &hashes,
                       int64_t num_inputs, int64_t total_dim, bool ignores,
                       const c10::List<std::string> &names) {
  const auto options = values.options().dtype(at::kFloat);
  return at::empty_symint({lengths.sym_numel() / num_inputs, total_dim}, options);
}

}  // namespace

TORCH_LIBRARY(cce_inference, m) {
  m.def(
      "lookup(Tensor values, Tensor lengths, Tensor? weights, Tensor codes, Tensor rows, "
      "Tensor numbers, Tensor hashes, int num_inputs, int total_dim, bool ignores, str[] names) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(cce_inference, CPU, m) { m.impl("lookup", &lookup); }
TORCH_LIBRARY_IMPL(cce_inference, Meta, m) { m.impl("lookup", &lookup_meta); }
