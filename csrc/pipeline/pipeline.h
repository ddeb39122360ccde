/* pipeline.h: declarations shared by the files of pipeline/. Private to the core; the public entries are in dhsa.h. */
#ifndef DHSA_PIPELINE_H
#define DHSA_PIPELINE_H

#include "select/selector.h"

/* Checks a score config by itself, as dhsa_config_check does. In config.c. */
dhsa_status dhsa_score_config_check(const dhsa_score_config *config, dhsa_error *error);
/* An error if the method does not serve bidirectional attention and that is asked for. In select.c. */
dhsa_status dhsa_sides_check(const dhsa_select_config *config, int bidirectional, dhsa_error *error);

#endif
