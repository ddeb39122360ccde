/* mean_scores.c: the scores of the paper: the mean query of a query block against the mean key of a chunk. scorer.c
 * finds the candidate chunks and holds what these scores have in common with row scores. Source: Dynamic Hierarchical
 * Sparse Attention, arXiv 2510.24606. */
#include <math.h>

#include "core/arena.h"
#include "select/scorer.h"

int64_t dhsa_mean_plan(const dhsa_scorer *s)
{
    int64_t size = 0;
    for (int i = 0; i < 2; i++) dhsa_part(NULL, &size, s->q->shape[3] * 4);
    return size;
}

/* The mean query of the heads of a set against the mean keys of its KV heads: one dot product per chunk and KV head. */
unsigned char dhsa_mean_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score)
{
    const int64_t dim = s->q->shape[3], members = s->heads_per_kv * s->kv_per_set;
    const int root = s->config->pooling == DHSA_POOL_MEAN_SQRT;
    const float *means = s->chunks.means;
    int64_t used = 0;
    float *query = dhsa_part(arena, &used, dim * 4), *one = dhsa_part(arena, &used, dim * 4);
    int finite = 1;
    for (int64_t h = 0; h < members; h++) {
        dhsa_mean_query(s->kernels, s->q, s->b, job->set * members + h, job->from, job->to, 1.0f, h == 0 ? query : one);
        if (h > 0) s->kernels->add(one, DHSA_F32, dim, query);
    }
    const double factor =
        s->config->scale * (root ? sqrt((double)(job->to - job->from)) : 1.0) / (double)(members * s->kv_per_set);
    for (int64_t c = 0; c < job->n; c++) {
        const int64_t at = job->first + c;
        const double length = (double)(s->chunks.edges[at + 1] - s->chunks.edges[at]);
        double sum = 0;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++)
            sum += s->kernels->dot(query, means + (h * s->chunks.pitch + at) * dim, dim);
        score[c] = (float)(sum * factor * (root ? sqrt(length) : 1.0));
        int good = 1;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++)
            good &= s->chunks.state[h * s->chunks.pitch + at] == DHSA_CHUNK_GOOD;
        finite &= !good || isfinite(score[c]);
    }
    /* If queries of the block are not finite, all chunks score 0. */
    const double cap = s->config->softcap;
    for (int64_t c = 0; c < job->n; c++) {
        if (!finite)
            score[c] = 0;
        else if (cap > 0)
            score[c] = (float)(cap * tanh(score[c] / cap));
    }
    unsigned char last = DHSA_CHUNK_GOOD;
    for (int64_t h = kv; h < kv + s->kv_per_set; h++)
        last = DHSA_MAX(last, s->chunks.state[h * s->chunks.pitch + job->first + job->n - 1]);
    return last;
}
