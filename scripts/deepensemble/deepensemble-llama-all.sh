#!/usr/bin/env bash
# deepensemble on the paper's six multiple-choice data sets, Llama-2-7B.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_all deepensemble --ensemble-n 3
