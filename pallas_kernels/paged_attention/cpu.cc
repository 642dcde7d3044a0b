// Native paged attention (AVX2, FMA, F16C).
//
// Math: softmax(cap(scale q k')) v by online softmax: running maximum m, sum l and accumulator a;
//   for each tile of positions m' = max(m, max s), a = a e^(m-m') + e^(s-m') v, l likewise.
//
// Shapes: q, out [T, N, H] float32; pages [L, P, K, Z, W] float32, float16 or bfloat16, a key in the
//   first half of a row and its value in the second, W >= 2 H; page table [R, M]; G = N / K query
//   heads share a KV head.
//
// Grid: one item for a KV head of a row and
//   - a span of SPAN positions, where the row has one query (spans are merged afterwards), or
//   - a block of about BLOCK_ROWS / G queries, where it has more (all positions they see):
//
//       pages --row pointers--> k, v of 64 positions --> [G queries, H], dot products
//                               transposed to [H, 16] panels in cache --> 6 x 16 register tiles
//
//   Only live rows and visible positions become items: padding costs nothing.
//
// Traffic: a row's visible keys and values once (one query), once a query block (more).
//
// Numerics: float32; e^x to about 2 ulp. Spans and blocks depend on the row alone, so a row's bits
//   do not depend on its company.
//
// Limits: H a multiple of 16. NaN in unused pages is never read.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTile = 64;         // positions
constexpr int64_t kSpan = 1024;       // positions of one decode item
constexpr int64_t kBlockRows = 192;   // query heads x queries of one prefill item
constexpr int64_t kRegisterRows = 6;  // x 16 columns: 12 accumulators
constexpr int64_t kWorkPerThread = 1 << 17;  // multiply-adds that are worth waking a thread for
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Call {
  const float* q;
  float* out;
  const void* pages;  // of the layer
  const int32_t* page_table;
  const int32_t* query_starts;
  const int32_t* context_lens;
  int64_t num_tokens, num_heads, head_dim, num_pages, num_kv_heads, page_size, width, max_pages,
      num_rows;
  const float* sinks;     // of each head, or null
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none

  int64_t groups() const { return num_heads / num_kv_heads; }
  int64_t first_visible(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  }
};

struct Item {
  int64_t row, head, token, num_queries, position;  // position of the first query
  int64_t begin, end;                               // KV positions
  int64_t partial;                                  // -1: writes its result
};

// Scratch of one thread, grown and kept.
struct Scratch {
  std::vector<float> q, acc, top, total, scores, keys, values;

  void reserve(int64_t rows, int64_t head_dim) {
    q.resize(rows * head_dim);
    acc.assign(rows * head_dim, 0.0f);
    top.assign(rows, kLowest);
    total.assign(rows, 0.0f);
    scores.resize(rows * kTile);
    keys.resize(kTile * head_dim);
    values.resize(kTile * head_dim);
  }
};
thread_local Scratch scratch;

// Where the keys and values of `count` positions from `begin` are.
template <typename T>
struct TileRows {
  const T* k[kTile];
  const T* v[kTile];

  TileRows(const Call& call, const Item& item, int64_t begin, int64_t count) {
    const int64_t page_size = call.page_size, stride = page_size * call.width;
    const int32_t* table = call.page_table + item.row * call.max_pages;
    for (int64_t i = 0; i < count;) {
      const int64_t index = std::min((begin + i) / page_size, call.max_pages - 1);
      const int64_t page = std::clamp<int64_t>(table[index], 0, call.num_pages - 1);
      int64_t offset = (begin + i) % page_size;
      const int64_t base = (page * call.num_kv_heads + item.head) * stride;
      for (; offset < page_size && i < count; ++offset, ++i) {
        k[i] = static_cast<const T*>(call.pages) + base + offset * call.width;
        v[i] = k[i] + call.width / 2;
      }
    }
  }
};

inline void widen_row(const float* in, float* out, int64_t n) { std::copy_n(in, n, out); }
template <typename T>
inline void widen_row(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, load8(in + i));
}

