// Updates made sparse and added, or added where their signs agree: one pass over all of them (ops/reference.py has it
// in torch).
#include "simd.h"

namespace {

constexpr int kMost = 64;          // updates at once
constexpr int64_t kAcross = 1024;  // columns of a row at a time

struct Part {
  const float* values;  // (rows, width)
  float weight, limit;  // limit: the smallest magnitude that stays
  uint32_t seed;        // of the mask
};

inline Vec Abs(Vec v) { return Max(v, -v); }

// kWidth values from p, zero behind `left`.
inline Vec LoadSome(const float* p, int64_t left) {
  if (left >= kWidth) return Load(p);
  float some[kWidth] = {};
  std::memcpy(some, p, left * 4);
  return Load(some);
}

// What `reference.kept` compares, of columns [from, from + count) of a row; from is even.
inline void HashRow(uint32_t key, int64_t from, int64_t count, uint16_t* words) {
  Bits lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i * kGolden;
  for (int64_t c = 0; c < count; c += 2 * kWidth) {
    const Bits hash = Mix((lanes + static_cast<uint32_t>((from + c) / 2) * kGolden) ^ key);
    std::memcpy(words + c, &hash, sizeof hash);
  }
}

}  // namespace

// out (rows, width) = sum of weight * pruned, or with `elect` (1: by the larger sum, 2: by the larger number) the mean
// of |weight| * pruned over the parts that have the elected sign, a part of negative weight turned round first. pruned:
// where |v| >= limit; and with drop > 0 where the hash is at least `drop`, times `scale`.
EXPORT(sparse_sum)
(const Part* parts, int count, int64_t rows, int64_t width, int drop, float scale, int elect, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width > 65536)
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t words[kAcross + 2 * kWidth];
    Vec values[kMost];
    float* sums = out + r * width;
    for (int64_t from = 0; from < width; from += kAcross) {
      const int64_t across = width - from < kAcross ? width - from : kAcross;
      if (elect == 0) {  // part by part: a mask is needed once
        for (int k = 0; k < count; ++k) {
          const Part& part = parts[k];
          const float* row = part.values + r * width + from;
          if (drop) HashRow(Mix((static_cast<uint32_t>(r) * kGolden) ^ part.seed), from, across, words);
          for (int64_t c = 0; c < across; c += kWidth) {
            const int64_t left = across - c;
            Vec v = LoadSome(row + c, left);
            v = Abs(v) >= Set(part.limit) ? v : Vec{};
            if (drop) {
              const Ints hash = __builtin_convertvector(LoadAs<Halves>(words + c), Ints);
              v = hash >= drop ? v * Set(scale) : Vec{};
            }
            v = v * Set(part.weight);
            if (k) v = LoadSome(sums + from + c, left) + v;
            std::memcpy(sums + from + c, &v, (left < kWidth ? left : kWidth) * 4);
          }
        }
        continue;
      }
      scratch.Reserve(static_cast<size_t>(count) * (kAcross + 2 * kWidth) * 2 + 4096);
      uint16_t* masks = scratch.Take<uint16_t>(static_cast<size_t>(count) * (kAcross + 2 * kWidth));
      for (int k = 0; drop && k < count; ++k)
        HashRow(Mix((static_cast<uint32_t>(r) * kGolden) ^ parts[k].seed), from, across,
                masks + k * (kAcross + 2 * kWidth));
      for (int64_t c = 0; c < across; c += kWidth) {
        const int64_t left = across - c;
        Vec votes = Vec{};
        for (int k = 0; k < count; ++k) {
          const Part& part = parts[k];
          Vec v = LoadSome(part.values + r * width + from + c, left);
          v = Abs(v) >= Set(part.limit) ? v : Vec{};
          if (drop) {
            const Ints hash = __builtin_convertvector(LoadAs<Halves>(masks + k * (kAcross + 2 * kWidth) + c), Ints);
            v = hash >= drop ? v * Set(scale) : Vec{};
          }
          if (part.weight < 0.f) v = -v;
          values[k] = v;
          const Vec sign = v > Vec{} ? Set(1.f) : v < Vec{} ? Set(-1.f) : Vec{};
          votes += elect == 1 ? v : sign;
        }
        const Ints positive = votes >= Vec{};
        Vec total = Vec{}, agreeing = Vec{};
        for (int k = 0; k < count; ++k) {
          const Vec v = values[k];
          const Ints agrees = (positive & (v > Vec{})) | (~positive & (v < Vec{}));
          const float weight = parts[k].weight < 0.f ? -parts[k].weight : parts[k].weight;
          total += agrees ? v * Set(weight) : Vec{};
          agreeing += agrees ? Set(1.f) : Vec{};
        }
        total = total / Max(agreeing, Set(1.f));
        std::memcpy(sums + from + c, &total, (left < kWidth ? left : kWidth) * 4);
      }
    }
  }
}

