#!/usr/bin/env bash
# Laplace on BASE's adapters of SOURCE (obqa), evaluated there and on shifted data sets
# (BASE=map: scripts/map/map-llama-ood-all.sh or -llama-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_ood_post_hoc laplace map --laplace-layers all --laplace-hessian kron
