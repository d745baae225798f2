// What happens between the products, a row at a time: RMS norm, gated activation, dropout, softmax cross-entropy; bf16
// in and out, fp32 between. Contracts and formulas: veneer/ops/reference.py and veneer/ops/cross_entropy.py.

#include <cmath>

#include "simd.h"

namespace {

enum Activation { kSilu = 0, kGeluTanh = 1 };

// Loads and stores of the last, short vector of a row.
inline Vec LoadSome(const uint16_t* p, int64_t count) {
  if (count >= kWidth) return LoadBFloat16(p);
  uint16_t some[kWidth] = {};
  std::memcpy(some, p, count * 2);
  return LoadBFloat16(some);
}
inline void StoreSome(uint16_t* p, Vec v, int64_t count) {
  if (count >= kWidth) return StoreBFloat16(p, v);
  uint16_t some[kWidth];
  StoreBFloat16(some, v);
  std::memcpy(p, some, count * 2);
}

inline Vec Sigmoid(Vec x) {  // from e^-|x|, which cannot overflow
  const Vec small = Exp(x < Vec{} ? x : -x), one = Set(1.f);
  const Vec low = small / (one + small);
  return x < Vec{} ? low : one - low;
}

// The activation of x, and its derivative.
template <int kKind>
inline void Activate(Vec x, Vec* value, Vec* slope) {
  const Vec one = Set(1.f);
  if (kKind == kSilu) {
    const Vec s = Sigmoid(x);
    *value = x * s;
    *slope = s * (one + x * (one - s));
  } else {  // x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the same as 0.5 x (1 + tanh u)
    const Vec x2 = x * x, s = Sigmoid(Set(1.5957691f) * x * (one + Set(0.044715f) * x2));
    *value = x * s;
    *slope = s + x * s * (one - s) * Set(1.5957691f) * (one + Set(3 * 0.044715f) * x2);
  }
}

struct Rows {  // of gate and up, a row every `stride` elements; of the output, dense
  int64_t rows, width, stride;
};

template <int kKind>
void Gated(const Rows& n, const uint16_t* gate, const uint16_t* up, uint16_t* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n.rows * n.width > 65536)
  for (int64_t r = 0; r < n.rows; ++r)
    for (int64_t i = 0; i < n.width; i += kWidth) {
      Vec value, slope;
      Activate<kKind>(LoadSome(gate + r * n.stride + i, n.width - i), &value, &slope);
      StoreSome(out + r * n.width + i, value * LoadSome(up + r * n.stride + i, n.width - i), n.width - i);
    }
}

// kDots: also sums over the rows, by column, of each gradient times what it is the gradient of, added to `dots`: those
// of gate, then those of up, each filled up to whole vectors.
template <int kKind, bool kDots>
void GatedBackward(const Rows& n, int64_t from, int64_t to, const uint16_t* d_out, const uint16_t* gate,
                   const uint16_t* up, uint16_t* d_gate, uint16_t* d_up, uint16_t* out, float* dots) {
  const int64_t padded = (n.width + kWidth - 1) / kWidth * kWidth;
  for (int64_t r = from; r < to; ++r)
    for (int64_t i = 0; i < n.width; i += kWidth) {
      const int64_t at = r * n.stride + i, dense = r * n.width + i, left = n.width - i;
      Vec value, slope;
      const Vec g = LoadSome(gate + at, left);
      Activate<kKind>(g, &value, &slope);
      const Vec d = LoadSome(d_out + dense, left), u = LoadSome(up + at, left);
      const Vec back = d * u * slope;
      if constexpr (kDots) {
        Store(dots + i, Fma(back, g, Load(dots + i)));
        Store(dots + padded + i, Fma(d * value, u, Load(dots + padded + i)));
      }
      StoreSome(d_gate + at, back, left);
      StoreSome(d_up + at, d * value, left);
      StoreSome(out + dense, value * u, left);
    }
}

typedef uint16_t Words __attribute__((vector_size(4 * kWidth)));  // of bf16, two in each 32-bit lane

