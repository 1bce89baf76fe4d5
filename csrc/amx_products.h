// Products of bf16 by AMX tiles, sums in fp32. The instructions are written out, as GCC 12's intrinsics do not tell the
// compiler that a tile is loaded from memory. See vectors.h.

// A thread's tiles: 16 rows of 64 bytes each, from here to the end of its piece of work.
struct Tiles {
  struct alignas(64) Shapes {
    uint8_t palette = 1, rest[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Tiles() {
    const Shapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};
template <int Tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Sum, int Left, int RightTile>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(RightTile));
}

// The A of a product: tiles of 16 rows and 32 columns, whose rows are `row` values apart, and the next tiles `right` and
// `below`.
struct Left {
  const Bf16* at;
  int64_t row, right, below;
};
inline Left by_rows(const Bf16* at, int64_t row) { return {at, row, 32, 16 * row}; }
inline Left by_tiles(const Bf16* at, int64_t depth) { return {at, 32, 512, 16 * depth}; }

// C (16 M, 16 N) = A (16 M, depth) B (depth, 16 N), added to C if `accumulate`. Tiles: 0 to 3 C, 4 and 5 A, 6 and 7 B.
template <int M, int N>
inline void tiles(Left a, const Bf16* b, int64_t panel, float* c, int64_t c_row, int64_t depth, bool accumulate) {
  if (accumulate) {
    tile_load<0>(c, c_row * 4);
    if constexpr (N > 1) tile_load<1>(c + 16, c_row * 4);
    if constexpr (M > 1) tile_load<2>(c + 16 * c_row, c_row * 4);
    if constexpr (M > 1 && N > 1) tile_load<3>(c + 16 * c_row + 16, c_row * 4);
  } else {
    tile_zero<0>();
    if constexpr (N > 1) tile_zero<1>();
    if constexpr (M > 1) tile_zero<2>();
    if constexpr (M > 1 && N > 1) tile_zero<3>();
  }
  const Bf16* p = a.at;
  for (int64_t k = 0; k < depth; k += 32, p += a.right, b += 512) {
    tile_load<6>(b, 64);
    tile_load<4>(p, a.row * 2);
    if constexpr (N > 1) tile_load<7>(b + panel, 64);
    if constexpr (M > 1) tile_load<5>(p + a.below, a.row * 2);
    tile_multiply<0, 4, 6>();
    if constexpr (N > 1) tile_multiply<1, 4, 7>();
    if constexpr (M > 1) tile_multiply<2, 5, 6>();
    if constexpr (M > 1 && N > 1) tile_multiply<3, 5, 7>();
  }
  tile_store<0>(c, c_row * 4);
  if constexpr (N > 1) tile_store<1>(c + 16, c_row * 4);
  if constexpr (M > 1) tile_store<2>(c + 16 * c_row, c_row * 4);
  if constexpr (M > 1 && N > 1) tile_store<3>(c + 16 * c_row + 16, c_row * 4);
}

// C (rows, columns) = A (rows, depth) B; see pair_loops.h.
inline void product(Left a, const Bf16* b, int64_t panel, float* c, int64_t c_row, int64_t rows, int64_t columns,
                    int64_t depth, bool accumulate = false) {
  for (int64_t n = 0; n < columns; n += 32, b += 2 * panel, c += 32) {
    const bool wide = n + 32 <= columns;
    Left block = a;
    int64_t m = 0;
    for (; m + 32 <= rows; m += 32, block.at += 2 * a.below) {
      const auto multiply = wide ? tiles<2, 2> : tiles<2, 1>;
      multiply(block, b, panel, c + m * c_row, c_row, depth, accumulate);
    }
    if (m < rows) {
      const auto multiply = wide ? tiles<1, 2> : tiles<1, 1>;
      multiply(block, b, panel, c + m * c_row, c_row, depth, accumulate);
    }
  }
}
