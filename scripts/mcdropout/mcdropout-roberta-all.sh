#!/usr/bin/env bash
# mcdropout on the paper's five GLUE and SuperGLUE data sets, RoBERTa-base.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
roberta_all mcdropout --lora-dropout 0.1 --bayes-eval-n-samples-final 10
