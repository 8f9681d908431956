#!/usr/bin/env bash
# Converts a corpus by an array of jobs, and makes it a store when all of them are through. Run it again when a
# task failed: shards that are complete have nothing left to do.
#   launch/slurm/prepare.sh [--dry-run] CORPUS SOURCE STORE SHARDS
set -euo pipefail

# CHANGE: what your cluster wants to know, and the environment, on a file system that all nodes see.
OPTIONS=(--account=ACCOUNT --partition=PARTITION)
ENVIRONMENT=${ENVIRONMENT:-.venv}

dry=''
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
if (($# != 4)) || [[ ! $4 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/slurm/prepare.sh [--dry-run] CORPUS SOURCE STORE SHARDS (a number)" >&2
    exit 2
fi
export ENVIRONMENT CORPUS=$1 SOURCE=$2 STORE=$3 SHARDS=$4
script=$(dirname "$0")/prepare.sbatch

# Jobs get this shell's environment (--export=ALL), and with it the five variables above.
array=(sbatch --parsable "${OPTIONS[@]}" --export=ALL --array="0-$((SHARDS - 1))" --output=%x-%A_%a.out "$script")
merge=(sbatch --parsable "${OPTIONS[@]}" "--export=ALL,MERGE=1" --kill-on-invalid-dep=yes)
if [[ -n $dry ]]; then
    printf '%q ' "${array[@]}" && printf '\n'
    printf '%q ' "${merge[@]}" --dependency=afterok:ARRAY "$script" && printf '\n'
    echo "each task: ecg-jax prepare $CORPUS $SOURCE $STORE --shard=TASK/$SHARDS; then --merge"
    exit 0
fi
id=$("${array[@]}")
id=${id%%;*} # "id;cluster" where there are several clusters
last=$("${merge[@]}" --dependency="afterok:$id" "$script")
echo "array $id of $SHARDS shards, merged by job ${last%%;*}"
