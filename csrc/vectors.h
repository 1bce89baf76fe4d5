// Vectors of kWidth floats. loops_cpu.cpp includes this, and the *_loops.h after it, once for each generation of x86, in a
// namespace of its own and under the compiler's target for it. Hence no include guards, and no functions of the
// standard library, whose one instance would be some generation's for all.

using Vector = float __attribute__((vector_size(kWidth * 4)));
using Bits = int32_t __attribute__((vector_size(kWidth * 4)));
using Words = uint32_t __attribute__((vector_size(kWidth * 4)));
using Halves = uint16_t __attribute__((vector_size(kWidth * 2)));

inline int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
inline Vector load(const float* p) {
  Vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vector x) { __builtin_memcpy(p, &x, sizeof x); }
inline Vector fill(float x) { return x - Vector{}; }

// 2^x for x <= 0, to 2 units in the last place; 0 below 2^-126.
inline Vector exp2(Vector x) {
  const Vector shifted = x + 12582912.0f;  // 1.5 * 2^23: the nearest integer is now in the low bits
  const Vector f = x - (shifted - 12582912.0f);
  Vector p = fill(1.5403530e-4f);  // 2^f for f in [-.5, .5], Taylor's coefficients ln(2)^n / n!
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Vector power = reinterpret_cast<Vector>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
  return x < -126.0f ? Vector{} : power;
}

// The values numbered I... of `a`, and numbered from kWidth on, of `b`.
template <int... I>
inline Vector pick(Vector a, Vector b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Bits{I...});
#endif
}
using Places = std::make_integer_sequence<int, kWidth>;
template <int By, int... I>
inline Vector rotate(Vector x, std::integer_sequence<int, I...>) {
  return pick(x, x, std::integer_sequence<int, (I + By) % kWidth...>());
}
// a[From], b[From], a[From + 1], b[From + 1], ...
template <int From, int... I>
inline Vector in_turns(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return pick(a, b, std::integer_sequence<int, (From + I / 2 + I % 2 * kWidth)...>());
}
template <int... I>
inline Bits count(std::integer_sequence<int, I...>) {
  return Bits{I...};
}

// A square of vectors, in registers: every pass deals the two halves out in turns.
inline void transpose(Vector (&x)[kWidth]) {
#pragma GCC unroll 8
  for (int pass = 1; pass < kWidth; pass *= 2) {
    Vector y[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = in_turns<0>(x[i], x[i + kWidth / 2], Places());
      y[2 * i + 1] = in_turns<kWidth / 2>(x[i], x[i + kWidth / 2], Places());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

// Sum and maximum of a vector's values, in log2(kWidth) steps.
template <int By = kWidth / 2>
inline float sum_of(Vector x) {
  if constexpr (By == 0) {
    return x[0];
  } else {
    return sum_of<By / 2>(x + rotate<By>(x, Places()));
  }
}
template <int By = kWidth / 2>
inline float largest_of(Vector x) {
  if constexpr (By == 0) {
    return x[0];
  } else {
    const Vector y = rotate<By>(x, Places());
    return largest_of<By / 2>(y > x ? y : x);
  }
}
