// Kernels of the clustering step; loaded by native.py through ctypes. Plain loops over rows that
// the compiler's vector types turn into AVX-512, AVX2 or baseline code: setup.py has a library made
// of each, and compiled.py chooses.
//
// Every result is a function of one point (or id) alone, or an exact integer sum, so that no
// bit depends on how the work was cut.
#include <cstdint>
#include <cstring>

#include "ids.h"
#include "vectors.h"

static const int64_t GROUP = 128;      // centroids whose index is found by a second look
static const int64_t PANEL = 32;       // centroids that direct products take at once
// Points and vectors of centroids whose scores are in registers at once: there are 32 or 16.
static const int POINTS = LANES == 16 ? 8 : 6, VECTORS = 2;
static const int64_t TILE = 1 << 19;  // bytes of helper scores kept in the second-level cache

// Lowest c that maximises p[c] + q[c], c < padded (a multiple of 16): every vector is compared.
INLINE int32_t nearest_of_few(const float *p, const float *q, int64_t padded) {
  Best best = {load(p) + load(q), (vi){}};
  for (int64_t c = LANES; c < padded; c += LANES)
    keep_larger(best, load(p + c) + load(q + c), c);
  const vi reached = best.score == (vf){} + top_of(best.score);
  return lowest_of(reached ? best.group + lanes() : (vi){} + INT32_MAX);
}

// The same for many c (a multiple of GROUP): groups of them are compared, then looked at again.
INLINE int32_t nearest_by_scores(const float *p, const float *q, int64_t padded) {
  if (padded <= GROUP) return nearest_of_few(p, q, padded);
  Best best = {(vf){} - __builtin_inff(), (vi){}};
  for (int64_t g = 0; g < padded; g += GROUP) {
    vf m0 = load(p + g) + load(q + g), m1 = load(p + g + LANES) + load(q + g + LANES);
    for (int64_t c = 2 * LANES; c < GROUP; c += 2 * LANES) {
      vf t0 = load(p + g + c) + load(q + g + c);
      vf t1 = load(p + g + c + LANES) + load(q + g + c + LANES);
      m0 = t0 > m0 ? t0 : m0;
      m1 = t1 > m1 ? t1 : m1;
    }
    keep_larger(best, larger(m0, m1), g);
  }
  const vf top = (vf){} + top_of(best.score);
  const vi never = (vi){} + INT32_MAX;
  const int32_t g = lowest_of(best.score == top ? best.group : never);
  vi index = never;
  for (int64_t c = GROUP - LANES; c >= 0; c -= LANES) {
    vf t = load(p + g + c) + load(q + g + c);
    index = t == top ? lanes() + (int32_t)(g + c) : index;
  }
  return lowest_of(index);
}

// Points of `dim` coordinates: rows of x, or (main[a] + helper[b]) * unit in fixed point, where a
// null `a` counts up and a null `helper` is zero.
struct Points {
  const float *x;
  const int32_t *main, *helper, *a, *b;
  double unit;
};

INLINE void fetch(const Points &from, int64_t i, int64_t dim, float *row) {
  if (from.x) { memcpy(row, from.x + i * dim, dim * 4); return; }
  const int32_t *m = from.main + (from.a ? from.a[i] : i) * dim;
  const int32_t *h = from.helper ? from.helper + from.b[i] * dim : nullptr;
  for (int64_t d = 0; d < dim; d++) row[d] = (float)((m[d] + (h ? h[d] : 0)) * from.unit);
}

// score[j][v]: half_norm + point j times the centroids of vector v of one panel.
template <int POINTS, int VECTORS>
INLINE void panel_scores(const float *rows, int64_t dim, const float *panel, const float *half_norms,
                         vf score[POINTS][VECTORS]) {
  for (int j = 0; j < POINTS; j++)
    for (int v = 0; v < VECTORS; v++) score[j][v] = load(half_norms + LANES * v);
  for (int64_t d = 0; d < dim; d++) {
    vf value[VECTORS];
    for (int v = 0; v < VECTORS; v++) value[v] = load(panel + d * PANEL + LANES * v);
    for (int j = 0; j < POINTS; j++)
      for (int v = 0; v < VECTORS; v++) score[j][v] += value[v] * rows[j * dim + d];
  }
}