// The item's queries times scale, row i * G + g for query i and head g.
void load_queries(const Call& call, const Item& item, float* q) {
  const int64_t groups = call.groups(), width = groups * call.head_dim;
  const __m256 scale = _mm256_set1_ps(call.scale);
  for (int64_t i = 0; i < item.num_queries; ++i) {
    const float* from =
        call.q + ((item.token + i) * call.num_heads + item.head * groups) * call.head_dim;
    for (int64_t j = 0; j < width; j += 8) {
      _mm256_storeu_ps(q + i * width + j, _mm256_mul_ps(scale, load8(from + j)));
    }
  }
}

void store_results(const Call& call, const Item& item, const float* acc, const float* top,
                   const float* total) {
  const int64_t groups = call.groups(), dim = call.head_dim;
  for (int64_t i = 0; i < item.num_queries; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      float sum = total[i * groups + g];
      if (call.sinks) sum += std::exp(call.sinks[item.head * groups + g] - top[i * groups + g]);
      const __m256 factor = _mm256_set1_ps(sum > 0.0f ? 1.0f / sum : 0.0f);
      const float* from = acc + (i * groups + g) * dim;
      float* to = call.out + ((item.token + i) * call.num_heads + item.head * groups + g) * dim;
      for (int64_t h = 0; h < dim; h += 8) {
        _mm256_storeu_ps(to + h, _mm256_mul_ps(factor, load8(from + h)));
      }
    }
  }
}

// Turns scores [0, last) of one row into weights e^(s - m'), where only [first, last) is visible,
// and moves m, l and a on. Writes zeros up to the next multiple of 8 after `width`.
void soften(const Call& call, float* s, int64_t first, int64_t last, int64_t width, float* top,
            float* total, float* acc) {
  const int64_t padded = (width + 7) / 8 * 8;
  for (int64_t i = 0; i < std::min(first, padded); ++i) s[i] = kLowest;
  for (int64_t i = std::max<int64_t>(last, 0); i < padded; ++i) s[i] = kLowest;
  if (first >= last) {
    std::fill_n(s, padded, 0.0f);
    return;
  }
  __m256 highest = _mm256_set1_ps(kLowest);
  if (call.soft_cap > 0.0f) {
    const __m256 cap = _mm256_set1_ps(call.soft_cap), low = _mm256_set1_ps(kLowest);
    for (int64_t i = 0; i < padded; i += 8) {
      const __m256 x = _mm256_loadu_ps(s + i);
      const __m256 capped = _mm256_mul_ps(cap, tanh8(_mm256_div_ps(x, cap)));
      const __m256 y = _mm256_blendv_ps(capped, low, _mm256_cmp_ps(x, low, _CMP_EQ_OQ));
      _mm256_storeu_ps(s + i, y);
      highest = _mm256_max_ps(highest, y);
    }
  } else {
    for (int64_t i = 0; i < padded; i += 8) highest = _mm256_max_ps(highest, load8(s + i));
  }
  const float tile_top = max8(highest);
  if (tile_top > *top) {
    const __m256 fade = exp8(_mm256_set1_ps(*top - tile_top));
    for (int64_t h = 0; h < call.head_dim; h += 8) {
      _mm256_storeu_ps(acc + h, _mm256_mul_ps(fade, load8(acc + h)));
    }
    *total *= _mm256_cvtss_f32(fade);
    *top = tile_top;
  }
  const __m256 level = _mm256_set1_ps(*top);
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < padded; i += 8) {
    const __m256 p = exp8(_mm256_sub_ps(load8(s + i), level));
    _mm256_storeu_ps(s + i, p);
    sum = _mm256_add_ps(sum, p);
  }
  *total += sum8(sum);
}

// The next tile's rows, whose cache lines are asked for while this tile is computed: pages lie
// scattered, and the processor's own prefetching ends at each.
struct Ahead {
  const char* const* rows;
  int64_t count, bytes;

