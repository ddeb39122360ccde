/* config.c: checks of a config that do not depend on the arrays of a call. They are done once when a config is made, or
 * by a public entry that is given one. */
#include <inttypes.h>

#include "chunk/chunk.h"
#include "pipeline/pipeline.h"

const char *dhsa_method_name(dhsa_method_kind kind)
{
    const dhsa_method *method = dhsa_method_find(kind);
    return method ? method->name : NULL;
}

int dhsa_method_has_chunks(dhsa_method_kind kind)
{
    const dhsa_method *method = dhsa_method_find(kind);
    return method && method->has_chunks;
}

dhsa_status dhsa_score_config_check(const dhsa_score_config *c, dhsa_error *error)
{
    if (!c) return dhsa_check_pointer(c, "config", error);
    if (c->score != DHSA_SCORE_ROWS && c->score != DHSA_SCORE_BLOCK)
        return dhsa_fail(error, DHSA_ERR_VALUE, "score: unknown kind %d", (int)c->score);
    if (c->pooling != DHSA_POOL_MEAN && c->pooling != DHSA_POOL_MEAN_SQRT)
        return dhsa_fail(error, DHSA_ERR_VALUE, "pooling: unknown kind %d", (int)c->pooling);
    if (c->heads != DHSA_HEADS_GROUP && c->heads != DHSA_HEADS_ALL && c->heads != DHSA_HEADS_HEAD)
        return dhsa_fail(error, DHSA_ERR_VALUE, "heads: unknown kind %d", (int)c->heads);
    if (c->query_block < 1 || c->query_block > INT32_MAX)
        return dhsa_fail(error, DHSA_ERR_VALUE, "query_block: got %" PRId64 ", expected 1 to %d", c->query_block,
                         INT32_MAX);
    if (c->score == DHSA_SCORE_ROWS && (c->mean_queries < 1 || c->mean_queries > c->query_block))
        return dhsa_fail(error, DHSA_ERR_VALUE, "rows: got %" PRId64 ", expected 1 to the query_block of %" PRId64,
                         c->mean_queries, c->query_block);
    return DHSA_OK;
}

static dhsa_status select_config_check(const dhsa_select_config *c, dhsa_error *error)
{
    if (!c) return dhsa_check_pointer(c, "config", error);
    const dhsa_method *method = dhsa_method_find(c->method);
    dhsa_score_config score = c->score;
    if (!method) return dhsa_fail(error, DHSA_ERR_VALUE, "method: unknown kind %d", (int)c->method);
    if (!method->has_chunks && !method->has_mean_queries) score.mean_queries = 1; /* is ignored */
    const dhsa_status status = dhsa_score_config_check(&score, error);
    if (status) return status;
    if ((c->method == DHSA_METHOD_DHSA) != (score.score == DHSA_SCORE_BLOCK))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "score: the block score goes with method dhsa, and only with it; got %s", method->name);
    if (c->budget < 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "budget: got %" PRId64 ", expected at least 1", c->budget);
    if (c->sink < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "sink: got %" PRId64 ", expected at least 0", c->sink);
    if (c->local < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "local: got %" PRId64 ", expected at least 0", c->local);
    if (c->dense_tail < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "dense_tail: got %" PRId64 ", expected at least 0", c->dense_tail);
    if (c->sink > c->budget || c->local > c->budget - c->sink)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "budget: %" PRId64 " keys do not hold the %" PRId64 " of sink and %" PRId64 " of local",
                         c->budget, c->sink, c->local);
    if (!(c->mass >= 0 && c->mass <= 1))
        return dhsa_fail(error, DHSA_ERR_VALUE, "mass: got %g, expected above 0, at most 1 (0: none)", c->mass);
    if (c->mass > 0 && !method->has_mass)
        return dhsa_fail(error, DHSA_ERR_VALUE, "mass: the scores of method %s are no shares of mass; give a budget",
                         method->name);
    if (c->mass > 0 && (c->floor < 0 || c->floor > c->budget || c->floor < c->sink + c->local))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "floor: got %" PRId64 ", expected sink + local = %" PRId64 " to the budget of %" PRId64,
                         c->floor, c->sink + c->local, c->budget);
    if (c->shortlist < 0 || (c->shortlist > 0 && c->mass == 0 && c->shortlist < c->budget))
        return dhsa_fail(error, DHSA_ERR_VALUE, "shortlist: got %" PRId64 ", expected at least the budget of %" PRId64,
                         c->shortlist, c->budget);
    if (c->key_block < method->has_blocks || c->key_block > INT32_MAX)
        return dhsa_fail(error, DHSA_ERR_VALUE, "key_block: got %" PRId64 ", expected 1 to %d", c->key_block,
                         INT32_MAX);
    if (method->has_stride && (c->stride < 1 || c->stride > DHSA_MAX_STRIDE || c->key_block % c->stride != 0))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "stride: got %" PRId64 ", expected a divisor of key_block = %" PRId64 ", at most %d",
                         c->stride, c->key_block, DHSA_MAX_STRIDE);
    return DHSA_OK;
}

dhsa_status dhsa_config_check(const dhsa_select_config *select, const dhsa_boundary_config *boundaries,
                              dhsa_error *error)
{
    const dhsa_status status = select_config_check(select, error);
    return status || !boundaries ? status : dhsa_boundary_config_check(boundaries, error);
}
