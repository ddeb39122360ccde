/* topk.c: from scores to a list: forced keys, then the best segments until the list is full or holds a share of mass.
 * The same for every method, so that their lists have the same length at the same budget. A weighted radix select:
 * O(segments). Loops over segments have no branch where it is not known which of them are taken. */
#include <math.h>
#include <string.h>

#include "select/selector.h"

/* A score is mapped to an unsigned integer of the same order, its image. These are the digits of the image, highest
 * first. */
enum { PASSES = 4, MOST_DIGITS = 1 << 11 };
static const int shifts[PASSES] = {21, 14, 7, 0};
static const uint32_t masks[PASSES] = {MOST_DIGITS - 1, 0x7f, 0x7f, 0x7f}; /* few entries are left after the first */

/* Scratch memory of one thread, [segments] each. Entry i stands for the i-th segment that counts. */
typedef struct {
    uint32_t *key;  /* the image of the score */
    int32_t *size;  /* the number of free keys */
    int32_t *alive; /* entries whose higher digits equal those of the threshold */
} topk_scratch;

static topk_scratch topk_lay_out(const dhsa_selector *s, int thread)
{
    int64_t used = s->arena_size;
    char *arena = dhsa_selector_arena(s, thread);
    topk_scratch w;
    w.key = dhsa_part(arena, &used, s->segments * 4);
    w.size = dhsa_part(arena, &used, s->segments * 4);
    w.alive = dhsa_part(arena, &used, s->segments * 4);
    return w;
}

int64_t dhsa_topk_scratch(int64_t segments, int64_t arena_size)
{
    for (int i = 0; i < 3; i++) dhsa_part(NULL, &arena_size, segments * 4);
    return arena_size;
}

/* The candidates that are not forced: keys [from, to), and in bidirectional attention [after, end) too. */
typedef struct {
    const dhsa_segments *segments;
    int64_t from, to, after, end;
} free_keys;

static inline int64_t edge(const dhsa_segments *u, int64_t c) { return u->edges ? u->edges[c] : c; }

static inline int64_t entries(const dhsa_segments *u) { return u->live ? u->n_live : u->last - u->first; }

static inline int64_t segment_of(const dhsa_segments *u, int64_t i) { return u->live ? u->live[i] : u->first + i; }

/* The number of keys of segment c in [from, to). */
static inline int64_t keys_within(const dhsa_segments *u, int64_t c, int64_t from, int64_t to)
{
    return DHSA_MAX(DHSA_MIN(edge(u, c + 1), to) - DHSA_MAX(edge(u, c), from), 0);
}

static inline int64_t free_in(const free_keys *f, int64_t c)
{
    const int64_t before = keys_within(f->segments, c, f->from, f->to);
    return f->after < f->end ? before + keys_within(f->segments, c, f->after, f->end) : before;
}

static inline int32_t size_between(const int32_t *edges, int32_t from, int32_t to)
{
    const int32_t size = DHSA_MIN(edges[1], to) - DHSA_MAX(edges[0], from);
    return DHSA_MAX(size, 0);
}

/* Fills w->size. The first case is that of causal attention, in forms that compilers make vectors of. */
static void find_sizes(const free_keys *f, const topk_scratch *w, int64_t n)
{
    const dhsa_segments *u = f->segments;
    if (u->edges && f->after >= f->end) {
        const int32_t *edges = u->edges, from = (int32_t)f->from, to = (int32_t)f->to;
        if (u->live)
            for (int64_t i = 0; i < n; i++) w->size[i] = size_between(edges + u->live[i], from, to);
        else
            for (int64_t i = 0; i < n; i++) w->size[i] = size_between(edges + u->first + i, from, to);
        return;
    }
    for (int64_t i = 0; i < n; i++) w->size[i] = (int32_t)free_in(f, segment_of(u, i));
}

/* Fills w->key and w->size. */
static void find_keys(const free_keys *f, const topk_scratch *w)
{
    const dhsa_segments *u = f->segments;
    const int64_t n = entries(u);
    find_sizes(f, w, n);
    if (u->live)
        for (int64_t i = 0; i < n; i++) memcpy(w->key + i, u->score + u->live[i], sizeof *w->key);
    else
        memcpy(w->key, u->score + u->first, (size_t)n * sizeof *w->key);
    for (int64_t i = 0; i < n; i++) w->key[i] ^= (uint32_t)-(int32_t)(w->key[i] >> 31) | 0x80000000u;
}

