// The gradient of a linear layer's weight over bf16 by products of pairs. See pair_loops.h.

// Rows and columns of dweight whose sums are held at a time, and the tokens that they take at a time: with the factors
// 1.2 MB, which the second cache holds; of x 16 KB are used at once, which the first one does.
constexpr int64_t kGradientRows = 512, kGradientColumns = 384, kGradientDepth = 256;
constexpr int64_t kGradientScratch =
    kGradientRows * kGradientColumns + (kGradientRows + kGradientColumns) * kGradientDepth / 2;

inline void weight_gradient(const WeightGradient<Bf16>& x, Block block, float* scratch) {
  [[maybe_unused]] const Tiles tiles;
  float* sums = scratch;                                                          // (kGradientRows, kGradientColumns)
  Bf16* left = reinterpret_cast<Bf16*>(sums + kGradientRows * kGradientColumns);  // (kGradientRows, depth)
  Bf16* right = left + kGradientRows * kGradientDepth;                            // (depth, kGradientColumns)
  for (int64_t m = block.top; m < block.bottom; m += kGradientRows) {
    const int64_t rows = std::min(block.bottom - m, kGradientRows);
    for (int64_t n = block.left; n < block.right; n += kGradientColumns) {
      const int64_t columns = std::min(block.right - n, kGradientColumns);
      for (int64_t t = 0; t < x.tokens; t += kGradientDepth) {
        const int64_t tokens = std::min(x.tokens - t, kGradientDepth), depth = up(tokens, 32);
        transposed(x.dy + t * x.outputs + m, x.outputs, tokens, depth, rows, left, 32);
        pack(x.x + t * x.inputs + n, x.inputs, tokens, depth, columns, right);
        product(by_tiles(left, depth), right, 16 * depth, sums, kGradientColumns, rows, columns, depth, t > 0);
      }
      narrow(sums, kGradientColumns, rows, columns, nullptr, x.dweight + m * x.inputs + n, x.inputs);
    }
  }
}
