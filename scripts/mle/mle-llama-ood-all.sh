#!/usr/bin/env bash
# mle trained on OBQA, evaluated there and on shifted data sets.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_all mle --opt-wd 0