inline Words LoadWords(const uint16_t* p, int64_t count) {
  if (count >= 2 * kWidth) return LoadAs<Words>(p);
  Words some{};
  std::memcpy(&some, p, count * 2);
  return some;
}
inline void StoreWords(uint16_t* p, Words v, int64_t count) {
  if (count >= 2 * kWidth) {
    std::memcpy(p, &v, sizeof v);
  } else {
    std::memcpy(p, &v, count * 2);
  }
}

inline Words AddBFloat16(Words a, Words b) {
  const Bits low = RoundBFloat16((Vec)((Bits)a << 16) + (Vec)((Bits)b << 16));
  const Bits high = RoundBFloat16((Vec)((Bits)a & 0xffff0000u) + (Vec)((Bits)b & 0xffff0000u));
  return (Words)(low | high << 16);
}

}  // namespace

// y (rows, width) = x rstd (weight + shift), rstd (rows) = (mean(x^2) + epsilon)^-1/2. rest: of x, or null. zeros: how
// many factors weight + shift are 0.
EXPORT(rms_norm)
(const uint16_t* x, const uint16_t* rest, const uint16_t* weight, float shift, float epsilon, int64_t rows,
 int64_t width, uint16_t* y, float* rstd, int64_t* zeros, int threads) {
  *zeros = 0;
  for (int64_t i = 0; i < width; ++i) *zeros += FromBFloat16(weight[i]) + shift == 0.f;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > 65536)
  for (int64_t r = 0; r < rows; ++r) {
    const auto whole = [&](int64_t i) {
      const Vec v = LoadSome(x + r * width + i, width - i);
      return rest ? v + LoadSome(rest + r * width + i, width - i) : v;
    };
    Vec squares = Vec{};
    for (int64_t i = 0; i < width; i += kWidth) squares = Fma(whole(i), whole(i), squares);
    const float inverse = 1.f / std::sqrt(Sum(squares) / static_cast<float>(width) + epsilon);
    rstd[r] = inverse;
    for (int64_t i = 0; i < width; i += kWidth)
      StoreSome(y + r * width + i, whole(i) * Set(inverse) * (LoadSome(weight + i, width - i) + Set(shift)), width - i);
  }
}

// dx = rstd (g - x' mean(g x')) [+ d_residual], g = dy (weight + shift). x' = x rstd, from x or, where that is null,
// from what rms_norm gave: y / (weight + shift).
EXPORT(rms_norm_backward)
(const uint16_t* dy, const uint16_t* x, const uint16_t* y, const uint16_t* weight, float shift, const float* rstd,
 const uint16_t* d_residual, int64_t rows, int64_t width, uint16_t* dx, int threads) {
#pragma omp parallel num_threads(threads) if (rows * width > 65536)
  {
    const int64_t vectors = (width + kWidth - 1) / kWidth;
    scratch.Reserve(2 * vectors * sizeof(Vec) + 64);
    Vec *factor = scratch.Take<Vec>(vectors), *back = scratch.Take<Vec>(vectors);
    for (int64_t v = 0; v < vectors; ++v) {
      factor[v] = LoadSome(weight + v * kWidth, width - v * kWidth) + Set(shift);
      back[v] = factor[v] == Vec{} ? Vec{} : Set(1.f) / factor[v];
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const auto normed = [&](int64_t i) {
        if (x) return LoadSome(x + r * width + i, width - i) * Set(rstd[r]);
        return LoadSome(y + r * width + i, width - i) * back[i / kWidth];
      };
      const auto gradient = [&](int64_t i) { return LoadSome(dy + r * width + i, width - i) * factor[i / kWidth]; };
      Vec along = Vec{};
      for (int64_t i = 0; i < width; i += kWidth) along = Fma(gradient(i), normed(i), along);
      const Vec share = Set(Sum(along) / static_cast<float>(width));
      for (int64_t i = 0; i < width; i += kWidth) {
        Vec d = (gradient(i) - normed(i) * share) * Set(rstd[r]);
        if (d_residual) d += LoadSome(d_residual + r * width + i, width - i);
        StoreSome(dx + r * width + i, d, width - i);
      }
    }
  }
}

// out (rows, width) = activation(gate) up; gate and up have a row every `stride` elements.
EXPORT(gated)
(const uint16_t* gate, const uint16_t* up, int kind, int64_t rows, int64_t width, int64_t stride, uint16_t* out,
 int threads) {
  if (kind == kSilu) return Gated<kSilu>({rows, width, stride}, gate, up, out, threads);
  Gated<kGeluTanh>({rows, width, stride}, gate, up, out, threads);
}

