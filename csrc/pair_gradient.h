// The gradient of a linear layer's weight over bf16 by products of pairs. See pair_loops.h.

// Rows and columns of dweight whose sums are held at a time (512 KB), and the tokens they take at a time: 256 KB of dy,
// which the second cache holds beside them, and 32 KB of x, which the first one does.
constexpr int64_t kGradientRows = 256, kGradientColumns = 512, kGradientDepth = 512, kGradientPanel = 32;
constexpr int64_t kGradientScratch =
    kGradientRows * kGradientColumns + (kGradientRows + kGradientPanel) * kGradientDepth / 2;

inline void weight_gradient(const WeightGradient<Bf16>& x, int64_t begin, int64_t end, float* scratch) {
  [[maybe_unused]] const Tiles tiles;
  float* sums = scratch;                                                                // (kGradientRows, columns)
  Bf16* left = reinterpret_cast<Bf16*>(sums + kGradientRows * kGradientColumns);        // (kGradientRows, depth)
  Bf16* right = left + kGradientRows * kGradientDepth;                                  // (depth, kGradientPanel)
  for (int64_t m = begin; m < end; m += kGradientRows) {
    const int64_t rows = end - m < kGradientRows ? end - m : kGradientRows;
    for (int64_t n = 0; n < x.inputs; n += kGradientColumns) {
      const int64_t columns = x.inputs - n < kGradientColumns ? x.inputs - n : kGradientColumns;
      for (int64_t t = 0; t < x.tokens; t += kGradientDepth) {
        const int64_t tokens = x.tokens - t < kGradientDepth ? x.tokens - t : kGradientDepth, depth = up(tokens, 32);
        transposed(x.dy + t * x.outputs + m, x.outputs, tokens, depth, rows, left, kGradientDepth);
        for (int64_t c = 0; c < columns; c += kGradientPanel) {
          const int64_t panel = columns - c < kGradientPanel ? columns - c : kGradientPanel;
          pack(x.x + t * x.inputs + n + c, x.inputs, tokens, depth, panel, right);
          product(left, kGradientDepth, right, 16 * depth, sums + c, kGradientColumns, rows, panel, depth, t > 0);
        }
      }
      narrow(sums, kGradientColumns, rows, columns, nullptr, x.dweight + m * x.inputs + n, x.inputs);
    }
  }
}
