// Native segment attention (AVX2, FMA): each token over all tokens of its own row.
//
// Math: softmax(scale q k') v within a row; no cache, no mask.
//
// Shapes: qkv [T, 3, N, H] float32, starts [R + 1], out [T, N, H].
//
// Grid: one item for a head of a row:
//
//       keys --transposed--> [H, L] --6 x 16 register tiles--> scores [6, L] --softmax-->
//       weights [6, L] x values [L, H], read where they lie --6 x 16 register tiles--> out
//
//   Only live rows become items: padding costs the zeros that are written for it.
//
// Traffic: a head's queries, keys and values once from memory; keys and values from cache again for
//   each 6 queries.
//
// Numerics: float32; e^x to about 2 ulp. A row's bits depend on that row alone.
//
// Limits: H a multiple of 16.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRegisterRows = 6;
constexpr int64_t kColumns = 16;
constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds that are worth waking a thread for
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Call {
  const float* qkv;
  float* out;
  const int32_t* starts;
  int64_t num_tokens, num_heads, head_dim, num_rows;
  float scale;

  int64_t width() const { return num_heads * head_dim; }
};

struct Scratch {
  std::vector<float> queries, keys, scores;
};
thread_local Scratch scratch_of_thread;

// out[r, 0 : 16] = sum over k of a[r * a_stride + k] b[k * b_stride + 0 : 16], R rows.
template <int R>
inline void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                 float* out, int64_t out_stride) {
  __m256 c[R][2];
  UNROLL
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    const __m256 b0 = load8(b), b1 = load8(b + 8);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256 x = _mm256_broadcast_ss(a + r * a_stride + k);
      c[r][0] = _mm256_fmadd_ps(x, b0, c[r][0]);
      c[r][1] = _mm256_fmadd_ps(x, b1, c[r][1]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    store8(out + r * out_stride, c[r][0]);
    store8(out + r * out_stride + 8, c[r][1]);
  }
}

// Scores to weights that sum to one; `padded` is the multiple of 16 above `length`.
inline void soften(float* s, int64_t length, int64_t padded) {
  for (int64_t i = length; i < padded; ++i) s[i] = kLowest;
  __m256 highest = _mm256_set1_ps(kLowest);
  for (int64_t i = 0; i < padded; i += 8) highest = _mm256_max_ps(highest, load8(s + i));
  const __m256 level = _mm256_set1_ps(max8(highest));
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < padded; i += 8) {
    const __m256 p = exp8(_mm256_sub_ps(load8(s + i), level));
    store8(s + i, p);
    sum = _mm256_add_ps(sum, p);
  }
  const __m256 factor = _mm256_set1_ps(1.0f / sum8(sum));
  for (int64_t i = 0; i < padded; i += 8) store8(s + i, _mm256_mul_ps(factor, load8(s + i)));
}

template <int R>
void attend_queries(const Call& call, Scratch& scratch, const float* q, const float* v,
                    int64_t length, int64_t padded, float* out) {
  float* scores = scratch.scores.data();
  for (int64_t i = 0; i < padded; i += kColumns) {
    tile<R>(q, call.head_dim, scratch.keys.data() + i, padded, call.head_dim, scores + i, padded);
  }
  for (int r = 0; r < R; ++r) soften(scores + r * padded, length, padded);
  for (int64_t h = 0; h < call.head_dim; h += kColumns) {
    tile<R>(scores, padded, v + h, 3 * call.width(), length, out + h, call.width());
  }
}

void attend(const Call& call, int64_t row, int64_t head) {
  const int64_t first = call.starts[row], length = call.starts[row + 1] - first;
  const int64_t dim = call.head_dim, width = call.width(), stride = 3 * width;
  const int64_t padded = (length + kColumns - 1) / kColumns * kColumns;
  const float* q = call.qkv + first * stride + head * dim;
  const float *k = q + width, *v = k + width;
  Scratch& mine = scratch_of_thread;
  mine.queries.resize(length * dim);
  mine.keys.resize(padded * dim);
  mine.scores.resize(kRegisterRows * padded);
  const __m256 scale = _mm256_set1_ps(call.scale);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t h = 0; h < dim; h += 8) {
      store8(mine.queries.data() + i * dim + h, _mm256_mul_ps(scale, load8(q + i * stride + h)));
    }
  }
  for (int64_t i = 0; i < padded; i += 8) {
    const float* rows[8];
    for (int64_t j = 0; j < 8; ++j) rows[j] = k + std::min(i + j, length - 1) * stride;
    for (int64_t h = 0; h < dim; h += 8) {
      transpose8x8(rows, h, mine.keys.data() + h * padded + i, padded);
    }
  }
  float* out = call.out + first * width + head * dim;
  int64_t i = 0;
  for (; i + kRegisterRows <= length; i += kRegisterRows) {
    attend_queries<kRegisterRows>(call, mine, mine.queries.data() + i * dim, v, length, padded,
                                  out + i * width);
  }
  const float* rest = mine.queries.data() + i * dim;
  float* rest_out = out + i * width;
  switch (length - i) {
    case 5: return attend_queries<5>(call, mine, rest, v, length, padded, rest_out);
    case 4: return attend_queries<4>(call, mine, rest, v, length, padded, rest_out);
    case 3: return attend_queries<3>(call, mine, rest, v, length, padded, rest_out);
    case 2: return attend_queries<2>(call, mine, rest, v, length, padded, rest_out);
    case 1: return attend_queries<1>(call, mine, rest, v, length, padded, rest_out);
  }
}

ffi::Error segment_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> qkv,
                             ffi::Buffer<ffi::S32> starts, ffi::ResultBuffer<ffi::F32> out,
                             float scale) {
  const auto shape = qkv.dimensions();
  const Call call{qkv.typed_data(), out->typed_data(), starts.typed_data(), shape[0], shape[2],
                  shape[3], static_cast<int64_t>(starts.element_count()) - 1, scale};
  int64_t live = 0, multiply_adds = 0;
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t first = call.starts[row], last = call.starts[row + 1];
    if (first != live || last < first || last > call.num_tokens) {
      return ffi::Error::InvalidArgument("segment_attention: starts do not ascend to the tokens");
    }
    if (last > first) rows.push_back(row);
    multiply_adds += 2 * (last - first) * (last - first) * call.width();
    live = last;
  }
  std::fill(call.out + live * call.width(), call.out + call.num_tokens * call.width(), 0.0f);
  const int64_t num_items = static_cast<int64_t>(rows.size()) * call.num_heads;
  parallel_for(pool, num_items, 1 + multiply_adds / kWorkPerThread, [&](int64_t item) {
    attend(call, rows[item / call.num_heads], item % call.num_heads);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_segment_attention, jaxserve::segment_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("scale"));
