#!/usr/bin/env bash
# TFB on BASE's adapters of SOURCE (obqa), evaluated there and on shifted data sets
# (BASE=mle: scripts/mle/mle-llama-ood-all.sh or -llama-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_post_hoc tfb mle
