// Matrix products of a frozen weight, bf16 or NF4, and its low-rank terms, summed in fp32 and rounded once; and the
// gradient of the low-rank factors. Contract and formulas: veneer/ops/__init__.py.
//
// A weight is brought panel by panel into the layout the dot product wants: pairs of bf16 along the depth, kPanel
// columns side by side. An NF4 weight is decoded on the way there, so a dense copy never exists.

#include "few_rows.h"

namespace {

constexpr int64_t kMaxDepth = kWiden ? kWideDepth : 4096;  // of what is packed at once: 512 KiB, half of a usual cache
constexpr int64_t kTaskRows = kWiden ? 512 : 1024;         // rows that share one packing of a panel
constexpr int64_t kTaskPanels = 4;                         // that share one widening of A

// Columns [column, column + live) of depth [from, to) of a term's weight, packed; `rows`: room for 64 decoded rows.
void Pack(const Term& t, int64_t column, int64_t live, int64_t from, int64_t to, uint16_t* rows, uint32_t* b,
          Place place = kSideBySide) {
  const int64_t depth = to - from;
  if (t.kind == kByRow) {
    PackByRow(t.weight + column * t.ldw + from, t.ldw, live, depth, b, place);
  } else if (t.kind == kByColumn) {
    for (int64_t d = 0; d < depth; d += 2) {
      const uint16_t* low = t.weight + (from + d) * t.ldw + column;
      PackPair(low, low + t.ldw, live, b + d / 2 * place.ld, place);
    }
  } else if (t.kind == kNf4ByRow) {
    for (int64_t i = 0; i < live; i += 16) {  // 16 rows at a time stay in the first-level cache
      const int64_t count = live - i < 16 ? live - i : 16;
      for (int64_t r = 0; r < count; ++r)
        Decode<kBFloat16>(*t.nf4, (column + i + r) * t.ldw + from, depth, rows + r * depth);
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(rows);
      TurnAll(pairs, depth / 2, count, depth / 2, b + i / 16 * place.across, place.ld);
    }
    for (int64_t d = 0; d < depth / 2; ++d)
      for (int64_t i = live; i < kPanel; ++i) b[d * place.ld + i / 16 * place.across + i % 16] = 0;
  } else {
    for (int64_t d = 0; d < depth; d += 2) {
      Decode<kBFloat16>(*t.nf4, (from + d) * t.ldw + column, live, rows);
      Decode<kBFloat16>(*t.nf4, (from + d + 1) * t.ldw + column, live, rows + kPanel);
      PackPair(rows, rows + kPanel, live, b + d / 2 * place.ld, place);
    }
  }
}

// Some panels of columns, one where B stays in pairs, for rows [from, to).
void Panels(const Terms& sum, int64_t column, int64_t live, int64_t from, int64_t to, const Output& out) {
  const int64_t deepest = sum.depth < kMaxDepth ? sum.depth : kMaxDepth, deep = sum.depth > kMaxDepth;
  const int64_t columns = (live + kPanel - 1) / kPanel * kPanel,
                decoded_depth = deepest < 2 * kPanel ? 2 * kPanel : deepest;
  scratch.Reserve(deepest / 2 * kPanel * 4 + 16 * decoded_depth * 2 + (kWiden ? columns * deepest * 4 : 0) +
                  deep * (to - from) * columns * 4 + 4096);
  uint32_t* b = scratch.Take<uint32_t>(deepest / 2 * kPanel);
  uint16_t* rows = scratch.Take<uint16_t>(16 * decoded_depth);
  uint32_t* wide = scratch.Take<uint32_t>(kWiden ? columns * deepest : 0);
  float* part = scratch.Take<float>(deep * (to - from) * columns);
  int term = 0;
  int64_t at = 0;  // where in the term
  for (bool first = true, last = false; !last; first = false) {
    struct {
      int term;
      int64_t from, to;
    } pieces[kMaxTerms];
    Slice slices[kMaxTerms];
    int count = 0;
    int64_t depth = 0;
    while (term < sum.count && depth < kMaxDepth) {
      const Term& t = sum.terms[term];
      const int64_t end = t.depth - at < kMaxDepth - depth ? t.depth : at + kMaxDepth - depth;
      pieces[count] = {term, at, end};
      slices[count++] = {reinterpret_cast<const uint32_t*>(t.a + at), t.lda / 2, (end - at) / 2};
      depth += end - at;
      at = end;
      if (at == t.depth) ++term, at = 0;
    }
    last = term == sum.count;
    for (int64_t j = 0; j < live; j += kPanel) {
      const int64_t here = live - j < kPanel ? live - j : kPanel;
      uint32_t* to_here = b;
      for (int s = 0; s < count; ++s) {
        Pack(sum.terms[pieces[s].term], column + j, here, pieces[s].from, pieces[s].to, rows, to_here);
        to_here += (pieces[s].to - pieces[s].from) / 2 * kPanel;
      }
      if constexpr (kWiden) WidenRight(b, kPanel, depth / 2, here, wide + j * depth);
    }
    const uint32_t* packed = kWiden ? wide : b;
    if (first && last)
      Down<true>(slices, count, from, to, packed, kPanel, live, part, columns, out);
    else if (first)
      Down<true>(slices, count, from, to, packed, kPanel, live, part, columns, Keep{});
    else if (last)
      Down<false>(slices, count, from, to, packed, kPanel, live, part, columns, out);
    else
      Down<false>(slices, count, from, to, packed, kPanel, live, part, columns, Keep{});
  }
}

#if defined(__AMX_BF16__)
// ---- many rows, on the matrix unit: the weight is packed once by all threads together, some panels at a time --------

constexpr int64_t kPanels = 1152 << 10;   // bytes of packed panels that stay in a second-level cache, most of it
constexpr int64_t kRowTask = 64;          // rows of one task
constexpr int64_t kOwnPacking = 1 << 20;  // bytes of A up to which each thread packs what it multiplies itself
constexpr int64_t kDeepest = 1600, kDeep = 1024;  // pairs: a greater depth is cut into stretches of about kDeep

// What is left of a term's depth beyond whole tiles, copied and filled up with zeros: (m, 32) a term.
void CopyTails(const Terms& sum, int64_t m, uint16_t* tails, int threads) {
  for (int s = 0; s < sum.count; ++s) {
    const Term& t = sum.terms[s];
    const int64_t whole = t.depth / (2 * kTile) * 2 * kTile, rest = t.depth - whole;
    if (rest == 0) continue;
#pragma omp parallel for schedule(static) num_threads(threads) if (m > 4096)
    for (int64_t i = 0; i < m; ++i) {
      std::memcpy(tails + i * 2 * kTile, t.a + i * t.lda + whole, rest * 2);
      std::memset(tails + i * 2 * kTile + rest, 0, (2 * kTile - rest) * 2);
    }
    tails += m * 2 * kTile;
  }
}

struct Cut {  // a stretch of the padded depth of all terms
  Slice slices[2 * kMaxTerms];
  int count;
  int64_t from, to;  // in pairs
};

// The slices of A between cut.from and cut.to.
void FillCut(const Terms& sum, int64_t m, const uint16_t* tails, Cut& cut) {
  int64_t at = 0;
  cut.count = 0;
  const auto add = [&](const uint32_t* a, int64_t lda, int64_t depth) {
    const int64_t from = cut.from > at ? cut.from - at : 0, to = cut.to - at < depth ? cut.to - at : depth;
    if (from < to) cut.slices[cut.count++] = {a + from, lda, to - from};
    at += depth;
  };
  for (int s = 0; s < sum.count; ++s) {
    const Term& t = sum.terms[s];
    const int64_t whole = t.depth / (2 * kTile) * kTile;
    add(reinterpret_cast<const uint32_t*>(t.a), t.lda / 2, whole);
    if (2 * whole == t.depth) continue;
    add(reinterpret_cast<const uint32_t*>(tails), kTile, kTile);
    tails += m * 2 * kTile;
  }
}

// What of a panel of 64 columns is in a cut, as tiles: 16 by 16 columns, each (cut's pairs, 16).
void PackCut(const Terms& sum, const Cut& cut, int64_t column, int64_t live, uint16_t* rows, uint32_t* b) {
  const Place place{kTile, (cut.to - cut.from) * kTile};
  int64_t at = 0;
  for (int s = 0; s < sum.count; ++s) {
    const Term& t = sum.terms[s];
    const int64_t padded = (t.depth / 2 + kTile - 1) / kTile * kTile;
    const int64_t from = cut.from > at ? cut.from - at : 0, to = cut.to - at < padded ? cut.to - at : padded;
    if (from < to) {
      const int64_t end = to < t.depth / 2 ? to : t.depth / 2;
      Pack(t, column, live, 2 * from, 2 * end, rows, b, place);
      for (int64_t i = 0; i < kPanel; i += kTile)
        std::memset(b + i / kTile * place.across + (end - from) * kTile, 0, (to - end) * kTile * 4);
      b += (to - from) * kTile;
    }
    at += padded;
  }
}

// Finished sums of 16 R rows and 32 columns.
template <int R>
inline void TileOut(int64_t row, const float* sum, int64_t ldsum, const Output& out) {
  for (int64_t r = 0; r < R * kTile; ++r, sum += ldsum) {
    if (out.live < 2 * kTile) {
      out.Some(row + r, 2 * kTile, sum);
      continue;
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < 2 * kTile; j += kWidth) out.Put(row + r, j, Load(sum + j));
  }
}

// 16 R rows of A times some columns of B, for one cut. The places of 32 sums are fetched while they are made, a few a
// step: 10 to 25% faster on 2048 rows, while all at once is slower than not at all.
// sums: where unfinished ones wait, a row every ldsum.
template <int R>
void Strip(const Cut& cut, int64_t row, const uint32_t* b, int64_t columns, float* sums, int64_t ldsum, bool last,
           const Output& out) {
  alignas(64) float own[R * kTile * 2 * kTile];
  const int64_t pairs = cut.to - cut.from, steps = pairs / kTile, across = pairs * kTile;
  for (int64_t j = 0; j < columns; j += 2 * kTile, b += across) {
    const Output here = out.At(j);
    float* sum = sums ? sums + j : own;
    const int64_t stride = sums ? ldsum : 2 * kTile;
    int64_t fetched = row, due = 0;
    asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
    if (cut.from > 0) {
      _tile_loadd(0, sum, stride * 4);
      _tile_loadd(1, sum + kTile, stride * 4);
      if constexpr (R > 1) _tile_loadd(2, sum + kTile * stride, stride * 4);
      if constexpr (R > 1) _tile_loadd(3, sum + kTile * stride + kTile, stride * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (R > 1) _tile_zero(2);
      if constexpr (R > 1) _tile_zero(3);
    }
    for (int s = 0; s < cut.count; ++s) {
      const int64_t lda = cut.slices[s].lda;
      const uint32_t* a = cut.slices[s].a + row * lda;
      for (int64_t k = 0; k < cut.slices[s].depth; k += kTile, b += kTile * kTile) {
        for (due += R * kTile; last && due >= steps; due -= steps, ++fetched) {
          __builtin_prefetch(here.y + fetched * here.ldy, 1);
          if (here.residual) __builtin_prefetch(here.residual + fetched * here.ldr);
          if (here.residual_rest) __builtin_prefetch(here.residual_rest + fetched * here.ldr);
          if (here.rest) __builtin_prefetch(here.rest + fetched * here.ldy, 1);
        }
        _tile_loadd(6, b, kTile * 4);
        _tile_loadd(4, a + k, lda * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + across, kTile * 4);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R > 1) {
          _tile_loadd(5, a + kTile * lda + k, lda * 4);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sum, stride * 4);
    _tile_stored(1, sum + kTile, stride * 4);
    if constexpr (R > 1) _tile_stored(2, sum + kTile * stride, stride * 4);
    if constexpr (R > 1) _tile_stored(3, sum + kTile * stride + kTile, stride * 4);
    asm volatile("" ::: "memory");
    if (last) TileOut<R>(row, sum, stride, here);
  }
}

// Rows [from, to) of the m >= 16. The last ones are done with some before them once more, so that tiles are always
// full.
void StripsOf(const Cut& cut, int64_t m, int64_t from, int64_t to, const uint32_t* b, int64_t columns, float* sums,
              int64_t ldsum, bool last, const Output& out) {
  for (int64_t row = from, tall; row < to; row += tall) {
    tall = to - row > kTile && m >= 2 * kTile ? 2 * kTile : kTile;
    const int64_t at = row + tall <= m ? row : m - tall;
    float* waiting = sums ? sums + row * ldsum : nullptr;
    if (tall > kTile)
      Strip<2>(cut, at, b, columns, waiting, ldsum, last, out);
    else
      Strip<1>(cut, at, b, columns, waiting, ldsum, last, out);
  }
}

// m >= 16.
void ManyRows(const Terms& sum, int64_t m, int64_t n, const Output& out, int threads) {
  int64_t with_tail = 0, pairs = 0;  // of the padded depth
  for (int s = 0; s < sum.count; ++s) {
    with_tail += sum.terms[s].depth % (2 * kTile) != 0;
    pairs += (sum.terms[s].depth + 2 * kTile - 1) / (2 * kTile) * kTile;
  }
  const int64_t panels = (n + kPanel - 1) / kPanel, cuts = pairs <= kDeepest ? 1 : (pairs + kDeep - 1) / kDeep;
  const int64_t most = ((pairs + cuts - 1) / cuts + kTile - 1) / kTile * kTile, size = most * kPanel;
  int64_t group = kPanels / (size * 4);  // panels that rows are taken through together
  group = group < 1 ? 1 : group > panels ? panels : group;
  int64_t together =
      cuts > 1 ? group : group * ((threads * (int64_t{1} << 20)) / (group * size * 4) + 1);  // packed at once
  together = together > panels ? panels : together;
  const int64_t ldsum = cuts > 1 ? group * kPanel : 0;
  scratch.Reserve(together * size * 4 + with_tail * m * 4 * kTile + (m + kTile) * ldsum * 4 + 4096);
  uint32_t* packed = scratch.Take<uint32_t>(together * size);
  uint16_t* tails = scratch.Take<uint16_t>(with_tail * m * 2 * kTile);
  float* sums = ldsum ? scratch.Take<float>((m + kTile) * ldsum) : nullptr;
  CopyTails(sum, m, tails, threads);
  if (cuts == 1 && m * pairs * 4 <= kOwnPacking && panels >= 4 * threads) {
#pragma omp parallel num_threads(threads)
    {
      Tiles tiles;
      Cut cut;
      cut.from = 0, cut.to = pairs;
      FillCut(sum, m, tails, cut);
      const int64_t decoded_depth = most < kPanel ? 2 * kPanel : 2 * most;
      decoded.Reserve(size * 4 + kTile * decoded_depth * 2 + 4096);
      uint32_t* b = decoded.Take<uint32_t>(size);
      uint16_t* rows = decoded.Take<uint16_t>(kTile * decoded_depth);
#pragma omp for schedule(dynamic, 1)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanel, live = n - column < kPanel ? n - column : kPanel;
        PackCut(sum, cut, column, live, rows, b);
        StripsOf(cut, m, 0, m, b, live, nullptr, 0, true, out.At(column));
      }
    }
    return;
  }
  const int64_t row_tasks = (m + kRowTask - 1) / kRowTask;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    const int64_t decoded_depth = most < kPanel ? 2 * kPanel : 2 * most;
    decoded.Reserve(kTile * decoded_depth * 2 + 4096);
    uint16_t* rows = decoded.Take<uint16_t>(kTile * decoded_depth);
    for (int64_t first = 0; first < panels; first += together)
      for (int64_t from = 0; from < pairs; from += most) {
        const int64_t here = panels - first < together ? panels - first : together;
        Cut cut;
        cut.from = from, cut.to = from + most < pairs ? from + most : pairs;
        const int64_t panel_size = (cut.to - cut.from) * kPanel;
        FillCut(sum, m, tails, cut);
#pragma omp for schedule(dynamic, 1)
        for (int64_t panel = 0; panel < here; ++panel) {
          const int64_t column = (first + panel) * kPanel, live = n - column < kPanel ? n - column : kPanel;
          PackCut(sum, cut, column, live, rows, packed + panel * panel_size);
        }
        const int64_t groups = (here + group - 1) / group;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * row_tasks; ++task) {
          const int64_t panel = task / row_tasks * group, some = here - panel < group ? here - panel : group;
          const int64_t start = task % row_tasks * kRowTask, end = start + kRowTask < m ? start + kRowTask : m;
          const Output place = out.At((first + panel) * kPanel);
          const int64_t columns = some * kPanel < place.live ? some * kPanel : place.live;
          const uint32_t* b = packed + panel * panel_size;
          StripsOf(cut, m, start, end, b, columns, sums, ldsum, cut.to == pairs, place);
        }
      }
  }
}
#endif

}  // namespace

