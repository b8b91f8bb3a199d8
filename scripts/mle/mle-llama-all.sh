#!/usr/bin/env bash
# mle on the paper's six multiple-choice data sets, Llama-2-7B.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_all mle --opt-wd 0
