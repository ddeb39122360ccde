/* span.c: the keys that a query block may choose from, and whether it chooses at all. The same for every method. */
#include "select/span.h"

dhsa_span dhsa_span_candidates(const dhsa_score_config *config, int64_t q_len, int64_t k_len, int64_t block)
{
    const int64_t start = k_len - q_len + block * config->query_block, nominal = start + config->query_block;
    dhsa_span span = {0, DHSA_MIN(nominal, k_len)};
    if (config->window) {
        const int64_t lo =
            config->score == DHSA_SCORE_ROWS ? start - config->window + 1 : DHSA_MIN(nominal - config->window, start);
        span.lo = DHSA_MAX(lo, 0);
    }
    return span;
}

int64_t dhsa_head_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k)
{
    return config->heads == DHSA_HEADS_ALL ? 1 : config->heads == DHSA_HEADS_GROUP ? k->shape[1] : q->shape[1];
}

int dhsa_span_exact(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span)
{
    const int64_t end_query = DHSA_MIN((block + 1) * c->score.query_block, q_len), window = c->score.window;
    const int64_t least = c->mass > 0 ? c->floor : c->budget;
    *span = dhsa_span_candidates(&c->score, q_len, k_len, block);
    if (!(end_query > q_len - c->dense_tail || span->end <= least || (window && window <= least))) return 0;
    span->lo = window ? DHSA_MAX(k_len - q_len + block * c->score.query_block - window + 1, 0) : 0;
    return 1;
}

int dhsa_leaves_out(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t window)
{
    if (!config || config->score.query_block < 1 || config->score.query_block > INT32_MAX || q_len < 1 || k_len < 1 ||
        q_len > INT32_MAX / 2 || k_len > INT32_MAX / 2)
        return 0;
    dhsa_select_config c = *config;
    c.score.window = window;
    /* Of the blocks before the dense tail the last one has the most candidates. */
    const int64_t before_tail = (q_len - c.dense_tail) / c.score.query_block;
    const int64_t blocks = c.dense_tail ? before_tail : dhsa_block_count(&c.score, q_len);
    dhsa_span span;
    return blocks > 0 && !dhsa_span_exact(&c, q_len, k_len, blocks - 1, &span);
}

int64_t dhsa_block_keys(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block)
{
    dhsa_span span;
    const int exact = dhsa_span_exact(c, q_len, k_len, block, &span);
    return exact ? span.end - span.lo : DHSA_MIN(span.end - span.lo, c->budget);
}