/* Keeps the entries alive that have this digit; returns how many. */
static int64_t filter_digit(const topk_scratch *w, int64_t count, int pass, uint32_t digit)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
        const int32_t entry = w->alive[i];
        w->alive[kept] = entry;
        kept += (w->key[entry] >> shifts[pass] & masks[pass]) == digit;
    }
    return kept;
}

/* The same of the first pass, in which all entries with free keys are alive. */
static int64_t filter_all(const topk_scratch *w, int64_t n, uint32_t digit)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
        w->alive[kept] = (int32_t)i;
        kept += (w->key[i] >> shifts[0] == digit) & (w->size[i] > 0);
    }
    return kept;
}

/* The digit in which key number *need is, counted from the highest digit on; *need becomes its number there. */
static uint32_t find_digit(const int32_t *histogram, uint32_t digit, int64_t *need)
{
    while (histogram[digit] < *need) *need -= histogram[digit--];
    return digit;
}

/* Orders the free keys by the score of their segment, best first, and returns the image of the segment of key number
 * `need`. *left receives how many keys are wanted from segments with exactly that image. `need` is at least 1 and at
 * most the number of free keys. */
static uint32_t topk_threshold(const free_keys *f, const topk_scratch *w, int64_t need, int64_t *left)
{
    const int64_t n = entries(f->segments);
    int32_t histogram[MOST_DIGITS] = {0}; /* of keys, at most DHSA_MAX_LENGTH in all */
    find_keys(f, w);
    for (int64_t i = 0; i < n; i++) histogram[w->key[i] >> shifts[0]] += w->size[i];
    uint32_t digit = find_digit(histogram, masks[0], &need), prefix = digit << shifts[0];
    int64_t count = filter_all(w, n, digit);
    for (int pass = 1; pass < PASSES; pass++) {
        memset(histogram, 0, (masks[pass] + 1) * sizeof *histogram);
        for (int64_t i = 0; i < count; i++)
            histogram[w->key[w->alive[i]] >> shifts[pass] & masks[pass]] += w->size[w->alive[i]];
        digit = find_digit(histogram, masks[pass], &need);
        prefix |= digit << shifts[pass];
        count = filter_digit(w, count, pass, digit);
    }
    *left = need;
    return prefix;
}

/* Returns how many free keys hold `need` of the mass, with segments taken whole and best first. One thread takes the
 * sums in the order of keys, so they are the same for any number of threads. */
static int64_t keys_for(const free_keys *f, dhsa_span span, const topk_scratch *w, double need)
{
    const dhsa_segments *u = f->segments;
    int64_t count = 0, keys = 0;
    find_keys(f, w);
    for (int64_t i = 0; i < entries(u); i++) {
        w->alive[count] = (int32_t)i;
        count += w->size[i] > 0;
    }
    for (int pass = 0; pass < PASSES; pass++) {
        double histogram[MOST_DIGITS] = {0};
        int32_t sizes[MOST_DIGITS] = {0};
        for (int64_t i = 0; i < count; i++) {
            const int64_t c = segment_of(u, w->alive[i]), n = w->size[w->alive[i]];
            const uint32_t digit = w->key[w->alive[i]] >> shifts[pass] & masks[pass];
            histogram[digit] += (double)u->mass[c] * (double)n / (double)keys_within(u, c, span.lo, span.end);
            sizes[digit] += (int32_t)n;
        }
        uint32_t digit = masks[pass];
        while (histogram[digit] < need) {
            need -= histogram[digit];
            keys += sizes[digit];
            if (digit-- == 0) return keys; /* rounding: this sum may be slightly less than in the pass before */
        }
        count = filter_digit(w, count, pass, digit);
    }
    for (int64_t i = count - 1; i >= 0 && need > 0; i--) { /* equal scores: the most recent first */
        const int64_t c = segment_of(u, w->alive[i]), n = w->size[w->alive[i]];
        need -= (double)u->mass[c] * (double)n / (double)keys_within(u, c, span.lo, span.end);
        keys += n;
    }
    return keys;
}

/* Returns the length of a list that is to hold a share of mass. */
static int64_t size_by_mass(const dhsa_select_config *config, dhsa_span span, const free_keys *f, const topk_scratch *w,
                            int64_t room)
{
    const dhsa_segments *u = f->segments;
    const int64_t forced = span.end - span.lo - DHSA_MAX(f->to - f->from, 0) - DHSA_MAX(f->end - f->after, 0);
    double total = 0, held = 0;
    int64_t sure = 0;
    for (int64_t c = u->first; c < u->last; c++) {
        const int64_t keys = keys_within(u, c, span.lo, span.end), n = free_in(f, c);
        if (keys == 0) continue;
        total += u->mass[c];
        held += (double)u->mass[c] * (double)(keys - n) / (double)keys;
        if (u->score[c] == INFINITY) sure += n;
    }
    /* A block without an estimate, and one that is to hold all mass, fills its room. */
    if (!(total > 0) || config->mass >= 1) return room;
    const double need = config->mass * total - held;
    const int64_t size = forced + (need > 0 ? keys_for(f, span, w, need) : sure);
    return DHSA_MIN(DHSA_MAX(size, config->floor), room);
}

