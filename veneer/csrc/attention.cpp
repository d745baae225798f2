// Causal attention of rows that do not see each other, with the rotary embedding, forward and backward, in bf16 with
// fp32 softmax and accumulation. Contract and formulas: veneer/ops/__init__.py.
//
// Everything is computed transposed, a block of 64 queries in the lanes of vectors: S^T = K Q^T, so that the softmax
// runs down the rows and never across a vector, and P^T, dS^T come out in the layout the next product wants.
// One product does it all: C (m, n) fp32 = A (m, k) x B (k, n) with the depth in pairs of bf16 (32 bits each):
// A row-major, B with the n columns of one pair side by side.

#include <cmath>

#include "tile.h"

namespace {

constexpr int64_t kBlock = kPanel;  // queries, and keys, that are worked on together
#if defined(__AMX_BF16__)
constexpr int64_t kStep = kTile;  // a product does rows, and takes pairs of the depth, in multiples of this
#else
constexpr int64_t kStep = 1;
#endif
inline int64_t RoundUp(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Layout {  // what a call is about
  const int32_t* starts;
  int64_t segments, heads, kv_heads, width;
  const float *cos, *sin;  // (tokens, rotary)
  int64_t rotary;          // half of the rotated width; 0: no rotation
  float scale;
};

// C (m, n) [+]= A x B; n a multiple of kWidth, depth and lda in pairs. There is room for m rounded up to kStep in A and
// C: what stands there is not used.
void Product(int64_t m, int64_t n, int64_t depth, const void* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
  const uint32_t* pairs = static_cast<const uint32_t*>(a);
#if defined(__AMX_BF16__)
  if (depth % kTile == 0) {
    const Slice slice{pairs, lda, depth};
    for (int64_t i = 0; i < m; i += 2 * kTile)
      for (int64_t j = 0; j < n; j += 2 * kTile) {
        float* sum = c + i * ldc + j;
        if (n - j < 2 * kTile)
          for (int64_t r = i; r < m && r < i + 2 * kTile; r += kTile)
            TileProduct<1, 1>(&slice, 1, r, b + j, ldb, c + r * ldc + j, ldc, add);
        else if (m - i > kTile)
          TileProduct<2, 2>(&slice, 1, i, b + j, ldb, sum, ldc, add);
        else
          TileProduct<1, 2>(&slice, 1, i, b + j, ldb, sum, ldc, add);
      }
    return;
  }
#endif
  const int64_t deepest = kWiden ? kWideDepth / 2 : depth;
  for (int64_t k = 0; k < depth; k += deepest) {
    const Slice slice{pairs + k, lda, depth - k < deepest ? depth - k : deepest};
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t columns = n - j < kPanel ? n - j : kPanel;
      if (add || k > 0)
        DownPairs<false>(&slice, 1, m, b + k * ldb + j, ldb, columns, c + j, ldc);
      else
        DownPairs<true>(&slice, 1, m, b + k * ldb + j, ldb, columns, c + j, ldc);
    }
  }
}

// Rotate one head of one token: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); direction -1 turns back.
inline void Rotate(const Layout& l, int64_t token, float direction, float* x) {
  const float *cos = l.cos + token * l.rotary, *sin = l.sin + token * l.rotary;
  for (int64_t d = 0; d < l.rotary; ++d) {
    const float first = x[d], second = x[d + l.rotary], s = direction * sin[d];
    x[d] = first * cos[d] - second * s;
    x[d + l.rotary] = second * cos[d] + first * s;
  }
}

// One head of one token as bf16, rotated when the layout says so.
inline void Rotated(const Layout& l, const uint16_t* from, int64_t token, uint16_t* to) {
  if (l.rotary == 0) {
    std::memcpy(to, from, l.width * 2);
    return;
  }
  float x[512];
  for (int64_t d = 0; d < l.width; d += kWidth) Store(x + d, LoadBFloat16(from + d));
  Rotate(l, token, 1.f, x);
  for (int64_t d = 0; d < l.width; d += kWidth) StoreBFloat16(to + d, Load(x + d));
}

// rows (count, width) bf16 -> [32][width] pairs of two rows; missing rows are zero.
inline void PackPairs(const uint16_t* rows, int64_t stride, int64_t count, int64_t width, uint32_t* to) {
  for (int64_t i = 0; i < kBlock; i += 2) {
    uint32_t* out = to + i / 2 * width;
    if (i >= count) {
      std::memset(out, 0, width * 4);
      continue;
    }
    const uint16_t *low = rows + i * stride, *high = low + stride;
    for (int64_t d = 0; d < width; d += kWidth) {
      Bits pair = __builtin_convertvector(LoadAs<Halves>(low + d), Bits);
      if (i + 1 < count) pair |= __builtin_convertvector(LoadAs<Halves>(high + d), Bits) << 16;
      std::memcpy(out + d, &pair, sizeof pair);
    }
  }
}

// Two fp32 rows of 64 -> one row of 64 pairs, rounded.
inline void RoundPairs(const float* low, const float* high, uint32_t* to) {
  for (int64_t j = 0; j < kBlock; j += kWidth) {
    Bits pair = RoundBFloat16(Load(low + j)) | RoundBFloat16(Load(high + j)) << 16;
    std::memcpy(to + j, &pair, sizeof pair);
  }
}

struct Task {
  int64_t segment, start, length;
};

inline Task Segment(const Layout& l, int64_t s) { return {s, l.starts[s], l.starts[s + 1] - l.starts[s]}; }
inline int64_t Blocks(int64_t length) { return (length + kBlock - 1) / kBlock; }

// ---- forward: one head of one segment ---------------------------------------------------------------------------

void ForwardHead(const Layout& l, const Task& t, int64_t first_head, int64_t heads, const uint16_t* q, int64_t sq,
                 const uint16_t* k, int64_t sk, const uint16_t* v, int64_t sv, uint16_t* o, float* lse,
                 int64_t tokens) {
  const int64_t width = l.width, blocks = Blocks(t.length), padded = blocks * kBlock;
  scratch.Reserve(padded * width * 4 + kBlock * width * 14 + kBlock * kBlock * 8 + 4096);
  uint16_t* keys = scratch.Take<uint16_t>(padded * width);        // rotated rows
  uint32_t* values = scratch.Take<uint32_t>(padded / 2 * width);  // a block: [width][32] pairs of keys
  uint16_t* rows = scratch.Take<uint16_t>(kBlock * width);
  uint32_t* queries = scratch.Take<uint32_t>(width / 2 * kBlock);
  float* score = scratch.Take<float>(kBlock * kBlock);
  uint32_t* weight = scratch.Take<uint32_t>(kBlock / 2 * kBlock);
  float* sum = scratch.Take<float>(width * kBlock);
  uint32_t* pairs = scratch.Take<uint32_t>(kBlock / 2 * width);
  const int64_t kv_head = first_head / (l.heads / l.kv_heads);
  for (int64_t i = 0; i < t.length; ++i)
    Rotated(l, k + (t.start + i) * sk + kv_head * width, t.start + i, keys + i * width);
  for (int64_t b = 0; b < blocks; ++b) {
    PackPairs(v + (t.start + b * kBlock) * sv + kv_head * width, sv, t.length - b * kBlock, width, pairs);
    TurnAll(pairs, width, kBlock / 2, width, values + b * kBlock / 2 * width, kBlock / 2);
  }
  const Vec scale = Set(l.scale);
  for (int64_t head = first_head; head < first_head + heads; ++head)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kBlock, count = t.length - first < kBlock ? t.length - first : kBlock;
      for (int64_t i = 0; i < count; ++i)
        Rotated(l, q + (t.start + first + i) * sq + head * width, t.start + first + i, rows + i * width);
      PackByRow(rows, width, count, width, queries);
      Vec top[kBlock / kWidth], total[kBlock / kWidth];
      for (int j = 0; j < kBlock / kWidth; ++j) top[j] = Set(-1e30f), total[j] = Vec{};
      for (int64_t c = 0; c <= b; ++c) {
        const int64_t live = t.length - c * kBlock < kBlock ? t.length - c * kBlock : kBlock;
        Product(live, kBlock, width / 2, keys + c * kBlock * width, width / 2, queries, kBlock, score, kBlock, false);
        if (c == b)  // the diagonal: key i is seen by queries from i on
          for (int64_t i = 0; i < live; ++i)
            for (int64_t j = 0; j < i; ++j) score[i * kBlock + j] = -1e30f;
        if (live % 2)
          for (int j = 0; j < kBlock; ++j) score[live * kBlock + j] = -1e30f;
        const int64_t even = live + live % 2;
        for (int j = 0; j < kBlock / kWidth; ++j) {
          float* column = score + j * kWidth;
          Vec largest = Load(column);
          for (int64_t i = 1; i < even; ++i) largest = Max(largest, Load(column + i * kBlock));
          largest = Max(top[j], largest * scale);
          const Vec fade = Exp(top[j] - largest);
          Vec added = Vec{};
          for (int64_t i = 0; i < even; i += 2) {
            Vec low = Exp(Load(column + i * kBlock) * scale - largest);
            Vec high = Exp(Load(column + (i + 1) * kBlock) * scale - largest);
            added += low + high;
            Bits pair = RoundBFloat16(low) | RoundBFloat16(high) << 16;
            std::memcpy(weight + i / 2 * kBlock + j * kWidth, &pair, sizeof pair);
          }
          total[j] = total[j] * fade + added;
          top[j] = largest;
          if (c > 0)
            for (int64_t d = 0; d < width; ++d)
              Store(sum + d * kBlock + j * kWidth, Load(sum + d * kBlock + j * kWidth) * fade);
        }
        const int64_t depth = RoundUp(even / 2, kStep);
        std::memset(weight + even / 2 * kBlock, 0, (depth - even / 2) * kBlock * 4);
        Product(width, kBlock, depth, values + c * kBlock / 2 * width, kBlock / 2, weight, kBlock, sum, kBlock, c > 0);
      }
      for (int j = 0; j < kBlock / kWidth; ++j) {
        const Vec inverse = Set(1.f) / total[j];
        for (int64_t d = 0; d < width; ++d)
          Store(sum + d * kBlock + j * kWidth, Load(sum + d * kBlock + j * kWidth) * inverse);
        for (int64_t i = j * kWidth; i < (j + 1) * kWidth && i < count; ++i)
          lse[head * tokens + t.start + first + i] = top[j][i % kWidth] + std::log(total[j][i % kWidth]);
      }
      for (int64_t d = 0; d < width; d += 2)
        RoundPairs(sum + d * kBlock, sum + (d + 1) * kBlock, queries + d / 2 * kBlock);
      TurnAll(queries, kBlock, width / 2, kBlock, reinterpret_cast<uint32_t*>(rows), width / 2);
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(o + ((t.start + first + i) * l.heads + head) * width, rows + i * width, width * 2);
    }
}

