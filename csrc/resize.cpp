// Antialiased resizing of images, as Pillow and PyTorch do it, to the schema that kernels/resize/ops.py defines. Bytes of
// three channels are filtered along their height, transposed, filtered along their width in the same way, and transposed
// back, so that all arithmetic is on whole rows of bytes. Other images are left to resize_floats.h.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>

#include "resize_floats.h"

namespace ijepa_fast {
namespace {

#define AVX2 __attribute__((target("avx2")))
constexpr int64_t kChannels = 3;
constexpr int64_t kVector = 32;  // bytes of a register; rows in scratch memory are padded to a multiple of it

int64_t padded(int64_t bytes) { return (bytes + kVector - 1) / kVector * kVector; }

// Weights in units of 2^-14, rounded so that they add up to one: an even image stays as it is.
struct Rounded : Filter {
  std::vector<int16_t> rounded;

  Rounded(int64_t in, int64_t out, bool bicubic) : Filter(in, out, bicubic), rounded(weights.size()) {
    for (int64_t i = 0; i < out; ++i) {
      double sum = 0.0;
      int64_t before = 0;
      for (int64_t k = 0; k < count[i]; ++k) {
        sum += weights[i * most + k] * 16384.0;
        const int64_t next = static_cast<int64_t>(sum + 32768.5) - 32768;
        rounded[i * most + k] = static_cast<int16_t>(next - before);
        before = next;
      }
    }
  }
};

// Rows of `width` bytes, kVector at least: out[i] = the sum of weights times rows of `in`.
AVX2 void filter_rows(const Rounded& filter, const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride,
                      int64_t width) {
  for (size_t i = 0; i < filter.first.size(); ++i) {
    const int16_t* weights = filter.rounded.data() + i * filter.most;
    const uint8_t* rows = in + filter.first[i] * in_stride;
    const int64_t count = filter.count[i];
    uint8_t* to = out + i * out_stride;
    for (int64_t at = 0; at < width; at += kVector) {
      const int64_t x = std::min(at, width - kVector);
      __m256i low = _mm256_set1_epi16(32), high = low;  // a half, in units of 2^-6
      for (int64_t k = 0; k < count; ++k) {
        const __m256i weight = _mm256_set1_epi16(weights[k]);
        const __m128i* row = reinterpret_cast<const __m128i*>(rows + k * in_stride + x);
        const __m256i a = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(row)), 7);
        const __m256i b = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(row + 1)), 7);
        low = _mm256_adds_epi16(low, _mm256_mulhrs_epi16(a, weight));
        high = _mm256_adds_epi16(high, _mm256_mulhrs_epi16(b, weight));
      }
      const __m256i bytes = _mm256_packus_epi16(_mm256_srai_epi16(low, 6), _mm256_srai_epi16(high, 6));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + x), _mm256_permute4x64_epi64(bytes, 0xd8));
    }
  }
}

// A block of 16 x 16 bytes, transposed: four times, rows i and i + 8 are interleaved.
AVX2 void transpose_block(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  __m128i rows[16], next[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    std::copy(next, next + 16, rows);
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), rows[i]);
}

// (rows, columns) -> (columns, rows). `in` may be read up to the next multiple of 16 of both.
AVX2 void transpose(const uint8_t* in, int64_t rows, int64_t columns, int64_t in_stride, uint8_t* out,
                    int64_t out_stride) {
  uint8_t block[256];
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < columns; j += 16) {
      uint8_t* to = out + j * out_stride + i;
      if (i + 16 <= rows && j + 16 <= columns) {
        transpose_block(in + i * in_stride + j, in_stride, to, out_stride);
        continue;
      }
      transpose_block(in + i * in_stride + j, in_stride, block, 16);
      for (int64_t k = 0; k < std::min<int64_t>(columns - j, 16); ++k) {
        std::memcpy(to + k * out_stride, block + 16 * k, std::min<int64_t>(rows - i, 16));
      }
    }
  }
}

class Resizer {
 public:
  Resizer(int64_t height, int64_t width, bool bicubic) : height_(height), width_(width), bicubic_(bicubic) {}

  // `in` (height, width, 3) -> `out` (height_, width_, 3), both without gaps.
  AVX2 void run(const uint8_t* in, int64_t height, int64_t width, uint8_t* out) {
    const int64_t row = width * kChannels, row_stride = padded(row), column = padded(height_);
    int64_t in_stride = row;
    if (row < kVector) {
      narrow_.assign(height * kVector, 0);
      for (int64_t y = 0; y < height; ++y) std::memcpy(narrow_.data() + y * kVector, in + y * row, row);
      in = narrow_.data();
      in_stride = kVector;
    }
    grow(first_, std::max(padded(height_) * row_stride, width_ * kChannels * column + 16 * column));
    grow(second_, (row_stride + 16) * column);
    filter_rows(Rounded(height, height_, bicubic_), in, in_stride, first_.data(), row_stride, std::max(row, kVector));
    transpose(first_.data(), height_, row, row_stride, second_.data(), column);
    filter_rows(Rounded(width, width_, bicubic_), second_.data(), kChannels * column, first_.data(), kChannels * column,
                kChannels * column);
    transpose(first_.data(), width_ * kChannels, height_, column, out, width_ * kChannels);
  }

 private:
  static void grow(std::vector<uint8_t>& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(bytes);
  }

  int64_t height_, width_;  // of the output
  bool bicubic_;
  std::vector<uint8_t> narrow_, first_, second_;
};

template <typename T, typename Each>
void resize_all(at::TensorList images, Each&& resizer, const at::Tensor& out) {
  for (size_t i = 0; i < images.size(); ++i) {
    resizer.run(images[i].const_data_ptr<T>(), images[i].size(0), images[i].size(1),
                out.data_ptr<T>() + i * out.stride(0));
  }
}

void resize_cpu(at::TensorList images, bool bicubic, const at::Tensor& out) {
  const auto is_image = [&out](const at::Tensor& x, int64_t dim) {
    return x.scalar_type() == out.scalar_type() && x.is_contiguous() && x.dim() == dim && x.size(-1) == out.size(-1) &&
           x.numel() > 0;
  };
  TORCH_CHECK_VALUE(out.size(0) == static_cast<int64_t>(images.size()) && (images.empty() || is_image(out, 4)),
                    "resize: expected out (", images.size(), ", height, width, channels), contiguous");
  for (const at::Tensor& image : images) {
    TORCH_CHECK_VALUE(is_image(image, 3), "resize: expected images (height, width, channels) as out, contiguous");
  }
  const at::ScalarType depth = out.scalar_type();
  TORCH_CHECK_VALUE(depth == at::kByte || depth == at::kUInt16 || depth == at::kFloat,
                    "resize: expected uint8, uint16 or float32");
  if (images.empty()) return;
  const int64_t height = out.size(1), width = out.size(2), channels = out.size(3);
  if (depth == at::kFloat) {
    resize_all<float>(images, FloatResizer<float>(height, width, channels, bicubic), out);
  } else if (depth == at::kUInt16) {
    resize_all<uint16_t>(images, FloatResizer<uint16_t>(height, width, channels, bicubic), out);
  } else if (channels == kChannels) {
    resize_all<uint8_t>(images, Resizer(height, width, bicubic), out);
  } else {
    resize_all<uint8_t>(images, FloatResizer<uint8_t>(height, width, channels, bicubic), out);
  }
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) library.impl("resize_cpu_", ijepa_fast::resize_cpu);
}
#endif
