/* window.c: selects the first keys and the most recent ones (in bidirectional attention those nearest to the middle of
 * the block), as many as the budget allows, without reading queries or keys. Source: attention sinks, StreamingLLM
 * (arXiv 2309.17453); the pattern is also called A-shape. */
#include "select/selector.h"

static int64_t window_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                           int32_t *list, int64_t room)
{
    const int64_t sink = DHSA_MAX(DHSA_MIN(s->config->sink, span.end) - span.lo, 0), recent = room - sink;
    /* In causal attention the local keys end with the span, and so do these. */
    const int64_t middle = span.local_lo + (span.local_end - span.local_lo) / 2;
    const int64_t from = s->config->score.bidirectional
                             ? DHSA_MIN(DHSA_MAX(middle - recent / 2, span.lo + sink), span.end - recent)
                             : span.end - recent;
    (void)set, (void)block, (void)thread;
    dhsa_write_keys(list, span.lo, span.lo + sink);
    dhsa_write_keys(list + sink, from, from + recent);
    return room;
}

const dhsa_method dhsa_method_window = {.name = "window", .has_both_sides = 1, .list = window_list};