// The gradients of gate and up, strided like them, from d_out (rows, width); and once more what `gated` gives, which
// may be written over d_out. dots (2, width), or null: sums over the rows of d_gate gate and of d_up up.
EXPORT(gated_backward)
(const uint16_t* d_out, const uint16_t* gate, const uint16_t* up, int kind, int64_t rows, int64_t width, int64_t stride,
 uint16_t* d_gate, uint16_t* d_up, uint16_t* out, float* dots, int threads) {
  const Rows n{rows, width, stride};
  const int64_t padded = (width + kWidth - 1) / kWidth * kWidth, parts = rows * width > 65536 ? threads : 1;
  float* part = nullptr;
  if (dots) {
    scratch.Reserve(parts * 2 * padded * 4);
    part = scratch.Take<float>(parts * 2 * padded);
    std::memset(part, 0, parts * 2 * padded * 4);
  }
  const auto run = kind == kSilu ? dots ? GatedBackward<kSilu, true> : GatedBackward<kSilu, false>
                   : dots        ? GatedBackward<kGeluTanh, true>
                                 : GatedBackward<kGeluTanh, false>;
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 1)
  for (int64_t p = 0; p < parts; ++p)
    run(n, rows * p / parts, rows * (p + 1) / parts, d_out, gate, up, d_gate, d_up, out,
        dots ? part + p * 2 * padded : nullptr);
  for (int64_t i = 0; dots && i < 2 * width; ++i) {
    const float* at = part + (i < width ? i : padded + i - width);
    dots[i] = 0.f;
    for (int64_t p = 0; p < parts; ++p) dots[i] += at[p * 2 * padded];
  }
}

// dots (n) = sum over the rows of x y, both (rows, n) with a row every ldx and ldy elements.
EXPORT(column_dots)
(const uint16_t* x, int64_t ldx, const uint16_t* y, int64_t ldy, int64_t rows, int64_t n, float* dots, int threads) {
  constexpr int64_t kTogether = 4;  // rows whose products are added up in registers
  const int64_t padded = (n + kWidth - 1) / kWidth * kWidth, parts = rows * n > 65536 ? threads : 1;
  scratch.Reserve(parts * padded * 4);
  float* sums = scratch.Take<float>(parts * padded);
#pragma omp parallel for schedule(static) num_threads(threads) if (parts > 1)
  for (int64_t p = 0; p < parts; ++p) {
    float* sum = sums + p * padded;
    std::memset(sum, 0, padded * 4);
    const int64_t to = rows * (p + 1) / parts;
    for (int64_t r = rows * p / parts; r < to; r += kTogether) {
      const int64_t here = to - r < kTogether ? to - r : kTogether;
      const uint16_t *a = x + r * ldx, *b = y + r * ldy;
      for (int64_t i = 0; i < n; i += kWidth) {
        if (i % 32 == 0 && r + 2 * kTogether <= to)
          for (int64_t k = kTogether; k < 2 * kTogether; ++k) {
            __builtin_prefetch(a + k * ldx + i);
            __builtin_prefetch(b + k * ldy + i);
          }
        Vec total = Load(sum + i);
        if (here == kTogether && n - i >= kWidth) {
#pragma GCC unroll 4
          for (int64_t k = 0; k < kTogether; ++k)
            total = Fma(LoadBFloat16(a + k * ldx + i), LoadBFloat16(b + k * ldy + i), total);
        } else {
          for (int64_t k = 0; k < here; ++k)
            total = Fma(LoadSome(a + k * ldx + i, n - i), LoadSome(b + k * ldy + i, n - i), total);
        }
        Store(sum + i, total);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    dots[i] = 0.f;
    for (int64_t p = 0; p < parts; ++p) dots[i] += sums[p * padded + i];
  }
}

// Rows of x (rows, n) times a factor each, to `wide` in fp32 (it may be x), or to `half` in bf16; with `other` (rows,
// n) first dots (rows) = the sums of x other, times `unit`.
EXPORT(scale_rows)
(const float* x, int64_t rows, int64_t n, const float* factors, float unit, float* wide, uint16_t* half,
 const float* other, float* dots, int threads) {
  (void)threads;  // a few rows: one thread is faster
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * n;
    const float factor = factors[r] * unit;
    if (other != nullptr) {
      Vec total = Vec{};
      float left = 0.f;
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) total = Fma(Load(from + i), Load(other + r * n + i), total);
      for (; i < n; ++i) left += from[i] * other[r * n + i];
      dots[r] = (Sum(total) + left) * unit;
    }
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Vec scaled = Load(from + i) * Set(factor);
      if (half != nullptr)
        StoreBFloat16(half + r * n + i, scaled);
      else
        Store(wide + r * n + i, scaled);
    }
    for (; i < n; ++i) {
      if (half != nullptr)
        half[r * n + i] = ToBFloat16(from[i] * factor);
      else
        wide[r * n + i] = from[i] * factor;
    }
  }
}