  void fetch(int64_t first, int64_t num) const {
    for (int64_t i = first; i < std::min(first + num, count); ++i) {
      for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(rows[i] + b, _MM_HINT_T0);
    }
  }
};

// Scores of R queries against `count` keys, four keys at a time; up to 3 beyond `count` are
// written, and masked by `soften`.
template <int R>
void dot_scores(const float* q, const float* const* k, int64_t count, int64_t dim, float* s,
                const Ahead& ahead) {
  for (int64_t i = 0; i < count; i += 4) {
    ahead.fetch(i, 4);
    const float* row[4];
    UNROLL
    for (int j = 0; j < 4; ++j) row[j] = k[std::min(i + j, count - 1)];
    __m256 c[R][4];
    UNROLL
    for (int r = 0; r < R; ++r) {
      UNROLL
      for (int j = 0; j < 4; ++j) c[r][j] = _mm256_setzero_ps();
    }
    for (int64_t h = 0; h < dim; h += 8) {
      __m256 a[R];
      UNROLL
      for (int r = 0; r < R; ++r) a[r] = load8(q + r * dim + h);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const __m256 b = load8(row[j] + h);
        UNROLL
        for (int r = 0; r < R; ++r) c[r][j] = _mm256_fmadd_ps(a[r], b, c[r][j]);
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      _mm_storeu_ps(s + r * kTile + i, sum4x8(c[r][0], c[r][1], c[r][2], c[r][3]));
    }
  }
}

// acc[r] += sum over i of p[r, i] v[i], for R rows.
template <int R>
void add_values(const float* p, const float* const* v, int64_t count, int64_t dim, float* acc,
                const Ahead& ahead) {
  const int64_t share = kTile * 16 / dim;
  for (int64_t h = 0; h < dim; h += 16) {
    ahead.fetch(h / 16 * share, share);
    __m256 c[R][2];
    UNROLL
    for (int r = 0; r < R; ++r) {
      c[r][0] = load8(acc + r * dim + h);
      c[r][1] = load8(acc + r * dim + h + 8);
    }
    for (int64_t i = 0; i < count; ++i) {
      const __m256 v0 = load8(v[i] + h), v1 = load8(v[i] + h + 8);
      UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256 a = _mm256_broadcast_ss(p + r * kTile + i);
        c[r][0] = _mm256_fmadd_ps(a, v0, c[r][0]);
        c[r][1] = _mm256_fmadd_ps(a, v1, c[r][1]);
      }
    }
    UNROLL
    for (int r = 0; r < R; ++r) {
      _mm256_storeu_ps(acc + r * dim + h, c[r][0]);
      _mm256_storeu_ps(acc + r * dim + h + 8, c[r][1]);
    }
  }
}

inline void float_rows(const float* const* rows, int64_t count, int64_t, float*,
                       const float** out) {
  std::copy_n(rows, count, out);
}
template <typename T>
void float_rows(const T* const* rows, int64_t count, int64_t dim, float* widened,
                const float** out) {
  for (int64_t i = 0; i < count; ++i) {
    widen_row(rows[i], widened + i * dim, dim);
    out[i] = widened + i * dim;
  }
}

