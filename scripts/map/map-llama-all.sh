#!/usr/bin/env bash
# map on the paper's six multiple-choice data sets, Llama-2-7B.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_all map --opt-wd 1e-5