// A matrix (rows, columns) that AdaLoRA watches, its gradient, and what `watch` keeps of both.
struct Watched {
  const float *weight, *gradient;  // no gradient: none this time
  float *mean, *stray, *worth;
  int64_t rows, columns, by_row;
};

// mean <- beta mean + (1 - beta) v, v = |weight gradient|; stray likewise of |v - mean|; worth = the average of mean
// stray of each row (by_row), or each column.
EXPORT(watch)
(const Watched* all, int64_t count, float beta, int threads) {
  const float now = 1.f - beta;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count > 1)
  for (int64_t k = 0; k < count; ++k) {
    const Watched& one = all[k];
    if (!one.by_row) std::memset(one.worth, 0, one.columns * 4);
    for (int64_t r = 0; r < one.rows; ++r) {
      const int64_t at = r * one.columns;
      const float *weight = one.weight + at, *gradient = one.gradient == nullptr ? nullptr : one.gradient + at;
      float *mean = one.mean + at, *stray = one.stray + at, left = 0.f;
      Vec total = Vec{};
      int64_t c = 0;
      for (; c + kWidth <= one.columns; c += kWidth) {
        Vec v = gradient == nullptr ? Vec{} : Load(weight + c) * Load(gradient + c);
        v = Max(v, -v);
        const Vec m = Set(beta) * Load(mean + c) + Set(now) * v;
        const Vec d = v - m, u = Set(beta) * Load(stray + c) + Set(now) * Max(d, -d);
        Store(mean + c, m);
        Store(stray + c, u);
        if (one.by_row)
          total += m * u;
        else
          Store(one.worth + c, Load(one.worth + c) + m * u);
      }
      for (; c < one.columns; ++c) {
        float v = gradient == nullptr ? 0.f : weight[c] * gradient[c];
        v = v < 0.f ? -v : v;
        const float m = mean[c] = beta * mean[c] + now * v, d = v - m;
        const float u = stray[c] = beta * stray[c] + now * (d < 0.f ? -d : d);
        if (one.by_row)
          left += m * u;
        else
          one.worth[c] += m * u;
      }
      if (one.by_row) one.worth[r] = (Sum(total) + left) / one.columns;
    }
    if (!one.by_row)
      for (int64_t c = 0; c < one.columns; ++c) one.worth[c] /= one.rows;
  }
}

// A matrix whose rows (by_row), or columns, are to be orthogonal; `gradient` gets factor (M M^T - I) M, or
// factor M (M^T M - I).
struct Orthogonal {
  const float* matrix;
  float* gradient;
  int64_t rows, columns, by_row;
};