// One query: the G heads of a KV head over a span of positions.
template <typename T>
void decode_item(const Call& call, const Item& item, float* partials) {
  const int64_t groups = call.groups(), dim = call.head_dim;
  Scratch& mine = scratch;
  mine.reserve(groups, dim);
  load_queries(call, item, mine.q.data());
  TileRows<T> rows(call, item, item.begin, std::min(kTile, item.end - item.begin));
  for (int64_t begin = item.begin; begin < item.end; begin += kTile) {
    const int64_t count = std::min(kTile, item.end - begin);
    const int64_t num_ahead = std::clamp<int64_t>(item.end - begin - kTile, 0, kTile);
    const TileRows<T> next(call, item, begin + kTile, num_ahead);
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
    const Ahead keys_ahead{reinterpret_cast<const char* const*>(next.k), num_ahead, row_bytes};
    const Ahead values_ahead{reinterpret_cast<const char* const*>(next.v), num_ahead, row_bytes};
    const float *k[kTile], *v[kTile];
    float_rows(rows.k, count, dim, mine.keys.data(), k);
    float_rows(rows.v, count, dim, mine.values.data(), v);
    for (int64_t g = 0; g < groups; g += 3) {
      const float* q = mine.q.data() + g * dim;
      float* s = mine.scores.data() + g * kTile;
      float* acc = mine.acc.data() + g * dim;
      const int64_t n = std::min<int64_t>(3, groups - g);
      if (n == 3) dot_scores<3>(q, k, count, dim, s, keys_ahead);
      if (n == 2) dot_scores<2>(q, k, count, dim, s, keys_ahead);
      if (n == 1) dot_scores<1>(q, k, count, dim, s, keys_ahead);
      for (int64_t r = 0; r < n; ++r) {
        soften(call, s + r * kTile, 0, count, count, &mine.top[g + r], &mine.total[g + r],
               acc + r * dim);
      }
      if (n == 3) add_values<3>(s, v, count, dim, acc, values_ahead);
      if (n == 2) add_values<2>(s, v, count, dim, acc, values_ahead);
      if (n == 1) add_values<1>(s, v, count, dim, acc, values_ahead);
    }
    rows = next;
  }
  if (item.partial < 0) {
    store_results(call, item, mine.acc.data(), mine.top.data(), mine.total.data());
    return;
  }
  float* to = partials + item.partial * groups * (dim + 2);
  std::copy_n(mine.top.data(), groups, to);
  std::copy_n(mine.total.data(), groups, to + groups);
  std::copy_n(mine.acc.data(), groups * dim, to + 2 * groups);
}

// Joins the spans of one row and KV head, in order.
void merge_spans(const Call& call, const Item& item, const float* partials, int64_t num_spans) {
  const int64_t groups = call.groups(), dim = call.head_dim, size = groups * (dim + 2);
  Scratch& mine = scratch;
  mine.reserve(groups, dim);
  const float* first = partials + item.partial * size;
  for (int64_t g = 0; g < groups; ++g) {
    float top = kLowest;
    for (int64_t i = 0; i < num_spans; ++i) top = std::max(top, first[i * size + g]);
    mine.top[g] = top;
    for (int64_t i = 0; i < num_spans; ++i) {
      const float* span = first + i * size;
      const float fade = std::exp(span[g] - top);
      mine.total[g] += fade * span[groups + g];
      for (int64_t h = 0; h < dim; ++h) {
        mine.acc[g * dim + h] += fade * span[2 * groups + g * dim + h];
      }
    }
  }
  store_results(call, item, mine.acc.data(), mine.top.data(), mine.total.data());
}

// c [6, 16] (+)= a [6, depth] b [depth, 16].
template <bool kAdd>
inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth,
                          float* c, int64_t c_stride) {
  __m256 sum[kRegisterRows][2];
  UNROLL
  for (int r = 0; r < kRegisterRows; ++r) {
    sum[r][0] = kAdd ? load8(c + r * c_stride) : _mm256_setzero_ps();
    sum[r][1] = kAdd ? load8(c + r * c_stride + 8) : _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 b0 = load8(b + 16 * k), b1 = load8(b + 16 * k + 8);
    UNROLL
    for (int r = 0; r < kRegisterRows; ++r) {
      const __m256 x = _mm256_broadcast_ss(a + r * a_stride + k);
      sum[r][0] = _mm256_fmadd_ps(x, b0, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, b1, sum[r][1]);
    }
  }
  UNROLL
  for (int r = 0; r < kRegisterRows; ++r) {
    _mm256_storeu_ps(c + r * c_stride, sum[r][0]);
    _mm256_storeu_ps(c + r * c_stride + 8, sum[r][1]);
  }
}

