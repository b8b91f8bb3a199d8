#!/usr/bin/env bash
# map on the paper's five GLUE and SuperGLUE data sets, RoBERTa-base.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
roberta_all map --opt-wd 1e-5
