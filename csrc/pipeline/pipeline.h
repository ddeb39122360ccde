/* pipeline.h: what the files of pipeline/ share. Private to the core; the public entries are in dhsa.h. */
#ifndef DHSA_PIPELINE_H
#define DHSA_PIPELINE_H

#include "select/selector.h"

dhsa_status dhsa_score_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config, dhsa_error *error);
dhsa_status dhsa_select_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, dhsa_error *error);

#endif
