#!/usr/bin/env bash
# Laplace on the adapters that BASE's sweep left (BASE=map: scripts/map/map-roberta-all.sh first).
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
roberta_post_hoc laplace map --laplace-layers all --laplace-hessian kron
