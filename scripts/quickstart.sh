#!/usr/bin/env bash
# The whole job on a laptop: environment, world, tokenizers, shards, training, predictions, evaluation, report.
# Arguments go to `egom2p quickstart`, for instance --out DIR or --inputs VIDEO.
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$here"  # paths given are relative to it
exec egom2p quickstart "$@"
