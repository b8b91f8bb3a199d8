#!/usr/bin/env bash
# Laplace on the adapters that BASE's sweep left (BASE=map: scripts/map/map-llama-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
llama_post_hoc laplace map --laplace-layers all --laplace-hessian kron
