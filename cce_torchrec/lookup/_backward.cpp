// The backward of pooled codebook lookups with row-wise Adagrad in it, for CPUs.
//
// A codebook has few rows and a batch reads most of them, so their gradients are summed in place, in a
// buffer as large as the codebook that stays in the cache; nothing is sorted. Loaded by native.py.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "../hashing.h"
#include "../lanes.h"

static const int64_t AHEAD = 16;  // bags, or rows, that are fetched before their turn

// One table, as native.py lays it out; its features follow one another, as do their columns.
struct Table {
  float *weights, *momentum;
  int64_t rows, dim, num_features, first_feature, column;
};

// Lookups of feature f and bag b: [offsets[f * bags + b], offsets[f * bags + b + 1]).
struct Lookups {
  const int64_t *indices, *offsets;
  int64_t bags;
  const float *sample_weights;  // per lookup, or null
  const float *grad;            // [bags, stride], by column
  int64_t stride;
};

// Of one thread, for its largest table: gradients and marks, both zero between calls, and a list.
struct Buffers {
  float *sums;
  uint8_t *marks;
  int32_t *list;
};

// WIDTH values in PARTS vectors that the processor has.
template <int WIDTH>
struct Vectors {
  static const int SIZE = WIDTH < LANES ? WIDTH : LANES, PARTS = WIDTH / SIZE;
  typedef float type __attribute__((vector_size(4 * SIZE), aligned(4), may_alias));
};

// Adds the gradient of every bag to those of its rows. A row is COUNT times WIDTH values, or if that
// is 0 as many as there are.
template <int WIDTH, int COUNT>
INLINE void gather(const Table table, const Lookups in, const Buffers to) {
  typedef typename Vectors<WIDTH>::type V;
  const int64_t count = (COUNT ? COUNT : table.dim / WIDTH) * Vectors<WIDTH>::PARTS;
  for (int64_t f = 0; f < table.num_features; f++) {
    const int64_t *offsets = in.offsets + (table.first_feature + f) * in.bags;
    const float *column = in.grad + table.column + f * table.dim;
    for (int64_t b = 0; b < in.bags; b++) {
      const V *grad = (const V *)(column + b * in.stride);
      if (b + AHEAD < in.bags) __builtin_prefetch(column + (b + AHEAD) * in.stride);
      for (int64_t p = offsets[b]; p < offsets[b + 1]; p++) {
        const int64_t row = in.indices[p];
        V *sum = (V *)(to.sums + row * table.dim);
        to.marks[row] = 1;
        if (in.sample_weights)
          for (int64_t i = 0; i < count; i++) sum[i] += in.sample_weights[p] * grad[i];
        else
          for (int64_t i = 0; i < count; i++) sum[i] += grad[i];
      }
    }
  }
}

// Lists the marked rows in order and takes the marks away.
INLINE int64_t marked(const Buffers &in, int64_t rows) {
  int64_t found = 0;
  for (int64_t first = 0; first < rows; first += 8) {
    uint64_t word;
    std::memcpy(&word, in.marks + first, 8);  // rounded up to eight
    if (!word) continue;
    for (int64_t i = 0; i < 8; i++) {
      in.list[found] = (int32_t)(first + i);
      found += in.marks[first + i];
    }
    std::memset(in.marks + first, 0, 8);
  }
  return found;
}

// The sum of the squares of `count` vectors: in WIDTH sums, then their halves, whatever the level.
template <int WIDTH>
INLINE float squared(const typename Vectors<WIDTH>::type *of, int64_t count) {
  const int64_t parts = Vectors<WIDTH>::PARTS;
  typename Vectors<WIDTH>::type squares[parts];
  for (int64_t p = 0; p < parts; p++) squares[p] = of[p] * of[p];
  for (int64_t i = parts; i < count; i += parts)
    for (int64_t p = 0; p < parts; p++) squares[p] += of[i + p] * of[i + p];
  float part[WIDTH];
  std::memcpy(part, squares, sizeof(part));
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// One step of row-wise Adagrad on the marked rows, whose sums and marks are zero afterwards.
template <int WIDTH, int COUNT>
INLINE void step(const Table table, const Buffers in, float rate, float eps) {
  typedef typename Vectors<WIDTH>::type V;
  const int64_t count = (COUNT ? COUNT : table.dim / WIDTH) * Vectors<WIDTH>::PARTS;
  const int64_t found = marked(in, table.rows);
  for (int64_t k = 0; k < found; k++) {
    const int64_t row = in.list[k];
    if (k + AHEAD < found) __builtin_prefetch(table.weights + in.list[k + AHEAD] * table.dim, 1);
    V *sum = (V *)(in.sums + row * table.dim), *weights = (V *)(table.weights + row * table.dim);
    table.momentum[row] += squared<WIDTH>(sum, count) / (float)table.dim;
    const float scale = rate / (__builtin_sqrtf(table.momentum[row]) + eps);
    for (int64_t i = 0; i < count; i++) {
      weights[i] -= scale * sum[i];
      sum[i] = V{};
    }
  }
}

template <int WIDTH, int COUNT>
INLINE void update(const Table &table, const Lookups &in, const Buffers &buffers, float rate,
                   float eps) {
  gather<WIDTH, COUNT>(table, in, buffers);
  step<WIDTH, COUNT>(table, buffers, rate, eps);
}

// Updates the tables whose turn it is until none is left. FBGEMM's dims are multiples of four.
static void work(const Table *tables, int64_t num_tables, const Lookups &in, const Buffers &buffers,
                 float rate, float eps, std::atomic<int64_t> *next) {
  for (int64_t t = (*next)++; t < num_tables; t = (*next)++) {
    const Table &table = tables[t];
    if (table.dim == 4) update<4, 1>(table, in, buffers, rate, eps);
    else if (table.dim == 8) update<8, 1>(table, in, buffers, rate, eps);
    else if (table.dim == 16) update<16, 1>(table, in, buffers, rate, eps);
    else if (table.dim == 32) update<16, 2>(table, in, buffers, rate, eps);
    else if (table.dim == 64) update<16, 4>(table, in, buffers, rate, eps);
    else update<4, 0>(table, in, buffers, rate, eps);
  }
}

// `scratch` is [threads, values + rows / 4 + rows] units of four bytes, zero except for the lists:
// `values` of the largest table and `rows` of the longest, rounded up to a multiple of 32.
extern "C" void cce_rowwise_adagrad(const Table *tables, int64_t num_tables, const Lookups *in,
                                    float rate, float eps, float *scratch, int64_t values,
                                    int64_t rows, int64_t threads) {
  std::atomic<int64_t> next(0);
  const auto run = [&](int64_t thread) {
    float *sums = scratch + thread * (values + rows / 4 + rows);
    const Buffers buffers{sums, (uint8_t *)(sums + values), (int32_t *)(sums + values + rows / 4)};
    work(tables, num_tables, *in, buffers, rate, eps, &next);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
  } catch (const std::system_error &) {
    // No more threads are to be had; those there are take all turns.
  }
  run(0);
  for (std::thread &other : others) other.join();
}
