#!/usr/bin/env bash
# deepensemble on the paper's five GLUE and SuperGLUE data sets, RoBERTa-base.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
roberta_all deepensemble --ensemble-n 3
