// The mask sampler of kernels/mask_sampler/reference.py, bit for bit, on one core.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace ijepa_fast {
namespace {

using Words = std::array<uint32_t, 4>;

// What a draw is for: the top byte of the counter's first word (reference.py).
constexpr uint32_t kTarget = 0u << 24, kContext = 1u << 24, kSubset = 2u << 24;
constexpr int64_t kTriesPerTarget = 20;

struct Key {
  uint64_t seed;
  uint32_t step, first;  // the place of the batch's first image among all of the step
};

// Philox4x32-10 (Salmon et al., 2011).
Words philox(const Key& key, uint32_t image, uint32_t draw) {
  Words c = {draw, key.first + image, 0, key.step};
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

int64_t below(uint32_t word, int64_t n) { return static_cast<int64_t>(word * static_cast<uint64_t>(n) >> 32); }

struct Blocks {  // one kind of block: its size and how many corners it can have
  int64_t h, w, rows, columns;
};

Blocks make_blocks(const char* kind, int64_t h, int64_t w, int64_t height, int64_t width, bool skip_last) {
  const Blocks blocks = {h, w, height - h + 1 - skip_last, width - w + 1 - skip_last};
  TORCH_CHECK_VALUE(h > 0 && w > 0 && blocks.rows > 0 && blocks.columns > 0, "sample_blocks: ", kind, " blocks of ", h,
                    "x", w, " do not fit the ", height, "x", width, " grid");
  return blocks;
}

// The first patch of a block.
int64_t corner(const Words& words, const Blocks& blocks, int64_t width) {
  return below(words[0], blocks.rows) * width + below(words[1], blocks.columns);
}

void sample_blocks(const at::Tensor& context, const at::Tensor& target, int64_t seed, int64_t step, int64_t first,
                   at::IntArrayRef grid, at::IntArrayRef target_size, at::IntArrayRef context_size, int64_t min_keep,
                   bool skip_last) {
  const int64_t height = grid[0], width = grid[1], patches = height * width;
  const Blocks targets = make_blocks("target", target_size[0], target_size[1], height, width, skip_last);
  const Blocks contexts = make_blocks("context", context_size[0], context_size[1], height, width, skip_last);
  TORCH_CHECK_VALUE(context.dim() == 3 && context.size(2) == patches && context.is_contiguous() &&
                        context.scalar_type() == at::kBool,
                    "sample_blocks: context: expected contiguous bool (contexts, images, ", patches, ")");
  TORCH_CHECK_VALUE(target.dim() == 3 && target.size(2) == targets.h * targets.w && target.is_contiguous() &&
                        target.scalar_type() == at::kInt && target.size(1) == context.size(1),
                    "sample_blocks: target: expected contiguous int32 (targets, images, ", targets.h * targets.w, ")");
  TORCH_CHECK_VALUE(contexts.h * contexts.w > min_keep, "sample_blocks: min_keep: expected less than ",
                    contexts.h * contexts.w, ", got ", min_keep);
  const Key key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(first)};
  const int64_t n_contexts = context.size(0), batch = context.size(1), n_targets = target.size(0);
  auto* kept_out = static_cast<uint8_t*>(context.data_ptr());
  int32_t* target_out = target.data_ptr<int32_t>();

  std::vector<int64_t> corners(n_targets);
  std::vector<uint8_t> outside(patches);  // 1 where no target that is cut out covers the patch
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t m = 0; m < n_targets; ++m) {
      corners[m] = corner(philox(key, image, kTarget + m), targets, width);
      int32_t* out = target_out + (m * batch + image) * targets.h * targets.w;
      for (int64_t i = 0; i < targets.h; ++i) {
        for (int64_t j = 0; j < targets.w; ++j) *out++ = static_cast<int32_t>(corners[m] + i * width + j);
      }
    }
    const auto cut_out = [&](int64_t count) {
      std::fill(outside.begin(), outside.end(), uint8_t{1});
      for (int64_t m = 0; m < count; ++m) {
        for (int64_t i = 0; i < targets.h; ++i) std::memset(&outside[corners[m] + i * width], 0, targets.w);
      }
    };
    for (int64_t c = 0; c < n_contexts; ++c) {
      uint8_t* kept = kept_out + (c * batch + image) * patches;
      for (int64_t tries = 0, count = -1; count <= min_keep; ++tries) {
        if (tries % kTriesPerTarget == 0) cut_out(n_targets - tries / kTriesPerTarget);
        const int64_t first = corner(philox(key, image, kContext + (c << 16) + tries), contexts, width);
        std::memset(kept, 0, patches);
        count = 0;
        for (int64_t i = 0; i < contexts.h; ++i) {
          const int64_t row = first + i * width;
          std::memcpy(kept + row, &outside[row], contexts.w);
          for (int64_t j = row; j < row + contexts.w; ++j) count += kept[j];
        }
      }
    }
  }
}

void random_subset(const at::Tensor& subset, const at::Tensor& kept, const at::Tensor& count, int64_t seed,
                   int64_t step, int64_t first, int64_t draw) {
  TORCH_CHECK_VALUE(kept.dim() == 2 && kept.is_contiguous() && kept.scalar_type() == at::kBool &&
                        subset.sizes() == kept.sizes() && subset.is_contiguous() && subset.scalar_type() == at::kBool,
                    "random_subset: kept and subset: expected contiguous bool (images, patches)");
  TORCH_CHECK_VALUE(count.dim() == 1 && count.size(0) == kept.size(0) && count.is_contiguous() &&
                        count.scalar_type() == at::kInt,
                    "random_subset: count: expected contiguous int32 (images,)");
  const Key key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(first)};
  const int64_t batch = kept.size(0), patches = kept.size(1);
  const auto* from = static_cast<const uint8_t*>(kept.data_ptr());
  auto* to = static_cast<uint8_t*>(subset.data_ptr());
  const int32_t* counts = count.const_data_ptr<int32_t>();
  std::memset(to, 0, batch * patches);

  std::vector<uint64_t> order;
  for (int64_t image = 0; image < batch; ++image) {
    order.clear();
    Words words{};
    for (int64_t patch = 0; patch < patches; ++patch) {
      if (patch % 4 == 0) words = philox(key, image, kSubset + (draw << 16) + patch / 4);
      if (from[image * patches + patch]) order.push_back(uint64_t{words[patch % 4]} << 32 | patch);
    }
    const int64_t chosen = counts[image];
    TORCH_CHECK_VALUE(0 <= chosen && chosen <= static_cast<int64_t>(order.size()),
                      "random_subset: count: expected between 0 and the ", order.size(), " kept patches, got ", chosen);
    std::nth_element(order.begin(), order.begin() + chosen, order.end());
    for (int64_t i = 0; i < chosen; ++i) to[image * patches + (order[i] & 0xFFFFFFFF)] = 1;
  }
}

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CPU, library) {
  library.impl("sample_blocks_", ijepa_fast::sample_blocks);
  library.impl("random_subset_", ijepa_fast::random_subset);
}
