// Native matrix product with packed weights (AVX2, FMA, F16C).
//
// Math: out[m, n] = sum over k of x[m, k] w[layer, k, n], for m < num_rows; zero for the others.
//
// Shapes: x [M, K] float32, packed [L, J, K, 24] float32, float16 or int8, out [M, N],
//   J = ceil(N / 24). Or 4-bit codes [L, J, K / 2, 24] uint8, of depth 2k in the low half of a byte
//   and 2k + 1 in the high one, with scale and minimum [L, J, K / 32, 24] bfloat16 of each group of
//   32 along K: w = code * scale + minimum. int8 codes have a float32 scale [L, J, 1, 24] of each
//   column, which multiplies the sum.
//
// Grid: an item is a run of panels times a block of ROW_BLOCK rows; threads take items as they
//   come. In it, a tile of 4 rows x 24 columns lives in 12 registers (3 of weights, 1 of x):
//
//       x [4 rows]  --broadcast-->  |12 accumulators|  <--in order--  panel [K][24]
//
//   Where a panel serves many rows, it is walked in pieces of DEPTH_BLOCK that stay in the L1 cache
//   (narrower weights are widened into such a piece once), and the accumulators rest in `out`
//   between pieces.
//
// Traffic: weights once per block of rows; x once per panel, from cache. See traffic.py.
//
// Numerics: float32 accumulation, one FMA after another in the order of k, whatever M, the place
//   of the row, or the piece: a row's bits depend on that row and the weight alone.
//
// Limits: weights in panels of 24 columns; M, N and K are free, but 32 divides K for 4-bit codes.

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
// Weights of one scale among 4-bit codes; divides kDepthBlock.
constexpr int64_t kGroup = 32;

// Rows up to which a panel is walked from end to end instead of in pieces: widening pays once the
// conversion would be done for more tiles than it takes to write and read the piece.
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
template <typename W>
const float* widened(const W* w, int64_t count, float* scratch) {
  for (int64_t i = 0; i < count; i += 8) _mm256_storeu_ps(scratch + i, load8(w + i));
  return scratch;
}

// A panel of dense weights, or of int8 codes.
template <typename W>
struct DensePanel {
  const W* w;
  const float* scale;  // of the columns; null for none

  void multiply_few(const Product& p, int64_t first, int64_t last, float* acc,
                    int64_t acc_stride) const {
    multiply_rows(p, first, last, 0, w, p.depth, acc, acc_stride);
  }
  static constexpr int64_t few_rows() { return kFewRows; }
  const float* piece(int64_t begin, int64_t depth, float* scratch) const {
    return widened(w + begin * kPanel, depth * kPanel, scratch);
  }
  void finish(int64_t rows, float* acc, int64_t acc_stride) const {
    if (scale == nullptr) return;
    const __m256 s[3] = {load8(scale), load8(scale + 8), load8(scale + 16)};
    for (int64_t r = 0; r < rows; ++r, acc += acc_stride) {
      UNROLL
      for (int j = 0; j < 3; ++j) store8(acc + 8 * j, _mm256_mul_ps(load8(acc + 8 * j), s[j]));
    }
  }
};

// A panel of 4-bit codes.
struct Int4Panel {
  const uint8_t* codes;
  const BFloat16* scale;
  const BFloat16* minimum;

