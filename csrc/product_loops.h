// Products with all sums in registers, and the gradient of a linear layer's weight made of them. See vectors.h.

struct Tiles {};  // nothing to set up, unlike in amx_products.h

// A matrix that is read value by value: element (m, k) is data[m * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// C (M, N * kWidth) = A (M, depth) B (depth, N * kWidth), added to C if `accumulate`; all sums stay in registers.
template <int M, int N>
inline void tile(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, bool accumulate) {
  Vector sum[M][N] = {};
  for (int64_t k = 0; k < depth; ++k, b += b_row, a.data += a.column) {
    Vector right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = load(b + n * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector left = fill(a.data[m * a.row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_row + n * kWidth;
      store(to, accumulate ? load(to) + sum[m][n] : sum[m][n]);
    }
  }
}

// tile<rows, N> for rows <= kRows.
template <int N, int M = kRows>
inline void last_rows(int64_t rows, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                      bool accumulate) {
  if constexpr (M > 0) {
    if (rows == M) return tile<M, N>(a, b, b_row, c, c_row, depth, accumulate);
    last_rows<N, M - 1>(rows, a, b, b_row, c, c_row, depth, accumulate);
  }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), in panels of N vectors; columns is a multiple of kWidth.
template <int N = kVectors>
inline void product(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t columns,
                    int64_t depth, bool accumulate = false) {
  if constexpr (N > 0) {
    for (; columns >= N * kWidth; columns -= N * kWidth, b += N * kWidth, c += N * kWidth) {
      int64_t m = 0;
      for (; m + kRows <= rows; m += kRows) {
        tile<kRows, N>({a.data + m * a.row, a.row, a.column}, b, b_row, c + m * c_row, c_row, depth, accumulate);
      }
      last_rows<N>(rows - m, {a.data + m * a.row, a.row, a.column}, b, b_row, c + m * c_row, c_row, depth, accumulate);
    }
    product<N - 1>(a, b, b_row, c, c_row, rows, columns, depth, accumulate);
  }
}

// Rows of dweight taken at a time, their tokens, and the widest panel of x: in floats, 192 KB of dy, which the second
// cache holds, and 32 KB of x, which the first one does.
constexpr int64_t kGradientRows = 384, kGradientDepth = 128, kGradientWidth = 64;
constexpr int64_t kGradientScratch = (kGradientRows + kGradientWidth) * kGradientDepth;

// A block of dweight (outputs, inputs) = dy^T x. Both factors lie as a product wants them, so nothing is
// transposed, but are copied block by block to where the cache keeps them.
inline void weight_gradient(const WeightGradient<float>& x, Block block, float* scratch) {
  int64_t begin = block.top, end = block.bottom;
  for (; end - begin > kGradientRows; begin += kGradientRows) {
    weight_gradient(x, {begin, begin + kGradientRows, block.left, block.right}, scratch);
  }
  constexpr int64_t kPanel = kVectors * kWidth;
  static_assert(kGradientRows % kRows == 0 && kPanel <= kGradientWidth, "the scratch memory's size follows from these");
  float* left = scratch;                                 // (row tiles, kGradientDepth, kRows)
  float* right = left + kGradientRows * kGradientDepth;  // (kGradientDepth, kPanel)
  for (int64_t t = 0; t < x.tokens; t += kGradientDepth) {
    const int64_t depth = x.tokens - t < kGradientDepth ? x.tokens - t : kGradientDepth;
    for (int64_t m = begin; m < end; m += kRows) {
      const int64_t rows = end - m < kRows ? end - m : kRows;
      float* to = left + (m - begin) * kGradientDepth;
      const float* from = x.dy + t * x.outputs + m;
      for (int64_t k = 0; k < depth; ++k, from += x.outputs, to += kRows) {
        for (int64_t r = 0; r < rows; ++r) to[r] = from[r];
      }
    }
    for (int64_t n = block.left; n < block.right; n += kPanel) {
      const int64_t columns = block.right - n < kPanel ? block.right - n : kPanel;
      for (int64_t k = 0; k < depth; ++k) {
        const float* from = x.x + (t + k) * x.inputs + n;
        for (int64_t c = 0; c < columns; c += kWidth) store(right + k * columns + c, load(from + c));
      }
      for (int64_t m = begin; m < end; m += kRows) {
        const int64_t rows = end - m < kRows ? end - m : kRows;
        product({left + (m - begin) * kGradientDepth, 1, kRows}, right, columns, x.dweight + m * x.inputs + n, x.inputs,
                rows, columns, depth, t > 0);
      }
    }
  }
}
