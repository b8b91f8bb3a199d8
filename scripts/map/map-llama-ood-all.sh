#!/usr/bin/env bash
# map trained on OBQA, evaluated there and on shifted data sets.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_all map --opt-wd 1e-5