  // Calls each(k, w0, w1, w2) for every depth in order.
  template <typename Each>
  inline void walk(int64_t begin, int64_t depth, Each each) const {
    const __m256i low = _mm256_set1_epi32(15);
    for (int64_t k = begin; k < begin + depth; k += kGroup) {
      __m256 s[3], m[3];
      UNROLL
      for (int j = 0; j < 3; ++j) {
        s[j] = load8(scale + k / kGroup * kPanel + 8 * j);
        m[j] = load8(minimum + k / kGroup * kPanel + 8 * j);
      }
      const uint8_t* row = codes + k / 2 * kPanel;
      for (int64_t i = 0; i < kGroup; i += 2, row += kPanel) {
        __m256 even[3], odd[3];
        UNROLL
        for (int j = 0; j < 3; ++j) {
          const __m256i pair = _mm256_cvtepu8_epi32(
              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + 8 * j)));
          even[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_and_si256(pair, low)), s[j], m[j]);
          odd[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(pair, 4)), s[j], m[j]);
        }
        each(k - begin + i, even[0], even[1], even[2]);
        each(k - begin + i + 1, odd[0], odd[1], odd[2]);
      }
    }
  }

  template <int R>
  void multiply(const float* x, int64_t stride, int64_t depth, float* acc,
                int64_t acc_stride) const {
    __m256 c[R][3];
    UNROLL
    for (int r = 0; r < R; ++r) {
      UNROLL
      for (int j = 0; j < 3; ++j) c[r][j] = _mm256_setzero_ps();
    }
    walk(0, depth, [&](int64_t k, __m256 w0, __m256 w1, __m256 w2) {
      UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256 a = _mm256_broadcast_ss(x + r * stride + k);
        c[r][0] = _mm256_fmadd_ps(a, w0, c[r][0]);
        c[r][1] = _mm256_fmadd_ps(a, w1, c[r][1]);
        c[r][2] = _mm256_fmadd_ps(a, w2, c[r][2]);
      }
    });
    UNROLL
    for (int r = 0; r < R; ++r) {
      UNROLL
      for (int j = 0; j < 3; ++j) _mm256_storeu_ps(acc + r * acc_stride + 8 * j, c[r][j]);
    }
  }

  void multiply_few(const Product& p, int64_t first, int64_t last, float* acc,
                    int64_t acc_stride) const {
    const float* x = p.x + first * p.depth;
    if (last - first == 2) multiply<2>(x, p.depth, p.depth, acc, acc_stride);
    if (last - first == 1) multiply<1>(x, p.depth, p.depth, acc, acc_stride);
  }
  static constexpr int64_t few_rows() { return 2; }
  const float* piece(int64_t begin, int64_t depth, float* scratch) const {
    walk(begin, depth, [&](int64_t k, __m256 w0, __m256 w1, __m256 w2) {
      _mm256_storeu_ps(scratch + k * kPanel, w0);
      _mm256_storeu_ps(scratch + k * kPanel + 8, w1);
      _mm256_storeu_ps(scratch + k * kPanel + 16, w2);
    });
    return scratch;
  }
  void finish(int64_t, float*, int64_t) const {}
};

// Rows [first, last) of one panel.
template <typename Panel>
void multiply_panel(const Product& p, const Panel& w, int64_t panel, int64_t first, int64_t last) {
  alignas(32) float edge[kRowBlock * kPanel];
  alignas(32) float scratch[kDepthBlock * kPanel];
  const int64_t column = panel * kPanel;
  const int64_t columns = std::min(kPanel, p.num_columns - column);
  float* out = p.out + first * p.num_columns + column;
  // The last panel's empty columns have no place in `out`.
  float* acc = columns == kPanel ? out : edge;
  const int64_t acc_stride = columns == kPanel ? p.num_columns : kPanel;
  if (last - first <= w.few_rows()) {
    w.multiply_few(p, first, last, acc, acc_stride);
  } else {
    for (int64_t k = 0; k < p.depth; k += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, p.depth - k);
      multiply_rows(p, first, last, k, w.piece(k, depth, scratch), depth, acc, acc_stride);
    }
  }
  w.finish(last - first, acc, acc_stride);
  if (acc == edge) {
    for (int64_t r = 0; r < last - first; ++r) {
      std::copy_n(edge + r * kPanel, columns, out + r * p.num_columns);
    }
  }
}

// `panel_at(i)` is the weight's panel i.
template <typename PanelAt>
void multiply(ffi::ThreadPool& pool, const Product& p, int64_t num_panels, PanelAt panel_at) {
  const int64_t num_blocks = (p.num_rows + kRowBlock - 1) / kRowBlock;
  const int64_t num_runs = (num_panels + kPanelRun - 1) / kPanelRun;
  parallel_for(pool, num_blocks * num_runs, INT64_MAX, [&](int64_t item) {
    const int64_t first = item / num_runs * kRowBlock;
    const int64_t last = std::min(first + kRowBlock, p.num_rows);
    const int64_t begin = item % num_runs * kPanelRun;
    const int64_t end = std::min(begin + kPanelRun, num_panels);
    for (int64_t panel = begin; panel < end; ++panel) {
      multiply_panel(p, panel_at(panel), panel, first, last);
    }
  });
}

