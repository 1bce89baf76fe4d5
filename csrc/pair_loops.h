// The layouts that bf16 products want, and the gradient of a linear layer's weight made of them. See vectors.h, and
// amx_products.h for
//
//   product: C (rows, columns) fp32 = A (rows, depth) B (depth, columns), added to C if asked
//
// A lies row by row or tile by tile; B in panels of 16 columns, two values of a column side by side: (columns / 16, depth / 2, 16, 2),
// panels `panel` values apart. Rows and columns are multiples of 16, depth of 32: zeros fill what is missing.

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 32 values at once.
inline __m512i together(Vector low, Vector high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
inline void store(Bf16* p, Vector low, Vector high) { _mm512_storeu_si512(p, together(low, high)); }

// Pieces of scratch memory, each at a cache line's start. From a null pointer it counts bytes.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// The first `count` of 32 values.
inline __mmask32 first(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0u; }

// (rows, columns), rows `stride` apart -> (tall, wide) side by side, zeros behind. wide is a multiple of 32.
inline void copy(const Bf16* from, int64_t stride, int64_t rows, int64_t columns, int64_t tall, int64_t wide, Bf16* to) {
  for (int64_t r = 0; r < tall; ++r, from += stride) {
    for (int64_t c = 0; c < wide; c += 32, to += 32) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first(r < rows ? columns - c : 0), from + c));
    }
  }
}

// Four columns of 32 bits of 16 rows, `stride` bytes apart, each as a vector. Their quarters come from memory, which
// leaves half of a transpose's shuffles.
inline void four_columns(const void* rows, int64_t stride, __m512i columns[4]) {
  __m512i x[4], y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto quarter = [&](int64_t r) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(rows) + (4 * r + i) * stride));
    };
    const __m512i one = _mm512_castsi128_si512(quarter(0)), two = _mm512_inserti32x4(one, quarter(1), 1);
    x[i] = _mm512_inserti32x4(_mm512_inserti32x4(two, quarter(2), 2), quarter(3), 3);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    columns[2 * i] = _mm512_unpacklo_epi64(y[i], y[2 + i]);
    columns[2 * i + 1] = _mm512_unpackhi_epi64(y[i], y[2 + i]);
  }
}

// The B of A X^T: X (rows, columns) -> (rows / 16, columns / 2, 16, 2).
inline void transposed_pairs(const Bf16* from, int64_t rows, int64_t columns, Bf16* to) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 8) {
      __m512i x[4];
      four_columns(from + r * columns + c, columns * 2, x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + r * columns + (c / 2 + i) * 32, x[i]);
    }
  }
}

// Two rows of 16 as one vector of pairs.
inline Vector pairs(const Bf16* first, const Bf16* second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  return reinterpret_cast<Vector>(_mm512_or_si512(low, reinterpret_cast<__m512i>(load(second))));
}

// The B of A X: X (rows, columns), rows `stride` apart -> (columns / 16, tall / 2, 16, 2), zeros from `rows` on.
inline void pack(const Bf16* from, int64_t stride, int64_t rows, int64_t tall, int64_t columns, Bf16* to) {
  alignas(64) static constexpr Bf16 kZeros[16] = {};
  for (int64_t r = 0; r < tall; r += 2, from += 2 * stride) {
    for (int64_t c = 0; c < columns; c += 16) {
      if (c % 32 == 0) {
        __builtin_prefetch(from + c + 16 * stride);
        __builtin_prefetch(from + c + 17 * stride);
      }
      const Vector x = pairs(r < rows ? from + c : kZeros, r + 1 < rows ? from + stride + c : kZeros);
      store(reinterpret_cast<float*>(to + c * tall + r * 16), x);
    }
  }
}

// X (rows, columns), rows `stride` apart -> X^T (columns, tall), zeros from `rows` on: row by row, `wide` apart, or tile
// by tile (a `wide` of 32). tall is a multiple of 32, columns of 16.
inline void transposed(const Bf16* from, int64_t stride, int64_t rows, int64_t tall, int64_t columns, Bf16* to,
                       int64_t wide) {
  const int64_t right = wide == 32 ? 512 : 32, below = wide == 32 ? 16 * tall : 16 * wide;
  __m512i pairs[2][16];  // of 16 x 2 rows: a quarter holds columns 8 q to 8 q + 3, and those after them
  for (int64_t r = 0; r < tall; r += 32) {
    for (int64_t c = 0; c < columns; c += 32) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t row = r + 2 * i;
        const Bf16* at = from + row * stride + c;
        const __m512i one = _mm512_maskz_loadu_epi16(first(row < rows ? columns - c : 0), at);
        const __m512i other = _mm512_maskz_loadu_epi16(first(row + 1 < rows ? columns - c : 0), at + stride);
        __builtin_prefetch(at + 32 * stride);
        __builtin_prefetch(at + 33 * stride);
        pairs[0][i] = _mm512_unpacklo_epi16(one, other);
        pairs[1][i] = _mm512_unpackhi_epi16(one, other);
      }
      for (int64_t column = c; column < c + 32 && column < columns; column += 4) {
        __m512i x[4];
        four_columns(reinterpret_cast<const char*>(pairs[column / 4 % 2]) + (column - c) / 8 * 16, 64, x);
        Bf16* tile = to + column / 16 * below + r / 32 * right + column % 16 * wide;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(tile + i * wide, x[i]);
      }
    }
  }
}

// (rows, columns) of sums, times `factor` by row if there is one.
inline void narrow(const float* from, int64_t from_row, int64_t rows, int64_t columns, const float* factor, Bf16* to,
                   int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += stride) {
    const float by = factor ? factor[r] : 1.0f;
    for (int64_t c = 0; c < columns; c += 32) {
      _mm512_mask_storeu_epi16(to + c, first(columns - c), together(load(from + c) * by, load(from + c + 16) * by));
    }
  }
}
