// Matrix products of a frozen weight, bf16 or quantised, and its low-rank terms, summed in fp32 and rounded once; and
// the gradient of the low-rank factors. Contract and formulas: veneer/ops/__init__.py.
//
// A weight is brought panel by panel into the layout the dot product wants: pairs of bf16 along the depth, kPanel
// columns side by side. A quantised weight is decoded on the way there, so a dense copy never exists.

#include <cmath>

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
  } else if (t.kind == kQuantizedByRow) {
    for (int64_t i = 0; i < live; i += 16) {  // 16 rows at a time stay in the first-level cache
      const int64_t count = live - i < 16 ? live - i : 16;
      for (int64_t r = 0; r < count; ++r) t.DecodeRow(column + i + r, from, depth, rows + r * depth);
      const uint32_t* pairs = reinterpret_cast<const uint32_t*>(rows);
      TurnAll(pairs, depth / 2, count, depth / 2, b + i / 16 * place.across, place.ld);
    }
    for (int64_t d = 0; d < depth / 2; ++d)
      for (int64_t i = live; i < kPanel; ++i) b[d * place.ld + i / 16 * place.across + i % 16] = 0;
  } else {
    for (int64_t d = 0; d < depth; d += 2) {
      const uint16_t* low = t.Row(from + d, column, live, rows);
      const uint16_t* high = t.Row(from + d + 1, column, live, rows + kPanel);
      uint32_t* to_pair = b + d / 2 * place.ld;
      if (t.row_scale)
        PackPair(low, high, live, to_pair, place, Scaled{t.row_scale[from + d], t.row_scale[from + d + 1]});
      else
        PackPair(low, high, live, to_pair, place);
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
constexpr int64_t kShallow = 320;  // pairs: of 32 rows of A so much stays in a first-level cache of 48 KiB
constexpr int kMaxPieces = kDeepest / kShallow;

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

struct Piece {  // of the padded depth of all terms
  Slice slices[2 * kMaxTerms];
  int count;
  int64_t from, to;  // in pairs
};

// The slices of A between piece.from and piece.to.
void FillPiece(const Terms& sum, int64_t m, const uint16_t* tails, Piece& piece) {
  int64_t at = 0;
  piece.count = 0;
  const auto add = [&](const uint32_t* a, int64_t lda, int64_t depth) {
    const int64_t from = piece.from > at ? piece.from - at : 0, to = piece.to - at < depth ? piece.to - at : depth;
    if (from < to) piece.slices[piece.count++] = {a + from, lda, to - from};
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

// A stretch of the depth: packed at once, multiplied piece by piece, of which some rows of A stay in the first-level
// cache, or in one piece where they cannot.
struct Stretch {
  Piece pieces[kMaxPieces];
  int count;
  int64_t from, to;
  bool stays;

  Stretch(const Terms& sum, int64_t m, const uint16_t* tails, int64_t first, int64_t end)
      : from(first), to(end), stays(true) {
    for (int s = 0; s < sum.count; ++s) stays = stays && sum.terms[s].lda % kCollide != 0;
    count = stays ? static_cast<int>((to - from + kShallow - 1) / kShallow) : 1;
    const int64_t each = ((to - from + count - 1) / count + kTile - 1) / kTile * kTile;
    for (int i = 0; i < count; ++i) {
      pieces[i].from = from + i * each < to ? from + i * each : to;
      pieces[i].to = pieces[i].from + each < to ? pieces[i].from + each : to;
      FillPiece(sum, m, tails, pieces[i]);
    }
    while (pieces[count - 1].from == to) --count;
  }
};

// What of a panel of 64 columns is in a stretch, as tiles: 16 by 16 columns, each (its pairs, 16).
void PackStretch(const Terms& sum, const Stretch& all, int64_t column, int64_t live, uint16_t* rows, uint32_t* b) {
  const Place place{kTile, (all.to - all.from) * kTile};
  int64_t at = 0;
  for (int s = 0; s < sum.count; ++s) {
    const Term& t = sum.terms[s];
    const int64_t padded = (t.depth / 2 + kTile - 1) / kTile * kTile;
    const int64_t from = all.from > at ? all.from - at : 0, to = all.to - at < padded ? all.to - at : padded;
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

// 16 R rows of A times some columns of B, for one piece of the depth. kStays: these rows stay in the first-level cache
// if B, which passes by once, does not drive them out of it: 20% faster on 2048 rows. The places of 32 sums are fetched
// while they are made, a few a step: 10 to 25% faster there, while all at once is slower than not at all; fetching the
// next rows of A is slower too.
// b: the piece's first tile, the tiles of the next columns `across` further on. sums: where unfinished ones wait, a row
// every ldsum, if they do.
template <int R, bool kStays>
void Strip(const Piece& piece, int64_t row, const uint32_t* b, int64_t across, int64_t columns, float* sums,
           int64_t ldsum, bool last, const Output& out) {
  alignas(64) float own[R * kTile * 2 * kTile];
  const int64_t steps = (piece.to - piece.from) / kTile;
  for (int64_t j = 0; j < columns; j += 2 * kTile, b += 2 * across) {
    const Output here = out.At(j);
    const uint32_t* right = b;
    float* sum = sums ? sums + j : own;
    const int64_t stride = sums ? ldsum : 2 * kTile;
    int64_t fetched = row, due = 0;
    asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
    if (piece.from > 0) {
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
    for (int s = 0; s < piece.count; ++s) {
      const int64_t lda = piece.slices[s].lda;
      const uint32_t* a = piece.slices[s].a + row * lda;
      for (int64_t k = 0; k < piece.slices[s].depth; k += kTile, right += kTile * kTile) {
        for (due += R * kTile; last && due >= steps; due -= steps, ++fetched) {
          __builtin_prefetch(here.y + fetched * here.ldy, 1);
          if (here.residual) __builtin_prefetch(here.residual + fetched * here.ldr);
          if (here.residual_rest) __builtin_prefetch(here.residual_rest + fetched * here.ldr);
          if (here.rest) __builtin_prefetch(here.rest + fetched * here.ldy, 1);
        }
        if constexpr (kStays)
          _tile_stream_loadd(6, right, kTile * 4);
        else
          _tile_loadd(6, right, kTile * 4);
        _tile_loadd(4, a + k, lda * 4);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kStays)
          _tile_stream_loadd(7, right + across, kTile * 4);
        else
          _tile_loadd(7, right + across, kTile * 4);
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

// Where the unfinished sums of a product wait: of all rows, while a stretch follows, or of a strip of rows only.
struct Waiting {
  float* sums;  // null: nowhere, there is one piece
  int64_t ldsum;
  bool all_rows;
};

// Rows [from, to) of the m >= 16. The last ones are done with some before them once more, so that tiles are always
// full.
void StripsOf(const Stretch& stretch, int64_t m, int64_t from, int64_t to, const uint32_t* b, int64_t columns,
              const Waiting& waiting, bool last, const Output& out) {
  const int64_t across = (stretch.to - stretch.from) * kTile;
  for (int64_t row = from, tall; row < to; row += tall) {
    tall = to - row > kTile && m >= 2 * kTile ? 2 * kTile : kTile;
    const int64_t at = row + tall <= m ? row : m - tall;
    float* sums = waiting.all_rows ? waiting.sums + row * waiting.ldsum : waiting.sums;
    for (int i = 0; i < stretch.count; ++i) {
      const Piece& piece = stretch.pieces[i];
      const uint32_t* right = b + (piece.from - stretch.from) * kTile;
      const bool ends = last && i + 1 == stretch.count;
      const auto strip = tall == kTile ? Strip<1, true> : stretch.stays ? Strip<2, true> : Strip<2, false>;
      strip(piece, at, right, across, columns, sums, waiting.ldsum, ends, out);
    }
  }
}

// A thread's room: of panels, of rows while they are decoded, and of a strip's sums.
struct Room {
  uint32_t* panel;
  uint16_t* rows;
  Waiting strip;
  Room(int64_t panel_size, int64_t depth, int64_t columns) {
    const int64_t decoded_depth = depth < kPanel ? 2 * kPanel : 2 * depth;
    const int64_t sums = depth > kShallow ? 2 * kTile * columns : 0;
    decoded.Reserve(panel_size * 4 + kTile * decoded_depth * 2 + sums * 4 + 4096);
    panel = decoded.Take<uint32_t>(panel_size);
    rows = decoded.Take<uint16_t>(kTile * decoded_depth);
    strip = {sums ? decoded.Take<float>(sums) : nullptr, columns, false};
  }
};

// How a product goes about its panels.
struct Plan {
  int64_t pairs, panels;  // the padded depth, and panels of 64 columns
  int64_t most;           // pairs of a stretch
  int64_t group;          // panels that rows are taken through together
  int64_t together;       // that are packed at once

  Plan(const Terms& sum, int64_t n, int threads) : pairs(0), panels((n + kPanel - 1) / kPanel) {
    for (int s = 0; s < sum.count; ++s) pairs += (sum.terms[s].depth + 2 * kTile - 1) / (2 * kTile) * kTile;
    const int64_t stretches = pairs <= kDeepest ? 1 : (pairs + kDeep - 1) / kDeep;
    most = ((pairs + stretches - 1) / stretches + kTile - 1) / kTile * kTile;
    const int64_t bytes = most * kPanel * 4;
    group = kPanels / bytes;
    group = group < 1 ? 1 : group > panels ? panels : group;
    together = most < pairs ? group : group * ((threads * (int64_t{1} << 20)) / (group * bytes) + 1);
    together = together > panels ? panels : together;
  }
};

// Few rows: each thread packs the panels it multiplies; the last ones, not enough for all, each packs for some rows.
void OwnPanels(const Terms& sum, const Plan& plan, int64_t m, int64_t n, const uint16_t* tails, const Output& out,
               int threads) {
  const int64_t whole = plan.panels / threads * threads;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    const Stretch all(sum, m, tails, 0, plan.pairs);
    const Room room(plan.pairs * kPanel, plan.pairs, kPanel);
    const auto live = [&](int64_t panel) { return n - panel * kPanel < kPanel ? n - panel * kPanel : kPanel; };
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t panel = 0; panel < whole; ++panel) {
      PackStretch(sum, all, panel * kPanel, live(panel), room.rows, room.panel);
      StripsOf(all, m, 0, m, room.panel, live(panel), room.strip, true, out.At(panel * kPanel));
    }
    for (int64_t panel = whole; panel < plan.panels; ++panel) {
      PackStretch(sum, all, panel * kPanel, live(panel), room.rows, room.panel);
#pragma omp for schedule(static) nowait
      for (int64_t from = 0; from < m; from += kRowTask)
        StripsOf(all, m, from, from + kRowTask < m ? from + kRowTask : m, room.panel, live(panel), room.strip, true,
                 out.At(panel * kPanel));
    }
  }
}

// Many: all threads pack some panels, and then share the rows. packed: (plan.together panels).
void SharedPanels(const Terms& sum, const Plan& plan, int64_t m, int64_t n, const uint16_t* tails, uint32_t* packed,
                  const Waiting& waiting, const Output& out, int threads) {
  const int64_t row_tasks = (m + kRowTask - 1) / kRowTask;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    const Room room(0, plan.most, plan.group * kPanel);
    for (int64_t first = 0; first < plan.panels; first += plan.together)
      for (int64_t at = 0; at < plan.pairs; at += plan.most) {
        const int64_t here = plan.panels - first < plan.together ? plan.panels - first : plan.together;
        const Stretch stretch(sum, m, tails, at, at + plan.most < plan.pairs ? at + plan.most : plan.pairs);
        const int64_t size = (stretch.to - stretch.from) * kPanel;
#pragma omp for schedule(dynamic, 1)
        for (int64_t panel = 0; panel < here; ++panel) {
          const int64_t column = (first + panel) * kPanel, live = n - column < kPanel ? n - column : kPanel;
          PackStretch(sum, stretch, column, live, room.rows, packed + panel * size);
        }
        const int64_t groups = (here + plan.group - 1) / plan.group;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * row_tasks; ++task) {
          const int64_t panel = task / row_tasks * plan.group;
          const int64_t some = here - panel < plan.group ? here - panel : plan.group;
          const int64_t start = task % row_tasks * kRowTask, end = start + kRowTask < m ? start + kRowTask : m;
          const Output place = out.At((first + panel) * kPanel);
          const int64_t columns = some * kPanel < place.live ? some * kPanel : place.live;
          StripsOf(stretch, m, start, end, packed + panel * size, columns, waiting.all_rows ? waiting : room.strip,
                   stretch.to == plan.pairs, place);
        }
      }
  }
}

// m >= 16.
void ManyRows(const Terms& sum, int64_t m, int64_t n, const Output& out, int threads) {
  const Plan plan(sum, n, threads);
  int64_t with_tail = 0;
  for (int s = 0; s < sum.count; ++s) with_tail += sum.terms[s].depth % (2 * kTile) != 0;
  const bool own = plan.most == plan.pairs && m * plan.pairs * 4 <= kOwnPacking && plan.panels >= 4 * threads;
  const int64_t packed_size = own ? 0 : plan.together * plan.most * kPanel;
  const int64_t ldsum = plan.most < plan.pairs ? plan.group * kPanel : 0;
  scratch.Reserve(packed_size * 4 + with_tail * m * 4 * kTile + (m + kTile) * ldsum * 4 + 4096);
  uint32_t* packed = scratch.Take<uint32_t>(packed_size);
  uint16_t* tails = scratch.Take<uint16_t>(with_tail * m * 2 * kTile);
  const Waiting waiting{ldsum ? scratch.Take<float>((m + kTile) * ldsum) : nullptr, ldsum, ldsum > 0};
  CopyTails(sum, m, tails, threads);
  if (own)
    OwnPanels(sum, plan, m, n, tails, out, threads);
  else
    SharedPanels(sum, plan, m, n, tails, packed, waiting, out, threads);
}
#endif

}  // namespace

// y (m, n) bf16 = [scale (n)] sum of the terms [+ bias (n)] [+ residual (m, n) [+ its rest]]. Depths and lda are even.
EXPORT(product)
(const Term* terms, int count, int64_t m, int64_t n, const uint16_t* bias, const uint16_t* residual,
 const uint16_t* residual_rest, int64_t ldr, uint16_t* y, uint16_t* rest, int64_t ldy, const float* scale,
 uint16_t* plain, int threads) {
  if (m == 0 || n == 0) return;
  const Output out{y, ldy, bias, residual, ldr, n, residual_rest, rest, scale, plain};
  Terms sum{terms, count, 0};
  for (int i = 0; i < count; ++i) sum.depth += terms[i].depth;
  bool few = m < kFewRows && terms[0].kind == kQuantizedByRow;
  for (int i = 1; i < count; ++i) few = few && terms[i].kind == kByRow;
#if defined(__AMX_BF16__)
  const int64_t most = terms[0].lda % kCollide ? kMoreRows : kMoreRowsColliding;
  bool more = m > 1 && m <= most && n >= kTall && terms[0].four_bit && terms[0].kind == kQuantizedByRow &&
              terms[0].depth % kBlock == 0;
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

namespace {

// sum (32, 16) fp32, a row every ldsum: `tall` <= 32 rows of the left side, with room for 32, times 16 packed columns
// (pairs, 16). The pairs are a multiple of 16.
void TallProduct(const Slice& left, int64_t tall, const uint32_t* right, float* sum, int64_t ldsum) {
#if defined(__AMX_BF16__)
  (void)tall;
  TileProduct<2, 1>(&left, 1, 0, right, kTile, sum, ldsum, false);
#else
  for (int64_t i = 0; i < tall; ++i) std::memset(sum + i * ldsum, 0, kTile * 4);
  const int64_t most = kWiden ? kWideDepth / 2 : left.depth;
  for (int64_t p = 0; p < left.depth; p += most) {
    const Slice piece{left.a + p, left.lda, left.depth - p < most ? left.depth - p : most};
    DownPairs<false>(&piece, 1, tall, right + p * kTile, kTile, kTile, sum, ldsum);
  }
#endif
}

}  // namespace

// Of one weight: norms (rows) = (squares + 2 s <w a^T, b> + s^2 <b, b a a^T>)^1/2 by row, at least `least`: the lengths
// of the rows of W + s B A. weight: by row (rows, depth), its a is not used; a (r, depth), b (rows, r) fp32.
struct RowNorms {
  Term weight;
  int64_t rows, r;
  const float *a, *b, *squares;
  float* norms;
  float s;
};

namespace {

// a of one of them, as the right side of a product with the weight, and a a^T.
struct PackedFactor {
  int64_t ranks, padded, pairs;
  uint32_t* packed;  // by 16 ranks: (pairs, 16)
  uint16_t* half;    // a in bf16, filled up with zeros
  float* gram;

  explicit PackedFactor(const RowNorms& one)
      : ranks((one.r + kTile - 1) / kTile * kTile),
        padded((one.weight.depth + 2 * kTile - 1) / (2 * kTile) * 2 * kTile),
        pairs(padded / 2) {}
  int64_t Bytes() const { return ranks * pairs * 4 + (ranks + kTile) * (padded * 2 + ranks * 4) + 4096; }
  void Fill(const RowNorms& one, float* part) {
    const int64_t depth = one.weight.depth;
    std::memset(half, 0, (ranks + kTile) * padded * 2);
    for (int64_t i = 0; i < one.r; ++i) {
      int64_t d = 0;
      for (; d + kWidth <= depth; d += kWidth) StoreBFloat16(half + i * padded + d, Load(one.a + i * depth + d));
      for (; d < depth; ++d) half[i * padded + d] = ToBFloat16(one.a[i * depth + d]);
    }
    const uint32_t* half_pairs = reinterpret_cast<const uint32_t*>(half);
    for (int64_t k = 0; k < ranks; k += kTile)
      TurnAll(half_pairs + k * pairs, pairs, kTile, pairs, packed + k * pairs, kTile);
    for (int64_t i = 0; i < ranks; i += kTile)
      for (int64_t k = 0; k < ranks; k += kTile) {
        TallProduct({half_pairs + i * pairs, pairs, pairs}, 2 * kTile, packed + k * pairs, part, kTile);
        for (int64_t j = 0; j < kTile; ++j) std::memcpy(gram + (i + j) * ranks + k, part + j * kTile, kTile * 4);
      }
  }
};

}  // namespace

// Each weight is read once as the left side of the product; a, packed as bf16, is the right one.
EXPORT(row_norms)
(const RowNorms* all, int64_t count, float least, int threads) {
  constexpr int64_t kTall = 2 * kTile;
  int64_t bytes = count * sizeof(PackedFactor) + 4096, blocks = 0, work = 0, padded = 0, ranks = 0;
  for (int64_t k = 0; k < count; ++k) {
    const PackedFactor factor(all[k]);
    bytes += factor.Bytes();
    blocks += (all[k].rows + kTall - 1) / kTall;
    work += all[k].rows * all[k].weight.depth;
    padded = factor.padded > padded ? factor.padded : padded;
    ranks = factor.ranks > ranks ? factor.ranks : ranks;
  }
  scratch.Reserve(bytes);
  PackedFactor* factors = reinterpret_cast<PackedFactor*>(scratch.Take<char>(count * sizeof(PackedFactor)));
  for (int64_t k = 0; k < count; ++k) {
    PackedFactor factor(all[k]);
    factor.packed = scratch.Take<uint32_t>(factor.ranks * factor.pairs);
    factor.half = scratch.Take<uint16_t>((factor.ranks + kTile) * factor.padded);
    factor.gram = scratch.Take<float>((factor.ranks + kTile) * factor.ranks);
    std::memcpy(factors + k, &factor, sizeof factor);
  }
#pragma omp parallel num_threads(threads) if (work > 65536)
  {
    Tiles tiles;
    decoded.Reserve(kTall * padded * 2 + kTall * ranks * 4 + kTall * kTile * 4 + ranks * 4 + 4096);
    uint16_t* left = decoded.Take<uint16_t>(kTall * padded);
    float* part = decoded.Take<float>(kTall * ranks);
    float* square = decoded.Take<float>(kTall * kTile);
    float* low = decoded.Take<float>(ranks);
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < count; ++k) factors[k].Fill(all[k], square);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t at = block, k = 0;
      for (; at >= (all[k].rows + kTall - 1) / kTall; ++k) at -= (all[k].rows + kTall - 1) / kTall;
      const RowNorms& one = all[k];
      const PackedFactor& factor = factors[k];
      const int64_t row = at * kTall, tall = one.rows - row < kTall ? one.rows - row : kTall;
      const int64_t depth = one.weight.depth, pairs = factor.pairs, wide = factor.ranks;
      Slice slice{reinterpret_cast<const uint32_t*>(left), pairs, pairs};
      if (one.weight.kind == kByRow && depth == factor.padded && tall == kTall && one.weight.ldw % 2 == 0) {
        slice.a = reinterpret_cast<const uint32_t*>(one.weight.weight + row * one.weight.ldw);
        slice.lda = one.weight.ldw / 2;
        for (int64_t i = kTall; i < 2 * kTall && row + i < one.rows; ++i)  // the next rows, on their way meanwhile
          for (int64_t d = 0; d < depth; d += 32)
            __builtin_prefetch(one.weight.weight + (row + i) * one.weight.ldw + d, 0, 2);
      } else {
        if (depth != factor.padded || tall < kTall) std::memset(left, 0, kTall * factor.padded * 2);
        for (int64_t i = 0; i < tall; ++i) {
          if (one.weight.kind == kByRow)
            std::memcpy(left + i * factor.padded, one.weight.weight + (row + i) * one.weight.ldw, depth * 2);
          else
            one.weight.DecodeRow(row + i, 0, depth, left + i * factor.padded);
        }
      }
      for (int64_t n = 0; n < wide; n += kTile) TallProduct(slice, tall, factor.packed + n * pairs, part + n, wide);
      std::memset(low, 0, wide * 4);
      for (int64_t i = 0; i < tall; ++i) {
        std::memcpy(low, one.b + (row + i) * one.r, one.r * 4);
        Vec total = Vec{};
        for (int64_t n = 0; n < wide; n += kWidth) {
          Vec through = Vec{};
          for (int64_t l = 0; l < one.r; ++l) through = Fma(Set(low[l]), Load(factor.gram + l * wide + n), through);
          total = Fma(Load(low + n), Set(2.f) * Load(part + i * wide + n) + Set(one.s) * through, total);
        }
        const float square_norm = one.squares[row + i] + one.s * Sum(total);
        const float norm = std::sqrt(square_norm < 0.f ? 0.f : square_norm);  // NaN stays
        one.norms[row + i] = norm < least ? least : norm;
      }
    }
  }
}
