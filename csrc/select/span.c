/* span.c: the keys that a query block may choose from, and whether it chooses at all. The same for every method. */
#include "select/span.h"

dhsa_span dhsa_span_candidates(const dhsa_score_config *config, int64_t q_len, int64_t k_len, int64_t block)
{
    const int64_t start = k_len - q_len + block * config->query_block, nominal = start + config->query_block;
    const int64_t window = config->window;
    if (config->bidirectional) {
        const int64_t last = DHSA_MIN(nominal, k_len) - 1; /* the position of the last query */
        const dhsa_span all = {.lo = 0, .end = k_len},
                        near = {.lo = DHSA_MAX(start - window + 1, 0), .end = last + window};
        return window == 0 ? all : window < k_len - last ? near : (dhsa_span){.lo = near.lo, .end = k_len};
    }
    dhsa_span span = {.lo = 0, .end = DHSA_MIN(nominal, k_len)};
    if (window) {
        const int64_t lo = config->score == DHSA_SCORE_ROWS ? start - window + 1 : DHSA_MIN(nominal - window, start);
        span.lo = DHSA_MAX(lo, 0);
    }
    return span;
}

int64_t dhsa_head_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k)
{
    return config->heads == DHSA_HEADS_ALL ? 1 : config->heads == DHSA_HEADS_GROUP ? k->shape[1] : q->shape[1];
}

/* Sets the local keys of a span: the last ones, or in bidirectional attention those around the middle of the block. */
static void set_local(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span)
{
    const int64_t first = k_len - q_len + block * c->score.query_block,
                  last = DHSA_MIN(first + c->score.query_block, k_len);
    const int64_t local = DHSA_MIN(c->local, span->end - span->lo);
    span->local_lo = span->end - local;
    if (c->score.bidirectional)
        span->local_lo = DHSA_MIN(DHSA_MAX((first + last) / 2 - local / 2, span->lo), span->end - local);
    span->local_end = span->local_lo + local;
}

static int bidirectional_exact(const dhsa_select_config *c, int64_t least, const dhsa_span *span)
{
    return span->end - span->lo <= least || (c->score.window && c->score.window <= (least + 1) / 2);
}

int dhsa_span_exact(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span)
{
    const int64_t end_query = DHSA_MIN((block + 1) * c->score.query_block, q_len), window = c->score.window;
    const int64_t least = c->mass > 0 ? c->floor : c->budget;
    *span = dhsa_span_candidates(&c->score, q_len, k_len, block);
    set_local(c, q_len, k_len, block, span);
    if (c->score.bidirectional) return bidirectional_exact(c, least, span);
    if (!(end_query > q_len - c->dense_tail || span->end <= least || (window && window <= least))) return 0;
    span->lo = window ? DHSA_MAX(k_len - q_len + block * c->score.query_block - window + 1, 0) : 0;
    return 1;
}

int dhsa_leaves_out(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t window, int causal)
{
    if (!config || config->score.query_block < 1 || config->score.query_block > INT32_MAX || q_len < 1 || k_len < 1 ||
        q_len > INT32_MAX / 2 || k_len > INT32_MAX / 2)
        return 0;
    dhsa_select_config c = *config;
    dhsa_span span;
    c.score.window = window;
    c.score.bidirectional = !causal;
    const int64_t all = dhsa_block_count(&c.score, q_len);
    if (!causal) {
        /* The number of candidates grows with the block until the windows begin after key 0, and shrinks once they end
         * at the last key, so that the largest number is near the block where the first of these happens. */
        const int64_t turn = window ? (DHSA_MIN(window, k_len) - (k_len - q_len)) / c.score.query_block : 0;
        for (int64_t block = turn - 1; block <= turn + 1; block++)
            if (!dhsa_span_exact(&c, q_len, k_len, DHSA_MAX(DHSA_MIN(block, all - 1), 0), &span)) return 1;
        return 0;
    }
    /* Of the blocks before the dense tail the last one has the most candidates. */
    const int64_t before_tail = (q_len - c.dense_tail) / c.score.query_block;
    const int64_t blocks = c.dense_tail ? before_tail : all;
    return blocks > 0 && !dhsa_span_exact(&c, q_len, k_len, blocks - 1, &span);
}

int64_t dhsa_block_keys(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block)
{
    dhsa_span span;
    const int exact = dhsa_span_exact(c, q_len, k_len, block, &span);
    return exact ? span.end - span.lo : DHSA_MIN(span.end - span.lo, c->budget);
}