// ---- backward: some query heads of one key-value head of one segment ------------------------------------------------

struct Gradients {  // of queries, keys and values; a token every `s_` elements
  uint16_t *q, *k, *v;
  int64_t sq, sk, sv;
};

struct BackwardHead {  // a query head, packed for the products
  uint32_t *q_columns, *q_pairs, *do_columns, *do_pairs;
  float *dq, *lse, *delta;
};

void BackwardGroup(const Layout& l, const Task& t, int64_t first_head, int64_t heads, const uint16_t* q, int64_t sq,
                   const uint16_t* k, int64_t sk, const uint16_t* v, int64_t sv, const uint16_t* o, const uint16_t* d_o,
                   const float* lse, int64_t tokens, const Gradients& out, float* dk_part, float* dv_part) {
  const int64_t width = l.width, blocks = Blocks(t.length), padded = blocks * kBlock, pairs = padded * width / 2;
  const int64_t kv_head = first_head / (l.heads / l.kv_heads);
  scratch.Reserve(heads * (pairs * 4 * 4 + padded * width * 4 + padded * 8 + 8192) + kBlock * width * 30 +
                  kBlock * kBlock * 24 + heads * sizeof(BackwardHead) + 16384);
  BackwardHead* packed = scratch.Take<BackwardHead>(heads);
  uint16_t* rows = scratch.Take<uint16_t>(kBlock * width);
  uint16_t* value_rows = scratch.Take<uint16_t>(kBlock * width);
  uint32_t* keys_t = scratch.Take<uint32_t>(width * kBlock / 2);
  uint32_t* pairs_of_keys = scratch.Take<uint32_t>(width * kBlock / 2);
  float* score = scratch.Take<float>(kBlock * kBlock);
  float* dscore = scratch.Take<float>(kBlock * kBlock);
  uint16_t* p_rows = scratch.Take<uint16_t>(kBlock * kBlock);
  uint16_t* ds_rows = scratch.Take<uint16_t>(kBlock * kBlock);
  uint32_t* ds_pairs = scratch.Take<uint32_t>(kBlock / 2 * kBlock);
  float* dk_sum = scratch.Take<float>(kBlock * width);
  float* dv_sum = scratch.Take<float>(kBlock * width);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t head = first_head + h;
    BackwardHead& p = packed[h];
    p.q_columns = scratch.Take<uint32_t>(pairs);
    p.q_pairs = scratch.Take<uint32_t>(pairs);
    p.do_columns = scratch.Take<uint32_t>(pairs);
    p.do_pairs = scratch.Take<uint32_t>(pairs);
    p.dq = scratch.Take<float>(padded * width);
    p.lse = scratch.Take<float>(padded);
    p.delta = scratch.Take<float>(padded);
    std::memset(p.dq, 0, padded * width * 4);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kBlock, count = t.length - first < kBlock ? t.length - first : kBlock;
      const int64_t at = b * kBlock / 2 * width;
      for (int64_t i = 0; i < count; ++i)
        Rotated(l, q + (t.start + first + i) * sq + head * width, t.start + first + i, rows + i * width);
      PackByRow(rows, width, count, width, p.q_columns + at);
      PackPairs(rows, width, count, width, p.q_pairs + at);
      const uint16_t* grad = d_o + ((t.start + first) * l.heads + head) * width;
      PackByRow(grad, l.heads * width, count, width, p.do_columns + at);
      PackPairs(grad, l.heads * width, count, width, p.do_pairs + at);
      for (int64_t i = 0; i < kBlock; ++i) {
        p.lse[first + i] = 1e30f;  // a query that is not there: every weight becomes 0
        p.delta[first + i] = 0.f;
        if (i >= count) continue;
        p.lse[first + i] = lse[head * tokens + t.start + first + i];
        const uint16_t* result = o + ((t.start + first + i) * l.heads + head) * width;
        Vec delta = Vec{};
        for (int64_t d = 0; d < width; d += kWidth)
          delta = Fma(LoadBFloat16(result + d), LoadBFloat16(grad + i * l.heads * width + d), delta);
        p.delta[first + i] = Sum(delta);
      }
    }
  }
  const Vec scale = Set(l.scale);
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  for (int64_t c = 0; c < blocks; ++c) {
    const int64_t first = c * kBlock, live = t.length - first < kBlock ? t.length - first : kBlock;
    const int64_t even = live + live % 2;
    for (int64_t i = 0; i < live; ++i)
      Rotated(l, k + (t.start + first + i) * sk + kv_head * width, t.start + first + i, rows + i * width);
    PackPairs(rows, width, live, width, pairs_of_keys);
    TurnAll(pairs_of_keys, width, kBlock / 2, width, keys_t, kBlock / 2);
    const uint16_t* values = v + (t.start + first) * sv + kv_head * width;
    int64_t ldv = sv;
    if (live % kStep) {  // rows behind the last one must be there
      for (int64_t i = 0; i < live; ++i) std::memcpy(value_rows + i * width, values + i * sv, width * 2);
      values = value_rows, ldv = width;
    }
    for (int64_t h = 0; h < heads; ++h) {
      const BackwardHead& p = packed[h];
      for (int64_t b = c; b < blocks; ++b) {
        const int64_t at = b * kBlock / 2 * width;
        Product(live, kBlock, width / 2, rows, width / 2, p.q_columns + at, kBlock, score, kBlock, false);
        Product(live, kBlock, width / 2, values, ldv / 2, p.do_columns + at, kBlock, dscore, kBlock, false);
        for (int64_t i = 0; i < live; ++i)
          for (int32_t j = 0; j < kBlock; j += kWidth) {
            Vec weight = Exp(Load(score + i * kBlock + j) * scale - Load(p.lse + b * kBlock + j));
            if (b == c) weight = lanes + j < static_cast<int32_t>(i) ? Vec{} : weight;  // key i: queries from i on
            Vec ds = weight * (Load(dscore + i * kBlock + j) - Load(p.delta + b * kBlock + j)) * scale;
            StoreBFloat16(p_rows + i * kBlock + j, weight);
            StoreBFloat16(ds_rows + i * kBlock + j, ds);
            Store(dscore + i * kBlock + j, ds);
          }
        if (live % 2) std::memset(dscore + live * kBlock, 0, kBlock * 4);
        for (int64_t i = 0; i < even; i += 2)
          RoundPairs(dscore + i * kBlock, dscore + (i + 1) * kBlock, ds_pairs + i / 2 * kBlock);
        const int64_t depth = RoundUp(even / 2, kStep);
        std::memset(ds_pairs + even / 2 * kBlock, 0, (depth - even / 2) * kBlock * 4);
        const bool add = h > 0 || b > c;
        Product(live, width, kBlock / 2, p_rows, kBlock / 2, p.do_pairs + at, width, dv_sum, width, add);
        Product(live, width, kBlock / 2, ds_rows, kBlock / 2, p.q_pairs + at, width, dk_sum, width, add);
        Product(width, kBlock, depth, keys_t, kBlock / 2, ds_pairs, kBlock, p.dq + b * kBlock * width, kBlock, true);
      }
    }
    for (int64_t i = 0; i < live; ++i) {
      const int64_t token = t.start + first + i;
      if (dk_part != nullptr) {  // summed over the query heads, then turned back, by the caller
        std::memcpy(dk_part + (first_head * tokens + token) * width, dk_sum + i * width, width * 4);
        std::memcpy(dv_part + (first_head * tokens + token) * width, dv_sum + i * width, width * 4);
        continue;
      }
      if (l.rotary) Rotate(l, token, -1.f, dk_sum + i * width);
      for (int64_t d = 0; d < width; d += kWidth) {
        StoreBFloat16(out.k + token * out.sk + kv_head * width + d, Load(dk_sum + i * width + d));
        StoreBFloat16(out.v + token * out.sv + kv_head * width + d, Load(dv_sum + i * width + d));
      }
    }
  }
  float* turned = dk_sum;  // no longer needed for its own
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t first = 0; first < t.length; first += kBlock) {
      TurnAll(reinterpret_cast<const uint32_t*>(packed[h].dq + first * width), kBlock, width, kBlock,
              reinterpret_cast<uint32_t*>(turned), width);
      for (int64_t i = 0; i < kBlock && first + i < t.length; ++i) {
        const int64_t token = t.start + first + i;
        if (l.rotary) Rotate(l, token, -1.f, turned + i * width);
        uint16_t* to = out.q + token * out.sq + (first_head + h) * width;
        for (int64_t d = 0; d < width; d += kWidth) StoreBFloat16(to + d, Load(turned + i * width + d));
      }
    }
}

}  // namespace

