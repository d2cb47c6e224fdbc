#!/usr/bin/env bash
# Repeat a part of the ceiling on a lent GPU, over several calls that each carry a part of the model's file:
#
#     ceiling_call.sh keep CARRIED                     # smollm2.part*
#     ceiling_call.sh run CARRIED GPU SECONDS OUT      # the last part, the model's other files, join.py, data.tar.xz
#
# Dense attention, the newest keys and the best keys per query at 512 keys, in the background.
set -u
W=${CEILING_WORK:-/tmp/ceiling}
mkdir -p "$W/data" "$W/site" "$W/model"
cp "$2"/smollm2.part* "$W/"
[ "$1" = run ] || exit 0
gpu=$3 seconds=$4 out=$5
mkdir -p "$out"
cp -r dynamask lab pyproject.toml "$2" "$W/"
cd "$W" || exit 1
carried=$W/$(basename "$2")
export PYTHONPATH=$W:$W/lab:$W/site TRITON_CACHE_DIR=$W/triton HF_HUB_OFFLINE=1 OMP_NUM_THREADS=4 CUDA_VISIBLE_DEVICES=$gpu
# shellcheck disable=SC2016
setsid nohup timeout "$seconds" bash -c 'cp "$0"/*.json "$0"/*.jinja model/
    for wheel in "$0"/*.whl; do [ ! -e "$wheel" ] || (cd site && python3 -m zipfile -e "$wheel" .); done
    tar -C data -xf "$0/data.tar.xz"
    cat smollm2.part* >model.gguf && python3 "$0/join.py" model.gguf model
    python3 -m dynamask_lab.studies.ceiling.study --model model --data data --out "$1/ceiling-again.jsonl" \
        --seconds "$2" --rules dense newest query' "$carried" "$out" "$((seconds - 60))" \
    >"$out/log-ceiling.txt" 2>&1 </dev/null &