// Lowest centroid of the group from g on whose score for one point is `top`.
INLINE int32_t in_group(const float *row, int64_t dim, const float *group, const float *half_norms,
                        int64_t g, float top) {
  constexpr int VECTORS = PANEL / LANES;
  vi index = (vi){} + INT32_MAX;
  for (int64_t c = GROUP - PANEL; c >= 0; c -= PANEL) {
    vf score[1][VECTORS];
    panel_scores<1, VECTORS>(row, dim, group + c * dim, half_norms + c, score);
    for (int v = VECTORS - 1; v >= 0; v--)
      index = score[0][v] == (vf){} + top ? lanes() + (int32_t)(g + c + LANES * v) : index;
  }
  return lowest_of(index);
}

// POINTS * VECTORS sums are held in registers. Long rows of centroids compare the best of every
// GROUP of them with the best so far, and find the index by a second look at the winning group;
// short ones compare every vector.
template <int POINTS, int VECTORS, bool LONG>
INLINE void nearest_points(const Points &from, const float *panels, const float *half_norms,
                           int64_t padded, int64_t dim, int64_t n, float *rows, int32_t *out) {
  const vf lowest = (vf){} - __builtin_inff();
  const vi never = (vi){} + INT32_MAX;
  for (int64_t i = 0; i < n; i += POINTS) {
    Best best[POINTS];
    for (int j = 0; j < POINTS; j++) {
      fetch(from, i + j < n ? i + j : n - 1, dim, rows + j * dim);
      best[j] = {lowest, (vi){}};
    }
    for (int64_t g = 0; g < padded; g += GROUP) {
      vf most[POINTS];
      for (int j = 0; j < POINTS; j++) most[j] = lowest;
      for (int64_t c = g; c < g + GROUP; c += LANES * VECTORS) {
        vf score[POINTS][VECTORS];
        const float *panel = panels + c / PANEL * PANEL * dim + c % PANEL;
        panel_scores<POINTS, VECTORS>(rows, dim, panel, half_norms + c, score);
        for (int j = 0; j < POINTS; j++)
          for (int v = 0; v < VECTORS; v++)
            if (LONG) most[j] = larger(score[j][v], most[j]);
            else keep_larger(best[j], score[j][v], c + LANES * v);
      }
      if (LONG)
        for (int j = 0; j < POINTS; j++) keep_larger(best[j], most[j], g);
    }
    for (int j = 0; j < POINTS && i + j < n; j++) {
      const float top = top_of(best[j].score);
      const vi reached = best[j].score == (vf){} + top;
      const int32_t g = lowest_of(reached ? best[j].group : never);
      out[i + j] = LONG ? in_group(rows + j * dim, dim, panels + g * dim, half_norms + g, g, top)
                        : lowest_of(reached ? best[j].group + lanes() : never);
    }
  }
}

extern "C" {

// out[i]: the centroid with the highest main_scores[a[i]] + helper_scores[b[i]]; pairs are sorted
// by (a, b). `cursor` is scratch of num_main + 1.
void cce_nearest_sums(const float *main_scores, const float *helper_scores,
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

// out[i]: the centroid c with the highest half_norms[c] + sum_d x[i, d] * centroids[c, d].
// panels: the centroids as [padded / PANEL][dim][PANEL]. `rows` is scratch of 8 * dim.
void cce_nearest_points(const float *x, const int32_t *main_points,
                        const int32_t *helper_points, const int32_t *a, const int32_t *b,
                        double unit, const float *panels, const float *half_norms,
                        int64_t padded, int64_t dim, int64_t n, float *rows,
                        int32_t *out) {
  const Points from = {x, main_points, helper_points, a, b, unit};
  if (padded < 2048)
    nearest_points<POINTS, VECTORS, false>(from, panels, half_norms, padded, dim, n, rows, out);
  else
    nearest_points<POINTS, VECTORS, true>(from, panels, half_norms, padded, dim, n, rows, out);
}

// Per cluster c = nearest[i]: sums[c] += weight * x, sizes[c] += weight, and
// errors[c] += weight * round(|x / scale - centroid|^2 * error_scale), all exact integers.
// x = main[a] + helper[b].
void cce_accumulate(const int32_t *main_points, const int32_t *helper_points, int64_t dim,
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

}  // extern "C"
