#!/usr/bin/env bash
# deepensemble trained on OBQA, evaluated there and on shifted data sets.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_all deepensemble --ensemble-n 3