// Keys as [kTile / 16] panels [H][16], values as [H / 16] panels [kTile][16].
template <typename T>
void pack_tile(const TileRows<T>& rows, int64_t count, int64_t dim, float* keys, float* values) {
  for (int64_t i = 0; i < count; i += 8) {
    const T* eight[8];
    // Columns past `count` repeat its last key, and are masked.
    for (int64_t j = 0; j < 8; ++j) eight[j] = rows.k[std::min(i + j, count - 1)];
    float* panel = keys + i / 16 * 16 * dim + i % 16;
    for (int64_t h = 0; h < dim; h += 8) transpose8x8(eight, h, panel + h * 16, 16);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t h = 0; h < dim; h += 16) {
      float* to = values + (h / 16 * kTile + i) * 16;
      _mm256_storeu_ps(to, load8(rows.v[i] + h));
      _mm256_storeu_ps(to + 8, load8(rows.v[i] + h + 8));
    }
  }
}

// Several queries of one row, one KV head.
template <typename T>
void prefill_item(const Call& call, const Item& item) {
  const int64_t groups = call.groups(), dim = call.head_dim;
  const int64_t num_rows = item.num_queries * groups;
  const int64_t padded = (num_rows + kRegisterRows - 1) / kRegisterRows * kRegisterRows;
  Scratch& mine = scratch;
  mine.reserve(padded, dim);
  load_queries(call, item, mine.q.data());
  std::fill(mine.q.begin() + num_rows * dim, mine.q.end(), 0.0f);
  float* s = mine.scores.data();
  for (int64_t begin = item.begin; begin < item.end; begin += kTile) {
    const int64_t count = std::min(kTile, item.end - begin);
    pack_tile(TileRows<T>(call, item, begin, count), count, dim, mine.keys.data(),
              mine.values.data());
    for (int64_t row = 0; row < num_rows; row += kRegisterRows) {
      const int64_t last_row = std::min(row + kRegisterRows, num_rows) - 1;
      const int64_t highest = item.position + last_row / groups;
      const int64_t width = std::min(count, highest - begin + 1);
      if (width <= 0) continue;
      if (begin + count <= call.first_visible(item.position + row / groups)) continue;
      for (int64_t i = 0; i < width; i += 16) {
        multiply_tile<false>(mine.q.data() + row * dim, dim, mine.keys.data() + i * dim, dim, s + i,
                             kTile);
      }
      for (int64_t r = 0; r < kRegisterRows; ++r) {
        const int64_t position = item.position + std::min(row + r, last_row) / groups;
        soften(call, s + r * kTile, call.first_visible(position) - begin,
               std::min(count, position - begin + 1), width, &mine.top[row + r],
               &mine.total[row + r], mine.acc.data() + (row + r) * dim);
      }
      for (int64_t h = 0; h < dim; h += 16) {
        multiply_tile<true>(s, kTile, mine.values.data() + h * kTile, width,
                            mine.acc.data() + row * dim + h, dim);
      }
    }
  }
  store_results(call, item, mine.acc.data(), mine.top.data(), mine.total.data());
}

// The live work of a call.
struct Work {
  std::vector<Item> items;
  int64_t num_partials = 0;
  int64_t multiply_adds = 0;

  explicit Work(const Call& call) {
    for (int64_t row = 0; row < call.num_rows; ++row) {
      const int64_t first = std::clamp<int64_t>(call.query_starts[row], 0, call.num_tokens);
      const int64_t last = std::clamp<int64_t>(call.query_starts[row + 1], first, call.num_tokens);
      const int64_t context = call.context_lens[row], num_queries = last - first;
      if (num_queries == 1) add_decode(call, row, first, context);
      if (num_queries > 1) add_prefill(call, row, first, num_queries, context);
    }
  }