// y (m, n) bf16 = sum of the terms [+ bias (n)] [+ residual (m, n) [+ its rest]]. Depths and lda are even.
EXPORT(product)
(const Term* terms, int count, int64_t m, int64_t n, const uint16_t* bias, const uint16_t* residual,
 const uint16_t* residual_rest, int64_t ldr, uint16_t* y, uint16_t* rest, int64_t ldy, int threads) {
  if (m == 0 || n == 0) return;
  const Output out{y, ldy, bias, residual, ldr, n, residual_rest, rest};
  Terms sum{terms, count, 0};
  for (int i = 0; i < count; ++i) sum.depth += terms[i].depth;
  bool few = m < kFewRows && terms[0].kind == kNf4ByRow;
  for (int i = 1; i < count; ++i) few = few && terms[i].kind == kByRow;
#if defined(__AMX_BF16__)
  bool more = m > 1 && m <= kMoreRows && n >= kTall && terms[0].kind == kNf4ByRow && terms[0].depth % kNf4Block == 0;
  for (int i = 1; i < count; ++i) more = more && terms[i].kind == kByRow;
  if (more) return MoreRows(sum, m, n, out, threads);
#endif
  if (few) return FewRows(sum, m, n, out, threads);
#if defined(__AMX_BF16__)
  if (m >= kTile) return ManyRows(sum, m, n, out, threads);
#endif
  const int64_t panels = (n + kPanel - 1) / kPanel;
  // Of the panels and the rows: as large as they may be, but so that no thread waits long for the others.
  int64_t each = kWiden ? kTaskPanels : 1, parts = (m + kTaskRows - 1) / kTaskRows;
  const auto tasks = [&] { return (panels + each - 1) / each * parts; };
  const auto balanced = [&] { return 10 * tasks() >= 9 * ((tasks() + threads - 1) / threads * threads); };
  while (!balanced()) {
    if (each > 1)
      --each;
    else if (m / (parts + 1) >= 64)
      ++parts, each = kWiden ? kTaskPanels : 1;
    else
      break;
  }
  const int64_t rows = ((m + parts - 1) / parts + kRows - 1) / kRows * kRows;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks() > 1)
  for (int64_t task = 0; task < tasks(); ++task) {
    const int64_t column = task / parts * each * kPanel, from = task % parts * rows;
    const int64_t to = from + rows < m ? from + rows : m;
    const int64_t live = n - column < each * kPanel ? n - column : each * kPanel;
    Output place = out.At(column);
    place.live = live;
    if (from < to) Panels(sum, column, live, from, to, place);
  }
}

