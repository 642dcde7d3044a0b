// Native kv_update: copies each token's keys and values to their pages, in place.
//
// Math: pages[layer, token_pages[t], :, token_offsets[t]] = (key[t], value[t]) in the halves of a
//   row, where token_pages[t] is not 0.
// Shapes: pages [L, P, K, Z, W] float32, float16 or bfloat16, W >= 2 H; keys and values [T, K, H]
//   float32.
// Grid: one thread; K times two runs of H elements a token.
// Traffic: 2 x (4 + bytes of a page's element) x T x K x H, of the live tokens only.
// Numerics: rounded to the pages' dtype, to nearest even.
// Limits: H a multiple of 8. Pages are aliased to the result; XLA copies them first where the
//   caller has not donated them.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

struct Places {
  const int32_t* pages;
  const int32_t* offsets;
  int64_t num_tokens;
  int64_t layer;
};

template <typename T>
void write(const Places& places, const float* keys_TKH, const float* values_TKH, int64_t head_dim,
           ffi::AnyBuffer::Dimensions shape, void* pages) {
  const int64_t num_pages = shape[1], heads = shape[2], page_size = shape[3], width = shape[4];
  T* layer = static_cast<T*>(pages) + places.layer * num_pages * heads * page_size * width;
  for (int64_t t = 0; t < places.num_tokens; ++t) {
    const int64_t page = places.pages[t], offset = places.offsets[t];
    if (page <= 0 || page >= num_pages || offset < 0 || offset >= page_size) continue;
    for (int64_t head = 0; head < heads; ++head) {
      T* target = layer + ((page * heads + head) * page_size + offset) * width;
      const int64_t source = (t * heads + head) * head_dim;
      for (int64_t h = 0; h < head_dim; h += 8) {
        store8(target + h, load8(keys_TKH + source + h));
        store8(target + width / 2 + h, load8(values_TKH + source + h));
      }
    }
  }
}

ffi::Error kv_update(ffi::Buffer<ffi::F32> k_new, ffi::Buffer<ffi::F32> v_new,
                     ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> token_pages,
                     ffi::Buffer<ffi::S32> token_offsets, ffi::AnyBuffer,
                     ffi::Result<ffi::AnyBuffer> pages) {
  const Places places{token_pages.typed_data(), token_offsets.typed_data(),
                      static_cast<int64_t>(token_pages.element_count()), layer.typed_data()[0]};
  const float *keys = k_new.typed_data(), *values = v_new.typed_data();
  const int64_t head_dim = k_new.dimensions()[2];
  const auto shape = pages->dimensions();
  void* out = pages->untyped_data();
  switch (pages->element_type()) {
    case ffi::F32:
      write<float>(places, keys, values, head_dim, shape, out);
      break;
    case ffi::F16:
      write<Half>(places, keys, values, head_dim, shape, out);
      break;
    case ffi::BF16:
      write<BFloat16>(places, keys, values, head_dim, shape, out);
      break;
    default:
      return ffi::Error::InvalidArgument("kv_update: pages are float32, float16 or bfloat16");
  }
  return ffi::Error::Success();
}

// Writes nothing: the result is memory as XLA allocated it, in huge pages from its first use on
// where the system has them (the attention kernel walks long runs of it).
ffi::Error leave(ffi::Result<ffi::AnyBuffer> out) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(out->untyped_data());
  const uintptr_t start = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + out->size_bytes()) / kHugePage * kHugePage;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxserve

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_leave, jaxserve::leave,
                              xla::ffi::Ffi::Bind().Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_kv_update, jaxserve::kv_update,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