  void add_decode(const Call& call, int64_t row, int64_t token, int64_t context) {
    const int64_t start = call.first_visible(context - 1);
    const int64_t num_spans = std::max<int64_t>(1, (context - start + kSpan - 1) / kSpan);
    for (int64_t head = 0; head < call.num_kv_heads; ++head) {
      for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t begin = start + i * kSpan;
        add(call, {row, head, token, 1, context - 1, begin, std::min(begin + kSpan, context),
                   num_spans > 1 ? num_partials++ : -1});
      }
    }
  }

  void add_prefill(const Call& call, int64_t row, int64_t token, int64_t num_queries,
                   int64_t context) {
    const int64_t size = std::max<int64_t>(1, kBlockRows / call.groups());
    // The longest come first, so that threads end together.
    for (int64_t i = (num_queries - 1) / size; i >= 0; --i) {
      const int64_t count = std::min(size, num_queries - i * size);
      const int64_t position = context - num_queries + i * size;
      for (int64_t head = 0; head < call.num_kv_heads; ++head) {
        add(call, {row, head, token + i * size, count, position, call.first_visible(position),
                   position + count, -1});
      }
    }
  }

  void add(const Call& call, const Item& item) {
    items.push_back(item);
    multiply_adds += 2 * item.num_queries * (item.end - item.begin) * call.groups() * call.head_dim;
  }
};

template <typename T>
void attend(ffi::ThreadPool& pool, const Call& call) {
  const Work work(call);
  std::vector<float> partials(work.num_partials * call.groups() * (call.head_dim + 2));
  const int64_t num_items = static_cast<int64_t>(work.items.size());
  parallel_for(pool, num_items, 1 + work.multiply_adds / kWorkPerThread, [&](int64_t i) {
    const Item& item = work.items[i];
    if (item.num_queries == 1) {
      decode_item<T>(call, item, partials.data());
    } else {
      prefill_item<T>(call, item);
    }
  });
  for (int64_t i = 0; i < num_items;) {
    const Item& item = work.items[i];
    int64_t n = 1;
    if (item.partial >= 0) {
      while (i + n < num_items && work.items[i + n].partial >= 0 &&
             work.items[i + n].row == item.row && work.items[i + n].head == item.head) {
        ++n;
      }
      merge_spans(call, item, partials.data(), n);
    }
    i += n;
  }
}

ffi::Error paged_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer pages,
                           ffi::Buffer<ffi::S32> layer,
                           ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> query_starts,
                           ffi::Buffer<ffi::S32> context_lens, ffi::Buffer<ffi::F32> sinks,
                           ffi::ResultBuffer<ffi::F32> out, float scale, float soft_cap, int64_t window) {
  const auto shape = pages.dimensions();
  const auto queries = q.dimensions();
  const ffi::DataType dtype = pages.element_type();
  const int64_t bytes = dtype == ffi::F32 ? 4 : 2;
  const int64_t layer_bytes =
      layer.typed_data()[0] * shape[1] * shape[2] * shape[3] * shape[4] * bytes;
  Call call;
  call.q = q.typed_data();
  call.out = out->typed_data();
  call.pages = static_cast<const char*>(pages.untyped_data()) + layer_bytes;
  call.page_table = page_table.typed_data();
  call.query_starts = query_starts.typed_data();
  call.context_lens = context_lens.typed_data();
  call.num_tokens = queries[0];
  call.num_heads = queries[1];
  call.head_dim = queries[2];
  call.num_pages = shape[1];
  call.num_kv_heads = shape[2];
  call.page_size = shape[3];
  call.width = shape[4];
  call.max_pages = page_table.dimensions()[1];
  call.num_rows = page_table.dimensions()[0];
  call.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  call.scale = scale;
  call.soft_cap = soft_cap;
  call.window = window;
  const int64_t live = std::clamp<int64_t>(call.query_starts[call.num_rows], 0, call.num_tokens);
  const int64_t width = call.num_heads * call.head_dim;
  std::fill(call.out + live * width, call.out + call.num_tokens * width, 0.0f);
  switch (dtype) {
    case ffi::F32:
      attend<float>(pool, call);
      break;
    case ffi::F16:
      attend<Half>(pool, call);
      break;
    case ffi::BF16:
      attend<BFloat16>(pool, call);
      break;
    default:
      return ffi::Error::InvalidArgument("paged_attention: pages of an unsupported dtype");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, jaxserve::paged_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window"));
