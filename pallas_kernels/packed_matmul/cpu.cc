// Native matrix product with packed weights (AVX2, FMA, F16C).
//
// Math: out[m, n] = sum over k of x[m, k] w[layer, k, n], for m < num_rows; zero for the others.
//
// Shapes: x [M, K] float32, packed [L, J, K, 24] float32 or float16, out [M, N], J = ceil(N / 24).
//
// Grid: an item is a run of panels times a block of ROW_BLOCK rows; threads take items as they
//   come. In it, a tile of 4 rows x 24 columns lives in 12 registers (3 of weights, 1 of x):
//
//       x [4 rows]  --broadcast-->  |12 accumulators|  <--in order--  panel [K][24]
//
//   Where a panel serves many rows, it is walked in pieces of DEPTH_BLOCK that stay in the L1 cache
//   (float16 is widened into such a piece once), and the accumulators rest in `out` between pieces.
//
// Traffic: weights once per block of rows; x once per panel, from cache. See traffic.py.
//
// Numerics: float32 accumulation, one FMA after another in the order of k, whatever M, the place
//   of the row, or the piece: a row's bits depend on that row and the weight alone.
//
// Limits: weights in panels of 24 columns; M, N and K are free.

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPanel = 24;
constexpr int64_t kTile = 4;
constexpr int64_t kRowBlock = 128;
constexpr int64_t kDepthBlock = 288;
constexpr int64_t kPanelRun = 4;
// Rows up to which a panel is walked from end to end instead of in pieces.
constexpr int64_t kFewRows = 16;

struct Product {
  const float* x;
  float* out;
  int64_t depth;
  int64_t num_columns;
  int64_t num_rows;
};

// Adds x[rows, begin : end] times the panel's piece to `acc`, R rows of 24.
template <int R, typename W>
inline void multiply_tile(const float* x, int64_t stride, const W* w, int64_t depth, bool resume,
                          float* acc, int64_t acc_stride) {
  __m256 c[R][3];
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int j = 0; j < 3; ++j) {
      c[r][j] = resume ? _mm256_loadu_ps(acc + r * acc_stride + 8 * j) : _mm256_setzero_ps();
    }
  }
  for (int64_t k = 0; k < depth; ++k, w += kPanel) {
    const __m256 w0 = load8(w), w1 = load8(w + 8), w2 = load8(w + 16);
    UNROLL
    for (int r = 0; r < R; ++r) {
      const __m256 a = _mm256_broadcast_ss(x + r * stride + k);
      c[r][0] = _mm256_fmadd_ps(a, w0, c[r][0]);
      c[r][1] = _mm256_fmadd_ps(a, w1, c[r][1]);
      c[r][2] = _mm256_fmadd_ps(a, w2, c[r][2]);
    }
  }
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int j = 0; j < 3; ++j) _mm256_storeu_ps(acc + r * acc_stride + 8 * j, c[r][j]);
  }
}

// One piece of a panel times rows [first, last), accumulators in `acc` (24 or N apart).
template <typename W>
void multiply_rows(const Product& p, int64_t first, int64_t last, int64_t begin, const W* w,
                   int64_t depth, float* acc, int64_t acc_stride) {
  const float* x = p.x + first * p.depth + begin;
  const bool resume = begin > 0;
  int64_t rows = last - first;
  for (; rows >= kTile; rows -= kTile, x += kTile * p.depth, acc += kTile * acc_stride) {
    multiply_tile<4>(x, p.depth, w, depth, resume, acc, acc_stride);
  }
  if (rows == 3) multiply_tile<3>(x, p.depth, w, depth, resume, acc, acc_stride);
  if (rows == 2) multiply_tile<2>(x, p.depth, w, depth, resume, acc, acc_stride);
  if (rows == 1) multiply_tile<1>(x, p.depth, w, depth, resume, acc, acc_stride);
}

// The piece as float32: as it is, or widened into `scratch`.
inline const float* widened(const float* w, int64_t, float*) { return w; }
inline const float* widened(const Half* w, int64_t count, float* scratch) {
  for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(scratch + i, load8(w + i));
  return scratch;
}

// Rows [first, last) of one panel.
template <typename W>
void multiply_panel(const Product& p, const W* packed, int64_t panel, int64_t first,
                    int64_t last) {
  alignas(32) float edge[kRowBlock * kPanel];
  alignas(32) float scratch[kDepthBlock * kPanel];
  const W* w = packed + panel * p.depth * kPanel;
  const int64_t column = panel * kPanel;
  const int64_t columns = std::min(kPanel, p.num_columns - column);
  float* out = p.out + first * p.num_columns + column;
  // The last panel's empty columns have no place in `out`.
  float* acc = columns == kPanel ? out : edge;
  const int64_t acc_stride = columns == kPanel ? p.num_columns : kPanel;
  if (last - first <= kFewRows) {
    multiply_rows(p, first, last, 0, w, p.depth, acc, acc_stride);
  } else {
    for (int64_t k = 0; k < p.depth; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, p.depth - k);
      const float* piece = widened(w + k * kPanel, depth * kPanel, scratch);
      multiply_rows(p, first, last, k, piece, depth, acc, acc_stride);
    }
  }
  if (acc == edge) {
    for (int64_t r = 0; r < last - first; ++r) {
      std::copy_n(edge + r * kPanel, columns, out + r * p.num_columns);
    }
  }
}

template <typename W>
void multiply(ffi::ThreadPool& pool, const Product& p, const W* packed, int64_t num_panels) {
  const int64_t num_blocks = (p.num_rows + kRowBlock - 1) / kRowBlock;
  const int64_t num_runs = (num_panels + kPanelRun - 1) / kPanelRun;
  parallel_for(pool, num_blocks * num_runs, INT64_MAX, [&](int64_t item) {
    const int64_t first = item / num_runs * kRowBlock;
    const int64_t last = std::min(first + kRowBlock, p.num_rows);
    const int64_t begin = item % num_runs * kPanelRun;
    const int64_t end = std::min(begin + kPanelRun, num_panels);
    for (int64_t panel = begin; panel < end; ++panel) {
      multiply_panel(p, packed, panel, first, last);
    }
  });
}

ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer packed,
                         ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> num_rows,
                         ffi::ResultBuffer<ffi::F32> out) {
  const int64_t rows = x.dimensions()[0];
  const int64_t live = std::clamp<int64_t>(num_rows.typed_data()[0], 0, rows);
  const Product p{x.typed_data(), out->typed_data(), x.dimensions()[1], out->dimensions()[1], live};
  std::fill(p.out + live * p.num_columns, p.out + rows * p.num_columns, 0.0f);
  if (live == 0) return ffi::Error::Success();
  const int64_t num_layers = packed.dimensions()[0], num_panels = packed.dimensions()[1];
  const int64_t index = std::clamp<int64_t>(layer.typed_data()[0], 0, num_layers - 1);
  const int64_t start = index * num_panels * p.depth * kPanel;
  if (packed.element_type() == ffi::F32) {
    multiply(pool, p, packed.typed_data<float>() + start, num_panels);
  } else if (packed.element_type() == ffi::F16) {
    multiply(pool, p, reinterpret_cast<const Half*>(packed.untyped_data()) + start, num_panels);
  } else {
    return ffi::Error::InvalidArgument("packed_matmul: weights are float32 or float16");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_packed_matmul, jaxserve::packed_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
