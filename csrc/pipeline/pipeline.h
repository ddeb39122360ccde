/* pipeline.h: what the files of pipeline/ share. Private to the core; the public entries are in dhsa.h. */
#ifndef DHSA_PIPELINE_H
#define DHSA_PIPELINE_H

#include "select/selector.h"

/* What dhsa_config_check asks of the score. config.c */
dhsa_status dhsa_score_config_check(const dhsa_score_config *config, dhsa_error *error);

#endif
