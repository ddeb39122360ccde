/* selection.c: validates selections that come from outside, before any index becomes an address, and counts the
 * pairs that a selection keeps. */
#include <inttypes.h>

#include "core/internal.h"

/* Whether a row of n indices is ascending, unique and within [0, k_len). The loop has no early exit, so that
 * compilers can vectorise it. */
static int row_is_valid(const int32_t *row, int64_t n, int64_t k_len)
{
    int bad = 0;
    if (row[0] < 0 || row[n - 1] >= k_len) return 0;
    for (int64_t j = 1; j < n; j++) bad |= row[j] <= row[j - 1];
    return !bad;
}

static dhsa_status explain_row(const int32_t *row, int64_t n, int64_t at, int64_t start, int64_t k_len,
                               dhsa_error *error)
{
    for (int64_t j = 0; j < n; j++) {
        if (row[j] < 0 || row[j] >= k_len)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "indices: entry %" PRId64 " (row %" PRId64 ") is %d, expected 0 to %" PRId64, start + j,
                             at, row[j], k_len - 1);
        if (j > 0 && row[j] <= row[j - 1])
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "indices: entry %" PRId64 " (row %" PRId64
                             ") is %d after %d, expected ascending without repeats",
                             start + j, at, row[j], row[j - 1]);
    }
    return DHSA_OK;
}

dhsa_status dhsa_selection_check(const dhsa_selection *s, int64_t n_indptr, int64_t n_indices, int64_t batch,
                                 int64_t q_heads, int64_t kv_heads, int64_t q_len, int64_t k_len, dhsa_error *error)
{
    int64_t rows;
    if (!s) return dhsa_check_pointer(s, "selection", error);
    if (s->batch != batch)
        return dhsa_fail(error, DHSA_ERR_VALUE, "selection: made for batch %" PRId64 ", got %" PRId64, s->batch, batch);
    if (s->heads != 1 && s->heads != kv_heads && s->heads != q_heads)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "selection: has lists for %" PRId64 " heads, expected 1, %" PRId64 " or %" PRId64, s->heads,
                         kv_heads, q_heads);
    if (s->query_block < 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "selection: query_block is %" PRId64 ", expected at least 1",
                         s->query_block);
    const int64_t blocks = q_len / s->query_block + (q_len % s->query_block != 0);
    if (s->nq != blocks)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "selection: has %" PRId64 " query blocks, expected %" PRId64 " for %" PRId64
                         " queries in blocks of %" PRId64,
                         s->nq, blocks, q_len, s->query_block);
    if (!dhsa_mul(batch, s->heads, &rows) || !dhsa_mul(rows, blocks, &rows) || n_indptr < 1 || n_indptr - 1 != rows)
        return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: has %" PRId64 " entries, expected batch * heads * nq + 1",
                         n_indptr);
    if (!s->indptr) return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: has no data");
    if (s->indptr[0] != 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: begins with %" PRId64 ", expected 0", s->indptr[0]);
    for (int64_t r = 0; r < rows; r++)
        if (s->indptr[r + 1] < s->indptr[r])
            return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: falls from %" PRId64 " to %" PRId64 " at entry %" PRId64,
                             s->indptr[r], s->indptr[r + 1], r + 1);
    if (n_indices < 0) n_indices = s->indptr[rows];
    if (s->indptr[rows] != n_indices)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "indptr: ends with %" PRId64 ", expected the number of indices, %" PRId64, s->indptr[rows],
                         n_indices);
    if (!s->indices && n_indices > 0) return dhsa_fail(error, DHSA_ERR_VALUE, "indices: has no data");
    for (int64_t r = 0; r < rows; r++) {
        const int64_t start = s->indptr[r], n = s->indptr[r + 1] - start;
        if (n > 0 && !row_is_valid(s->indices + start, n, k_len))
            return explain_row(s->indices + start, n, r, start, k_len, error);
    }
    return DHSA_OK;
}

/* ---- pairs ----------------------------------------------------------------------------------------------------- */

/* The number of pairs (i, j) with 0 <= i < n and 0 <= j < m in which j is more than `apart` after i. */
static double pairs_after(int64_t n, int64_t m, int64_t apart)
{
    /* i sees m - 1 - apart - i such keys, as long as that is positive. */
    const int64_t most = m - 1 - apart, rows = DHSA_MIN(n, most);
    return rows > 0 ? (double)rows * (double)(2 * most - rows + 1) / 2 : 0;
}

/* The number of pairs that causality and the window leave visible to `heads` head sets, over all batch items. */
double dhsa_pairs_visible(const dhsa_problem *p, int64_t heads)
{
    const int64_t q_len = p->q.shape[2], k_len = p->k.shape[2], first = k_len - q_len;
    int64_t last = k_len - 1;
    double pairs = 0;
    if (!p->causal) {
        /* All pairs but those too far apart on either side. Counted from the ends, a query and a key before it are like
         * a query and a key after it. */
        pairs = (double)q_len * (double)k_len;
        if (p->window && p->window < k_len)
            pairs -= pairs_after(q_len, q_len, p->window - 1) + pairs_after(q_len, k_len, p->window - 1);
        return pairs * (double)(p->q.shape[0] * heads);
    }
    if (p->window && last >= p->window) {
        const int64_t from = DHSA_MAX(first, p->window); /* from here on every query sees `window` keys */
        pairs += (double)(last - from + 1) * (double)p->window;
        last = from - 1;
    }
    if (last >= first) pairs += (double)(last - first + 1) * (double)(first + last + 2) / 2;
    return pairs * (double)(p->q.shape[0] * heads);
}

/* The number of pairs of a query at the positions [first, last] and a key of an ascending list that it sees. Only
 * keys near the two ends of the list are invisible to some of the queries; all others are counted at once. */
static int64_t pairs_listed(const int32_t *keys, int64_t n, int64_t first, int64_t last, int64_t window, int causal)
{
    const int64_t ahead = causal   ? 0
                          : window ? window - 1
                                   : INT32_MAX; /* how far after its position a query sees keys */
    int64_t pairs = 0, at = 0;
    if (window)
        for (; at < n && keys[at] + window - 1 < last; at++) {
            const int64_t from = DHSA_MAX(first, keys[at] - ahead), to = keys[at] + window - 1;
            pairs += DHSA_MAX(to - from + 1, 0);
        }
    for (; n > at && keys[n - 1] > first + ahead; n--) pairs += DHSA_MAX(last + ahead - keys[n - 1] + 1, 0);
    return pairs + (n - at) * (last - first + 1);
}

double dhsa_pairs_kept(const dhsa_problem *p, const dhsa_selection *s, int64_t first, int64_t q_len)
{
    const int64_t window =
        p->window < p->k.shape[2] ? p->window : 0; /* a wider window hides no key, and sums with it could overflow */
    double pairs = 0;
    for (int64_t r = 0; r < s->batch * s->heads * s->nq; r++) {
        const int64_t from = r % s->nq * s->query_block, to = DHSA_MIN(from + s->query_block, q_len) - 1;
        const int64_t start = s->indptr[r], n = s->indptr[r + 1] - start;
        if (n > 0) pairs += (double)pairs_listed(s->indices + start, n, first + from, first + to, window, p->causal);
    }
    return pairs;
}
