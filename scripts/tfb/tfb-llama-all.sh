#!/usr/bin/env bash
# TFB on the adapters that BASE's sweep left (BASE=mle: scripts/mle/mle-llama-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_post_hoc tfb mle