namespace {

inline Vec LoadWeight(const float* p) { return Load(p); }
inline Vec LoadWeight(const uint16_t* p) { return LoadBFloat16(p); }
inline void StoreWeight(float* p, Vec v) { Store(p, v); }
inline void StoreWeight(uint16_t* p, Vec v) {
  const Halves half = __builtin_convertvector(ExactBFloat16(v), Halves);
  std::memcpy(p, &half, sizeof half);
}

// kRows rows of out = weight + left right, columns [c, c + kWidth); tails through a buffer.
template <int kRows, class T>
inline void AddRows(const T* weight, const float* left, const float* right, int64_t columns, int64_t rank, T* out) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t here = columns - c < kWidth ? columns - c : kWidth;
    Vec sums[kRows];
    T some[kWidth] = {};
    for (int i = 0; i < kRows; ++i) {
      const T* from = weight + i * columns + c;
      if (here < kWidth) std::memcpy(some, from, here * sizeof(T));
      sums[i] = LoadWeight(here < kWidth ? some : from);
    }
    Vec update[kRows] = {};  // summed by itself: beside the weight its small terms would be rounded away
    for (int64_t k = 0; k < rank; ++k) {
      const Vec v = LoadSome(right + k * columns + c, here);
      for (int i = 0; i < kRows; ++i) update[i] = Fma(Set(left[i * rank + k]), v, update[i]);
    }
    for (int i = 0; i < kRows; ++i) {
      const Vec v = sums[i] + update[i];
      T* to = out + i * columns + c;
      if (here < kWidth) {
        StoreWeight(some, v);
        std::memcpy(to, some, here * sizeof(T));
      } else {
        StoreWeight(to, v);
      }
    }
  }
}

template <class T>
inline void AddUpdate(const T* weight, int64_t rows, int64_t columns, const float* left, const float* right,
                      int64_t rank, T* out, int threads) {
  constexpr int kRows = 8;
  const int64_t blocks = (rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * columns > 65536)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r = b * kRows;
    if (r + kRows <= rows) {
      AddRows<kRows>(weight + r * columns, left + r * rank, right, columns, rank, out + r * columns);
    } else {
      for (int64_t i = r; i < rows; ++i)
        AddRows<1>(weight + i * columns, left + i * rank, right, columns, rank, out + i * columns);
    }
  }
}

}  // namespace

// out (rows, columns) = weight + left right in fp32, rounded once to bf16 (`half`) or not at all; left (rows, rank),
// right (rank, columns). out may be weight.
EXPORT(add_update)
(const void* weight, int half, int64_t rows, int64_t columns, const float* left, const float* right, int64_t rank,
 void* out, int threads) {
  if (half)
    AddUpdate(static_cast<const uint16_t*>(weight), rows, columns, left, right, rank, static_cast<uint16_t*>(out),
              threads);
  else
    AddUpdate(static_cast<const float*>(weight), rows, columns, left, right, rank, static_cast<float*>(out), threads);
}