// out (r, n) fp32, element (i, j) at i * row + j * col = sum over tokens of left (tokens, r) and right (tokens, n),
// bf16.
EXPORT(outer_sum)
(const uint16_t* left, int64_t ldl, int64_t r, const uint16_t* right, int64_t ldright, int64_t n, int64_t tokens,
 float* out, int64_t row, int64_t col, int threads) {
#if defined(__AMX_BF16__)
  constexpr int64_t kPiece = 4096;  // tokens whose packed columns stay in the second-level cache
#else
  constexpr int64_t kPiece = 256;  // in the first-level cache
#endif
  const int64_t ranks = (r + 15) / 16 * 16, pairs = (tokens + 31) / 32 * 16;
  const int64_t piece = kPiece / 2 < pairs ? kPiece / 2 : pairs;
  uint32_t* turned = static_cast<uint32_t*>(std::aligned_alloc(64, ranks * pairs * 4));
  if (turned == nullptr) std::abort();
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    const uint16_t none[kPanel] = {};
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pairs; p += 16)
      for (int64_t i = 0; i < ranks; i += kPanel) {
        const int64_t live = r - i < kPanel ? r - i : kPanel;
        uint32_t rows[16 * kPanel];
        for (int64_t k = 0; k < 16; ++k) {
          const uint16_t* low = left + 2 * (p + k) * ldl + i;
          PackPair(2 * (p + k) < tokens ? low : none, 2 * (p + k) + 1 < tokens ? low + ldl : none, live,
                   rows + k * kPanel);
        }
        for (int64_t k = 0; k < live; k += 16) Turn(rows + k, kPanel, turned + (i + k) * pairs + p, pairs);
      }
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPanel, live = n - column < kPanel ? n - column : kPanel;
      scratch.Reserve(piece * kPanel * 4 + ranks * kPanel * 4 + 4096);
      uint32_t* b = scratch.Take<uint32_t>(piece * kPanel);
      float* part = scratch.Take<float>(ranks * kPanel);
      std::memset(part, 0, ranks * kPanel * 4);
      for (int64_t from = 0; from < pairs; from += piece) {
        const int64_t to = from + piece < pairs ? from + piece : pairs;
        for (int64_t p = from; p < to; ++p) {
          const uint16_t* low = right + 2 * p * ldright + column;
          PackPair(2 * p < tokens ? low : none, 2 * p + 1 < tokens ? low + ldright : none, live,
                   b + (p - from) * kPanel);
        }
        const Slice slice{turned + from, pairs, to - from};
#if defined(__AMX_BF16__)
        for (int64_t i = 0; i < ranks; i += kTile)
          for (int64_t j = 0; j < kPanel; j += 2 * kTile)
            TileProduct<1, 2>(&slice, 1, i, b + j, kPanel, part + i * kPanel + j, kPanel, from > 0);
#else
        DownPairs<false>(&slice, 1, r, b, kPanel, live, part, kPanel);
#endif
      }
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < live; ++j) out[i * row + (column + j) * col] = part[i * kPanel + j];
    }
  }
  std::free(turned);
}