// The product of the live rows; the other rows of `out` become zeros.
Product prepare(const ffi::Buffer<ffi::F32>& x, const ffi::Buffer<ffi::S32>& num_rows,
                ffi::ResultBuffer<ffi::F32>& out) {
  const int64_t rows = x.dimensions()[0];
  const int64_t live = std::clamp<int64_t>(num_rows.typed_data()[0], 0, rows);
  const Product p{x.typed_data(), out->typed_data(), x.dimensions()[1], out->dimensions()[1], live};
  std::fill(p.out + live * p.num_columns, p.out + rows * p.num_columns, 0.0f);
  return p;
}

template <typename Buffer>
int64_t first_panel(const Buffer& packed, const ffi::Buffer<ffi::S32>& layer) {
  const int64_t num_layers = packed.dimensions()[0];
  return std::clamp<int64_t>(layer.typed_data()[0], 0, num_layers - 1) * packed.dimensions()[1];
}

template <typename W, typename Buffer>
void multiply_dense(ffi::ThreadPool& pool, const Product& p, const Buffer& packed,
                    int64_t start, const float* scale = nullptr) {
  const W* w = reinterpret_cast<const W*>(packed.untyped_data());
  multiply(pool, p, packed.dimensions()[1], [=](int64_t i) {
    const float* columns = scale == nullptr ? nullptr : scale + (start + i) * kPanel;
    return DensePanel<W>{w + (start + i) * p.depth * kPanel, columns};
  });
}

ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer packed,
                         ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> num_rows,
                         ffi::ResultBuffer<ffi::F32> out) {
  const Product p = prepare(x, num_rows, out);
  if (p.num_rows == 0) return ffi::Error::Success();
  const int64_t start = first_panel(packed, layer);
  if (packed.element_type() == ffi::F32) {
    multiply_dense<float>(pool, p, packed, start);
  } else if (packed.element_type() == ffi::F16) {
    multiply_dense<Half>(pool, p, packed, start);
  } else {
    return ffi::Error::InvalidArgument("packed_matmul: weights are float32 or float16");
  }
  return ffi::Error::Success();
}

ffi::Error packed_matmul_int8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                              ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> scale,
                              ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> num_rows,
                              ffi::ResultBuffer<ffi::F32> out) {
  const Product p = prepare(x, num_rows, out);
  if (p.num_rows == 0) return ffi::Error::Success();
  multiply_dense<Int8>(pool, p, codes, first_panel(codes, layer), scale.typed_data());
  return ffi::Error::Success();
}

ffi::Error packed_matmul_int4(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                              ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::BF16> scale, ffi::Buffer<ffi::BF16> minimum,
                              ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> num_rows,
                              ffi::ResultBuffer<ffi::F32> out) {
  const Product p = prepare(x, num_rows, out);
  if (p.depth % kGroup) return ffi::Error::InvalidArgument("packed_matmul_int4: 32 must divide K");
  if (p.num_rows == 0) return ffi::Error::Success();
  const int64_t start = first_panel(codes, layer);
  const uint8_t* bytes = codes.typed_data();
  const BFloat16* scales = reinterpret_cast<const BFloat16*>(scale.untyped_data());
  const BFloat16* minima = reinterpret_cast<const BFloat16*>(minimum.untyped_data());
  multiply(pool, p, codes.dimensions()[1], [=](int64_t i) {
    const int64_t group = (start + i) * (p.depth / kGroup) * kPanel;
    return Int4Panel{bytes + (start + i) * (p.depth / 2) * kPanel, scales + group, minima + group};
  });
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_packed_matmul_int8, jaxserve::packed_matmul_int8,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_packed_matmul_int4, jaxserve::packed_matmul_int4,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());
