#!/usr/bin/env bash
# TFB on the adapters that BASE's sweep left (BASE=mle: scripts/mle/mle-llama-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_settings
DATASETS="${DATASETS:-winogrande_s ARC-Challenge ARC-Easy winogrande_m obqa boolq}"
DATASET_TYPE=mcdataset LENGTH=300 tfb_all