// q (tokens, heads, width), k and v (tokens, kv_heads, width), a token every sq, sk, sv elements -> o (tokens, heads,
// width) and lse (heads, tokens). starts: segments + 1. cos and sin: (tokens, rotary), or rotary 0.
EXPORT(attention_forward)
(const uint16_t* q, int64_t sq, const uint16_t* k, int64_t sk, const uint16_t* v, int64_t sv, uint16_t* o, float* lse,
 const float* cos, const float* sin, int64_t rotary, const int32_t* starts, int64_t segments, int64_t heads,
 int64_t kv_heads, int64_t width, float scale, int threads) {
  const Layout l{starts, segments, heads, kv_heads, width, cos, sin, rotary, scale};
  const int64_t tokens = starts[segments], group = heads / kv_heads;
  const int64_t each = segments * kv_heads >= 16 ? group : 1;  // query heads a task: few segments are cut finer
  const int64_t parts = heads / each;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < segments * parts; ++n) {
      const Task t = Segment(l, n / parts);
      if (t.length > 0) ForwardHead(l, t, n % parts * each, each, q, sq, k, sk, v, sv, o, lse, tokens);
    }
  }
}

// The gradients of q, k and v from d_o (tokens, heads, width), a token every sdq, sdk, sdv elements. part: 2 x heads x
// tokens x width fp32, or null when segments x kv_heads is 16 or more.
EXPORT(attention_backward)
(const uint16_t* q, int64_t sq, const uint16_t* k, int64_t sk, const uint16_t* v, int64_t sv, const uint16_t* o,
 const float* lse, const uint16_t* d_o, const float* cos, const float* sin, int64_t rotary, const int32_t* starts,
 int64_t segments, int64_t heads, int64_t kv_heads, int64_t width, float scale, uint16_t* dq, int64_t sdq, uint16_t* dk,
 int64_t sdk, uint16_t* dv, int64_t sdv, float* part, int threads) {
  const Layout l{starts, segments, heads, kv_heads, width, cos, sin, rotary, scale};
  const Gradients out{dq, dk, dv, sdq, sdk, sdv};
  const int64_t tokens = starts[segments], group = heads / kv_heads, each = part == nullptr ? group : 1;
  const int64_t parts = heads / each;
  float* dv_part = part == nullptr ? nullptr : part + heads * tokens * width;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < segments * parts; ++n) {
      const Task t = Segment(l, n / parts);
      if (t.length > 0)
        BackwardGroup(l, t, n % parts * each, each, q, sq, k, sk, v, sv, o, d_o, lse, tokens, out, part, dv_part);
    }
  }
  if (part == nullptr) return;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < tokens * kv_heads; ++n) {
    const int64_t token = n / kv_heads, kv_head = n % kv_heads;
    float dk_sum[512], dv_sum[512];
    for (int64_t d = 0; d < width; ++d) dk_sum[d] = dv_sum[d] = 0.f;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t d = 0; d < width; ++d) {
        dk_sum[d] += part[(head * tokens + token) * width + d];
        dv_sum[d] += dv_part[(head * tokens + token) * width + d];
      }
    if (rotary) Rotate(l, token, -1.f, dk_sum);
    for (int64_t d = 0; d < width; d += kWidth) {
      StoreBFloat16(dk + token * sdk + kv_head * width + d, Load(dk_sum + d));
      StoreBFloat16(dv + token * sdv + kv_head * width + d, Load(dv_sum + d));
    }
  }
}
