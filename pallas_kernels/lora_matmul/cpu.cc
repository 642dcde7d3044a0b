// Native lora_matmul: what adapters add to a matrix product, in place.
//
// Math: y[t, n] += sum over r of z[t, p(n), r] b[layer, s, r, n], with
//   z[t, p, r] = sum over k of x[t, k] a[layer, s, p R + r, k], for the tokens t of each block and
//   its slot s. p(n) follows `cycle`: columns of part 0, of part 1, …, over and over.
//
// Shapes: x [T, K], y [T, N], and for each class of slots a [L, S, P R, K], b [L, S, R, N],
//   tokens [U, B] (T for padding), slots [U], num_blocks []; all numbers float32.
//
// Grid: an item is a block; threads take items as they come. In it, up to 4 tokens at a time:
//
//       x [4 rows] . a [2 rows] --> z [4][P R] --broadcast--> y[4 rows, 256 columns] += z b[4 rows]
//
// Traffic: a and b of a block's slot once for every 4 of its tokens (from cache but for the first),
//   y once for 4 ranks, from the L1 cache. See traffic.py.
//
// Numerics: float32; a token's sums are taken in the same order whatever stands in its block, so
//   its bits depend on that token and its adapter alone.
//
// Limits: 4 divides R. A class without blocks costs nothing.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int kRows = 4;
constexpr int64_t kColumns = 256;

struct SlotClass {
  const float* a;
  const float* b;
  const int32_t* tokens;
  const int32_t* slots;
  int64_t num_blocks, block, rank, wide;
};

struct Shapes {
  const float* x;
  float* y;
  int64_t num_tokens, depth, columns;
  const int64_t* cycle;
  int64_t num_parts, period;
};

// z[row][q] = x[row] . a[q] for R rows; z has `wide` columns.
template <int R>
void shrink(const float* const x[R], const float* a, int64_t depth, int64_t wide, float* z) {
  for (int64_t q = 0; q < wide; q += 2) {
    const float *first = a + q * depth, *second = first + depth;
    __m256 sum[R][2];
    UNROLL
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
      const __m256 u = load8(first + k), v = load8(second + k);
      UNROLL
      for (int i = 0; i < R; ++i) {
        const __m256 own = load8(x[i] + k);
        sum[i][0] = _mm256_fmadd_ps(own, u, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(own, v, sum[i][1]);
      }
    }
    for (int i = 0; i < R; ++i) {
      float s = sum8(sum[i][0]), t = sum8(sum[i][1]);
      for (int64_t rest = k; rest < depth; ++rest) {
        s += x[i][rest] * first[rest];
        t += x[i][rest] * second[rest];
      }
      z[i * wide + q] = s;
      z[i * wide + q + 1] = t;
    }
  }
}

// y[row][begin : end] += z[row] b[:, begin : end], for R rows; b has `stride` columns.
template <int R>
void expand(float* const y[R], const float* z, int64_t wide, const float* b, int64_t stride,
            int64_t rank, int64_t begin, int64_t end) {
  for (int64_t from = begin; from < end; from += kColumns) {
    const int64_t to = std::min(end, from + kColumns);
    for (int64_t r = 0; r < rank; r += 4) {
      const float* rows = b + r * stride;
      __m256 scale[R][4];
      UNROLL
      for (int i = 0; i < R; ++i) {
        UNROLL
        for (int j = 0; j < 4; ++j) scale[i][j] = _mm256_set1_ps(z[i * wide + r + j]);
      }
      int64_t n = from;
      for (; n + 8 <= to; n += 8) {
        __m256 own[4];
        UNROLL
        for (int j = 0; j < 4; ++j) own[j] = load8(rows + j * stride + n);
        UNROLL
        for (int i = 0; i < R; ++i) {
          __m256 sum = load8(y[i] + n);
          UNROLL
          for (int j = 0; j < 4; ++j) sum = _mm256_fmadd_ps(scale[i][j], own[j], sum);
          store8(y[i] + n, sum);
        }
      }
      for (; n < to; ++n) {
        for (int i = 0; i < R; ++i) {
          for (int j = 0; j < 4; ++j) y[i][n] += z[i * wide + r + j] * rows[j * stride + n];
        }
      }
    }
  }
}