EXPORT(orthogonal)
(const Orthogonal* all, int64_t count, float factor, int threads) {
  constexpr int64_t kWide = 4 * kWidth;  // four sums at a time: one would wait for itself
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count > 1)
  for (int64_t k = 0; k < count; ++k) {
    const Orthogonal& one = all[k];
    const int64_t r = one.by_row ? one.rows : one.columns, n = one.by_row ? one.columns : one.rows;
    const int64_t ldm = (n + kWide - 1) / kWide * kWide;
    scratch.Reserve(r * ldm * 8 + r * r * 4 + 4096);
    float* rows = scratch.Take<float>(r * ldm);  // r rows of n, filled up with zeros
    float* sums = scratch.Take<float>(r * ldm);
    float* gram = scratch.Take<float>(r * r);
    for (int64_t i = 0; i < r; ++i) {
      if (one.by_row)
        std::memcpy(rows + i * ldm, one.matrix + i * n, n * 4);
      else
        for (int64_t c = 0; c < n; ++c) rows[i * ldm + c] = one.matrix[c * r + i];
      std::memset(rows + i * ldm + n, 0, (ldm - n) * 4);
    }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Vec total[4] = {};
        for (int64_t c = 0; c < ldm; c += kWide)
          for (int64_t v = 0; v < 4; ++v)
            total[v] = Fma(Load(rows + i * ldm + c + v * kWidth), Load(rows + j * ldm + c + v * kWidth), total[v]);
        gram[i * r + j] = gram[j * r + i] =
            factor * (Sum(total[0] + total[1] + total[2] + total[3]) - (i == j ? 1.f : 0.f));
      }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t c = 0; c < ldm; c += kWide) {
        Vec total[4] = {};
        for (int64_t j = 0; j < r; ++j)
          for (int64_t v = 0; v < 4; ++v)
            total[v] = Fma(Set(gram[i * r + j]), Load(rows + j * ldm + c + v * kWidth), total[v]);
        for (int64_t v = 0; v < 4; ++v) Store(sums + i * ldm + c + v * kWidth, total[v]);
      }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t c = 0; c < n; ++c) one.gradient[one.by_row ? i * n + c : c * r + i] += sums[i * ldm + c];
  }
}

// out (rows, width) = [residual +] x where a hash of seed, row and column is at least `limit`, else 0; out may be x or
// residual. A hash of 32 bits serves two columns.
EXPORT(masked)
(const uint16_t* x, const uint16_t* residual, int64_t rows, int64_t width, uint32_t seed, int limit, uint16_t* out,
 int threads) {
  Bits lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i * kGolden;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > 65536)
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t key = Mix((static_cast<uint32_t>(r) * kGolden) ^ seed);
    for (int64_t i = 0; i < width; i += 2 * kWidth) {
      const int64_t at = r * width + i, left = width - i;
      const Words hash = (Words)Mix((lanes + static_cast<uint32_t>(i / 2) * kGolden) ^ key);
      Words v = LoadWords(x + at, left) & (Words)(hash >= static_cast<uint16_t>(limit));
      if (residual) v = AddBFloat16(v, LoadWords(residual + at, left));
      StoreWords(out + at, v, left);
    }
  }
}

// logits (rows, width) -> loss (rows) = logsumexp - logit of the label; when `factor` is not zero, the logits are
// replaced by their gradient, factor (softmax - one at the label).
EXPORT(cross_entropy)
(uint16_t* logits, const int64_t* labels, int64_t rows, int64_t width, float* loss, float factor, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* row = logits + r * width;
    Vec top = Set(-INFINITY);
    for (int64_t i = 0; i + kWidth <= width; i += kWidth) {
      const Vec v = LoadBFloat16(row + i);
      top = (v > top) | (v != v) ? v : top;  // NaN stays, and the loss becomes NaN
    }
    float largest = Largest(top);
    for (int64_t i = width / kWidth * kWidth; i < width; ++i) {
      const float v = FromBFloat16(row[i]);
      largest = v > largest || v != v ? v : largest;
    }
    Vec total = Vec{};
    float rest = 0.f;
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) total += Exp(LoadBFloat16(row + i) - Set(largest));
    for (; i < width; ++i) rest += Exp(Set(FromBFloat16(row[i]) - largest))[0];
    const float sum = Sum(total) + rest;
    loss[r] = largest + std::log(sum) - FromBFloat16(row[labels[r]]);
    if (factor == 0.f) continue;
    const float at_label = factor * (Exp(Set(FromBFloat16(row[labels[r]]) - largest))[0] / sum - 1.f);
    const float share = factor / sum;
    const Vec inverse = Set(share);
    for (i = 0; i + kWidth <= width; i += kWidth)
      StoreBFloat16(row + i, Exp(LoadBFloat16(row + i) - Set(largest)) * inverse);
    for (; i < width; ++i) row[i] = ToBFloat16(Exp(Set(FromBFloat16(row[i]) - largest))[0] * share);
    row[labels[r]] = ToBFloat16(at_label);
  }
}
