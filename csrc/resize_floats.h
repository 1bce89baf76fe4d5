// Resizing of images of any number of channels, of bytes, 16-bit words or floats: along the height into floats, then
// along the width, 8 channels at a time. A result is rounded once.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace ijepa_fast {

#define FMA __attribute__((target("avx2,fma")))

inline double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

inline double cubic(double x) {  // Keys' cubic convolution with a = -1/2
  x = std::abs(x);
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  if (x < 2.0) return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0;
  return 0.0;
}

// The inputs that make each output along one axis: `count[i]` of them from `first[i]` on, with weights that add up to 1.
struct Filter {
  std::vector<int64_t> first, count;
  std::vector<double> weights;  // (out, most)
  int64_t most;

  Filter(int64_t in, int64_t out, bool bicubic) : first(out), count(out) {
    const double scale = static_cast<double>(in) / static_cast<double>(out), stretch = std::max(scale, 1.0);
    const double support = (bicubic ? 2.0 : 1.0) * stretch;
    most = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
    weights.resize(out * most);
    for (int64_t i = 0; i < out; ++i) {
      const double centre = (static_cast<double>(i) + 0.5) * scale;
      first[i] = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
      count[i] = std::min(static_cast<int64_t>(centre + support + 0.5), in) - first[i];
      double* exact = weights.data() + i * most;
      double total = 0.0;
      for (int64_t k = 0; k < count[i]; ++k) {
        const double x = (static_cast<double>(first[i] + k) + 0.5 - centre) / stretch;
        total += exact[k] = bicubic ? cubic(x) : triangle(x);
      }
      for (int64_t k = 0; k < count[i]; ++k) exact[k] /= total;
    }
  }
};

FMA inline __m256 load8(const float* in) { return _mm256_loadu_ps(in); }
FMA inline __m256 load8(const uint16_t* in) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}
FMA inline __m256 load8(const uint8_t* in) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in))));
}

// The first `count` of 8 values, rounded to even and kept in range where T is an integer.
template <typename T>
FMA void store(__m256 values, T* out, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == 8) return _mm256_storeu_ps(out, values);
    alignas(32) float row[8];
    _mm256_store_ps(row, values);
    std::copy(row, row + count, out);
  } else {
    const __m256 most = _mm256_set1_ps(static_cast<float>(static_cast<T>(-1)));
    alignas(32) int32_t row[8];
    const __m256 inside = _mm256_min_ps(_mm256_max_ps(values, _mm256_setzero_ps()), most);
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm256_cvtps_epi32(inside));
    for (int64_t c = 0; c < count; ++c) out[c] = static_cast<T>(row[c]);
  }
}

template <typename T>
class FloatResizer {
 public:
  FloatResizer(int64_t height, int64_t width, int64_t channels, bool bicubic)
      : height_(height), width_(width), channels_(channels), bicubic_(bicubic) {}

  // `in` (height, width, channels) -> `out` (height_, width_, channels), both without gaps.
  FMA void run(const T* in, int64_t height, int64_t width, T* out) {
    const Filter down(height, height_, bicubic_), across(width, width_, bicubic_);
    const int64_t row = width * channels_;
    line_.resize(row + 8);  // 8 channels are read where fewer are left
    for (int64_t y = 0; y < height_; ++y) {
      filter_down(in + down.first[y] * row, down.weights.data() + y * down.most, down.count[y], row);
      filter_across(across, out + y * width_ * channels_);
    }
  }

 private:
  // line_ = the sum of weights times rows.
  FMA void filter_down(const T* rows, const double* weights, int64_t count, int64_t row) {
    int64_t x = 0;
    for (; x + 8 <= row; x += 8) {
      __m256 sum = _mm256_setzero_ps();
      for (int64_t k = 0; k < count; ++k) {
        sum = _mm256_fmadd_ps(_mm256_set1_ps(static_cast<float>(weights[k])), load8(rows + k * row + x), sum);
      }
      _mm256_storeu_ps(line_.data() + x, sum);
    }
    for (; x < row; ++x) {
      float sum = 0.0f;
      for (int64_t k = 0; k < count; ++k) {
        sum = std::fma(static_cast<float>(weights[k]), static_cast<float>(rows[k * row + x]), sum);
      }
      line_[x] = sum;
    }
  }

  FMA void filter_across(const Filter& filter, T* out) {
    for (int64_t i = 0; i < width_; ++i) {
      const double* weights = filter.weights.data() + i * filter.most;
      const float* from = line_.data() + filter.first[i] * channels_;
      for (int64_t c = 0; c < channels_; c += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t k = 0; k < filter.count[i]; ++k) {
          const __m256 weight = _mm256_set1_ps(static_cast<float>(weights[k]));
          sum = _mm256_fmadd_ps(weight, _mm256_loadu_ps(from + k * channels_ + c), sum);
        }
        store(sum, out + i * channels_ + c, std::min<int64_t>(channels_ - c, 8));
      }
    }
  }

  int64_t height_, width_, channels_;  // of the output
  bool bicubic_;
  std::vector<float> line_;
};

#undef FMA

}  // namespace ijepa_fast