/* Leaves the entries alive whose image is at least `least` and that have free keys; returns how many. */
static int64_t choose_entries(const topk_scratch *w, int64_t n, uint32_t least)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        w->alive[count] = (int32_t)i;
        count += (w->key[i] >= least) & (w->size[i] > 0);
    }
    return count;
}

int64_t dhsa_topk_segments(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments,
                           int64_t keys, int32_t *chosen)
{
    const topk_scratch w = topk_lay_out(s, thread);
    const free_keys f = {segments, span.lo, span.end, span.end, span.end};
    int64_t left = 0, count = 0;
    const uint32_t least = topk_threshold(&f, &w, DHSA_MIN(keys, span.end - span.lo), &left);
    const int64_t most = choose_entries(&w, entries(segments), least);
    /* Of equal scores at the threshold, the later segments are taken. */
    int64_t first = 0; /* the first entry at the threshold that is taken */
    for (int64_t j = most - 1; j >= 0; j--)
        if (w.key[w.alive[j]] == least && left > 0) {
            left -= w.size[w.alive[j]];
            first = w.alive[j];
        }
    for (int64_t j = 0; j < most; j++) {
        const int64_t i = w.alive[j];
        if (w.key[i] == least && i < first) continue;
        chosen[count++] = (int32_t)segment_of(segments, i);
    }
    return count;
}

int64_t dhsa_write_keys(int32_t *list, int64_t from, int64_t to)
{
    for (int64_t j = from; j < to; j++) list[j - from] = (int32_t)j;
    return DHSA_MAX(to - from, 0);
}

/* Writes keys [from, to) below `end` and returns the new end. */
static int32_t *write_below(int32_t *end, int64_t from, int64_t to)
{
    while (to > from) *--end = (int32_t)--to;
    return end;
}

/* Writes the chosen keys of [from, to), those of segments above the image `least` and *left keys of those that equal
 * it, below `end`; returns the new end. Written backwards, so that of equal scores the later keys are taken. The first
 * `count` entries that are alive are the chosen ones. */
static int32_t *write_chosen(const dhsa_segments *segments, const topk_scratch *w, int64_t count, int64_t from,
                             int64_t to, uint32_t least, int64_t *left, int32_t *end)
{
    for (int64_t j = count - 1; j >= 0; j--) {
        const int64_t i = w->alive[j], c = segment_of(segments, i);
        const int64_t last = DHSA_MIN(edge(segments, c + 1), to);
        int64_t first = DHSA_MAX(edge(segments, c), from);
        if (first >= last) continue;
        if (w->key[i] == least) {
            first = DHSA_MAX(first, last - *left);
            *left -= last - first;
        }
        end = write_below(end, first, last);
    }
    return end;
}

int64_t dhsa_topk(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments, int32_t *list,
                  int64_t room)
{
    const dhsa_select_config *config = s->config;
    const topk_scratch w = topk_lay_out(s, thread);
    /* Sinks from the first local key on count as local keys. */
    const int64_t sink_end = DHSA_MIN(DHSA_MAX(config->sink, span.lo), span.local_lo);
    const int64_t local_end = DHSA_MAX(DHSA_MIN(config->sink, span.end), span.local_end);
    const free_keys f = {segments, sink_end, span.local_lo, local_end, span.end};
    const int64_t size = config->mass > 0 ? size_by_mass(config, span, &f, &w, room) : room;
    const int64_t need = size - (sink_end - span.lo) - (local_end - span.local_lo);
    int32_t *end = list + size;
    int64_t left = 0;
    const uint32_t least = need > 0 ? topk_threshold(&f, &w, need, &left) : 0;
    const int64_t count = need > 0 ? choose_entries(&w, entries(segments), least) : 0;
    if (need > 0 && f.after < f.end) end = write_chosen(segments, &w, count, f.after, f.end, least, &left, end);
    end = write_below(end, span.local_lo, local_end);
    if (need > 0) end = write_chosen(segments, &w, count, f.from, f.to, least, &left, end);
    write_below(end, span.lo, sink_end);
    return size;
}
