// Kernels of the clustering step; loaded by native.py through ctypes. Plain loops over rows that
// the compiler's vector types turn into AVX-512, AVX2 or baseline code, chosen when loaded.
//
// Every result is a function of one point (or id) alone, or an exact integer sum, so that no
// bit depends on how the work was cut.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

static const int64_t GROUP = 128;      // centroids whose index is found by a second look
static const int64_t TILE = 1 << 19;  // bytes of helper scores kept in the second-level cache

// Candidate: the best score of each lane so far, and the group it came from.
struct Best { v16f score; v16i group; };

INLINE v16f load(const float *p) { v16f v; memcpy(&v, p, 64); return v; }

INLINE v16f larger(v16f a, v16f b) { return a > b ? a : b; }
INLINE v16i smaller(v16i a, v16i b) { return a < b ? a : b; }

INLINE v16i lanes() { return (v16i){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE float top_of(v16f v) {
  v = larger(v, __builtin_shuffle(v, lanes() ^ 8));
  v = larger(v, __builtin_shuffle(v, lanes() ^ 4));
  v = larger(v, __builtin_shuffle(v, lanes() ^ 2));
  return v[0] > v[1] ? v[0] : v[1];
}

INLINE int32_t lowest_of(v16i v) {
  v = smaller(v, __builtin_shuffle(v, lanes() ^ 8));
  v = smaller(v, __builtin_shuffle(v, lanes() ^ 4));
  v = smaller(v, __builtin_shuffle(v, lanes() ^ 2));
  return v[0] < v[1] ? v[0] : v[1];
}

// Lowest c that maximises p[c] + q[c], c < padded (a multiple of GROUP).
INLINE int32_t nearest_by_scores(const float *p, const float *q, int64_t padded) {
  Best best;
  for (int i = 0; i < 16; i++) { best.score[i] = -__builtin_inff(); best.group[i] = 0; }
  for (int64_t g = 0; g < padded; g += GROUP) {
    v16f m0 = load(p + g) + load(q + g), m1 = load(p + g + 16) + load(q + g + 16);
    for (int64_t c = 32; c < GROUP; c += 32) {
      v16f t0 = load(p + g + c) + load(q + g + c);
      v16f t1 = load(p + g + c + 16) + load(q + g + c + 16);
      m0 = t0 > m0 ? t0 : m0;
      m1 = t1 > m1 ? t1 : m1;
    }
    m0 = m0 > m1 ? m0 : m1;
    v16i better = m0 > best.score;
    v16i group = (v16i){} + (int32_t)g;
    best.score = better ? m0 : best.score;
    best.group = better ? group : best.group;
  }
  const v16f top = (v16f){} + top_of(best.score);
  const v16i never = (v16i){} + INT32_MAX;
  const int32_t g = lowest_of(best.score == top ? best.group : never);
  v16i index = never;
  for (int64_t c = GROUP - 16; c >= 0; c -= 16) {
    v16f t = load(p + g + c) + load(q + g + c);
    index = t == top ? lanes() + (int32_t)(g + c) : index;
  }
  return lowest_of(index);
}

extern "C" {

// out[i]: the centroid with the highest main_scores[a[i]] + helper_scores[b[i]]; pairs are sorted
// by (a, b). `cursor` is scratch of num_main + 1.
CLONES void cce_nearest_pairs(const float *main_scores, const float *helper_scores,
                              int64_t padded, int64_t num_main, int64_t num_helper,
                              const int32_t *a, const int32_t *b, int64_t n, int64_t *cursor,
                              int32_t *out) {
  int64_t i = 0;
  for (int64_t row = 0; row <= num_main; row++) {
    while (i < n && a[i] < row) i++;
    cursor[row] = i;
  }
  int64_t tile = TILE / (padded * 4);
  if (tile < 8) tile = 8;
  for (int64_t first = 0; first < num_helper; first += tile) {
    for (int64_t row = 0; row < num_main; row++) {
      int64_t j = cursor[row];
      const int64_t end = row + 1 < num_main ? cursor[num_main] : n;
      const float *p = main_scores + row * padded;
      for (; j < end && a[j] == row && b[j] < first + tile; j++)
        out[j] = nearest_by_scores(p, helper_scores + b[j] * padded, padded);
      cursor[row] = j;
    }
  }
}

// out[i]: the centroid c with the highest half_norms[c] + sum_d x[i, d] * centroids[d, c].
// centroids: [dim, padded]; padded is a multiple of 16.
CLONES void cce_nearest_points(const float *x, const float *centroids, const float *half_norms,
                               int64_t padded, int64_t dim, int64_t n, int32_t *out) {
  const int64_t POINTS = 4;
  for (int64_t i = 0; i < n; i += POINTS) {
    const float *row[POINTS];
    v16f best[POINTS];
    v16i index[POINTS];
    for (int64_t j = 0; j < POINTS; j++) {
      row[j] = x + (i + j < n ? i + j : n - 1) * dim;
      best[j] = (v16f){} - __builtin_inff();
      index[j] = (v16i){};
    }
    for (int64_t c = 0; c < padded; c += 16) {
      v16f score[POINTS];
      for (int64_t j = 0; j < POINTS; j++) score[j] = load(half_norms + c);
      for (int64_t d = 0; d < dim; d++) {
        v16f value = load(centroids + d * padded + c);
        for (int64_t j = 0; j < POINTS; j++) score[j] += value * row[j][d];
      }
      for (int64_t j = 0; j < POINTS; j++) {
        v16i better = score[j] > best[j];
        best[j] = better ? score[j] : best[j];
        index[j] = better ? (v16i){} + (int32_t)c : index[j];
      }
    }
    for (int64_t j = 0; j < POINTS && i + j < n; j++) {
      const v16f top = (v16f){} + top_of(best[j]);
      const v16i never = (v16i){} + INT32_MAX;
      out[i + j] = lowest_of(best[j] == top ? index[j] + lanes() : never);
    }
  }
}

// Per cluster c = nearest[i]: sums[c] += weight * x, sizes[c] += weight, and
// errors[c] += weight * round(|x / scale - centroid|^2 * error_scale), all exact integers.
// x = main[a] + helper[b].
CLONES void cce_accumulate(const int32_t *main_points, const int32_t *helper_points, int64_t dim,
                           const int32_t *a, const int32_t *b, const int64_t *weights,
                           const int32_t *nearest, int64_t n, const double *centroids,
                           double inverse_scale, double error_scale, int64_t *sums,
                           int64_t *sizes, int64_t *errors) {
  for (int64_t i = 0; i < n; i++) {
    const int64_t c = nearest[i], w = weights[i];
    const int32_t *m = main_points + a[i] * dim, *h = helper_points + b[i] * dim;
    const double *center = centroids + c * dim;
    int64_t *sum = sums + c * dim;
    double part[4] = {0, 0, 0, 0};  // dim is a multiple of 4
    for (int64_t d = 0; d < dim; d += 4)
      for (int64_t e = 0; e < 4; e++) {
        const int32_t x = m[d + e] + h[d + e];
        const double off = x * inverse_scale - center[d + e];
        sum[d + e] += w * x;
        part[e] += off * off;
      }
    sizes[c] += w;
    errors[c] += w * (int64_t)((part[0] + part[1] + part[2] + part[3]) * error_scale + 0.5);
  }
}

INLINE int64_t code_at(const void *codes, int64_t bytes, int64_t at) {
  if (bytes == 1) return ((const uint8_t *)codes)[at];
  if (bytes == 2) return ((const uint16_t *)codes)[at];
  return ((const int32_t *)codes)[at];
}

INLINE int64_t hashed(int64_t id, int64_t multiplier, int64_t addend, int64_t rows) {
  const uint64_t bits = ((uint64_t)id * (uint64_t)multiplier + (uint64_t)addend) >> 33;
  return (int64_t)((bits * (uint64_t)rows) >> 31);
}

// counts[code * num_helper + hash] += weight (1 where weights is null), over ids [first, last).
void cce_count_pairs(const void *codes, int64_t bytes, int64_t stride, int64_t first,
                     int64_t last, int64_t multiplier, int64_t addend, int64_t num_helper,
                     const int64_t *weights, int64_t *counts) {
  for (int64_t id = first; id < last; id++) {
    const int64_t a = code_at(codes, bytes, id * stride);
    counts[a * num_helper + hashed(id, multiplier, addend, num_helper)] += weights ? weights[id] : 1;
  }
}

// Over ids [first, last): sums[new hash] += main[code] + helper[old hash] - centroid[nearest],
// sizes[new hash] += 1, where nearest is table[code, old hash].
CLONES void cce_residuals(const void *codes, int64_t bytes, int64_t stride, int64_t first,
                          int64_t last, int64_t old_multiplier, int64_t old_addend,
                          int64_t new_multiplier, int64_t new_addend, int64_t num_helper,
                          int64_t dim, const int32_t *main_points, const int32_t *helper_points,
                          const int32_t *centroids, const int32_t *table, int64_t *sums,
                          int64_t *sizes) {
  for (int64_t id = first; id < last; id++) {
    const int64_t a = code_at(codes, bytes, id * stride);
    const int64_t b = hashed(id, old_multiplier, old_addend, num_helper);
    const int64_t row = hashed(id, new_multiplier, new_addend, num_helper);
    const int32_t *m = main_points + a * dim, *h = helper_points + b * dim;
    const int32_t *center = centroids + (int64_t)table[a * num_helper + b] * dim;
    int64_t *sum = sums + row * dim;
    for (int64_t d = 0; d < dim; d++) sum[d] += (int64_t)m[d] + h[d] - center[d];
    sizes[row]++;
  }
}

// codes[id] = table[code, hash] over ids [first, last), in place; returns how many changed.
int64_t cce_relabel(void *codes, int64_t bytes, int64_t stride, int64_t first, int64_t last,
                    int64_t multiplier, int64_t addend, int64_t num_helper, const int32_t *table,
                    int64_t write) {
  int64_t changed = 0;
  for (int64_t id = first; id < last; id++) {
    const int64_t at = id * stride, a = code_at(codes, bytes, at);
    const int32_t c = table[a * num_helper + hashed(id, multiplier, addend, num_helper)];
    changed += c != a;
    if (!write) continue;
    if (bytes == 1) ((uint8_t *)codes)[at] = (uint8_t)c;
    else if (bytes == 2) ((uint16_t *)codes)[at] = (uint16_t)c;
    else ((int32_t *)codes)[at] = c;
  }
  return changed;
}

}  // extern "C"