template <int R>
void add_rows(const Shapes& s, const SlotClass& c, const int32_t* tokens, const float* a,
              const float* b, float* z) {
  const float* x[R];
  float* y[R];
  for (int i = 0; i < R; ++i) {
    x[i] = s.x + tokens[i] * s.depth;
    y[i] = s.y + tokens[i] * s.columns;
  }
  shrink<R>(x, a, s.depth, c.wide, z);
  int64_t begin = 0;
  while (begin < s.columns) {
    for (int64_t part = 0; part < s.num_parts; ++part) {
      const int64_t end = begin + s.cycle[part];
      expand<R>(y, z + part * c.rank, c.wide, b, s.columns, c.rank, begin, end);
      begin = end;
    }
  }
}

void add_block(const Shapes& s, const SlotClass& c, int64_t block) {
  const int32_t* tokens = c.tokens + block * c.block;
  const int64_t slot = c.slots[block];
  const float* a = c.a + slot * c.wide * s.depth;
  const float* b = c.b + slot * c.rank * s.columns;
  thread_local std::vector<float> z;
  z.resize(kRows * c.wide);
  int64_t count = 0;
  while (count < c.block && tokens[count] < s.num_tokens) ++count;
  for (int64_t i = 0; i < count; i += kRows) {
    switch (std::min<int64_t>(kRows, count - i)) {
      case 4:
        add_rows<4>(s, c, tokens + i, a, b, z.data());
        break;
      case 3:
        add_rows<3>(s, c, tokens + i, a, b, z.data());
        break;
      case 2:
        add_rows<2>(s, c, tokens + i, a, b, z.data());
        break;
      default:
        add_rows<1>(s, c, tokens + i, a, b, z.data());
    }
  }
}

ffi::Error lora_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> layer,
                       ffi::Buffer<ffi::F32>, ffi::RemainingArgs of_classes,
                       ffi::ResultBuffer<ffi::F32> y, ffi::Span<const int64_t> cycle) {
  Shapes s{x.typed_data(),       y->typed_data(), x.dimensions()[0],
           x.dimensions()[1],    y->dimensions()[1], cycle.begin(),
           static_cast<int64_t>(cycle.size()), 0};
  for (const int64_t width : cycle) s.period += width;
  if (s.period <= 0 || s.columns % s.period) {
    return ffi::Error::InvalidArgument("lora_matmul: the cycle must divide the columns");
  }
  const int64_t at = layer.typed_data()[0];
  std::vector<SlotClass> classes;
  int64_t num_items = 0;
  for (size_t first = 0; first + 5 <= of_classes.size(); first += 5) {
    const auto a = of_classes.get<ffi::Buffer<ffi::F32>>(first);
    const auto b = of_classes.get<ffi::Buffer<ffi::F32>>(first + 1);
    const auto tokens = of_classes.get<ffi::Buffer<ffi::S32>>(first + 2);
    const auto slots = of_classes.get<ffi::Buffer<ffi::S32>>(first + 3);
    const auto num_blocks = of_classes.get<ffi::Buffer<ffi::S32>>(first + 4);
    if (!a.has_value() || !b.has_value() || !tokens.has_value() || !slots.has_value() ||
        !num_blocks.has_value()) {
      return ffi::Error::InvalidArgument("lora_matmul: a class has arrays of another type");
    }
    const auto shape = a->dimensions();
    const int64_t num_slots = shape[1], wide = shape[2], rank = b->dimensions()[2];
    if (rank % 4 || wide != rank * s.num_parts) {
      return ffi::Error::InvalidArgument("lora_matmul: 4 must divide the rank");
    }
    classes.push_back({a->typed_data() + at * num_slots * wide * s.depth,
                       b->typed_data() + at * num_slots * rank * s.columns, tokens->typed_data(),
                       slots->typed_data(), num_blocks->typed_data()[0], tokens->dimensions()[1],
                       rank, wide});
    num_items += classes.back().num_blocks;
  }
  parallel_for(pool, num_items, num_items, [&](int64_t item) {
    for (const SlotClass& c : classes) {
      if (item < c.num_blocks) return add_block(s, c, item);
      item -= c.num_blocks;
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_lora_matmul, jaxserve::lora_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("cycle"));
