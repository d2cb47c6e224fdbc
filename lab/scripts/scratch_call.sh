#!/usr/bin/env bash
# Study `scratch` on a lent machine, in the background, over several calls:
#
#   scratch_call.sh start FOLDER SECONDS [arguments of scratch_gpu.py]   # FOLDER holds tables of documents, .jsonl.xz
#   scratch_call.sh corpus FOLDER CHARACTERS [CORES]                     # makes the corpus alone, on 8 cores or so many
#   scratch_call.sh collect                                              # copies lines and log to $OUT
#
# The job outlives the call and runs from a copy of the tree, which later calls do not change. Tables are made by
# scratch_tables.py. Files in lab/results and the arguments of `start` that give their rows:
#
#   scratch, -rates, -judged, -added   --size 4M, 4M-rates, 4M-judged, 4M-added
#   scratch-tables                     --size 4M-tables; tables others-0, others-1 and linux-0
#   scratch-tables-10M                 --size 10M-tables --characters 700e6 --parts 56 --held-out 0.02; all tables
set -u
W=${SCRATCH_WORK:-/tmp/scratch}
mkdir -p "$(dirname "${SCRATCH_LOG:-./x}")"
export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor PYTHONUNBUFFERED=1
set_up() {
    mkdir -p "$W" && cp -r dynamask lab pyproject.toml "$W/" && cp "$1"/*.jsonl.xz "$W/"
    cd "$W" || exit 1
}
case $1 in
corpus)
    set_up "$2"
    CUDA_VISIBLE_DEVICES='' setsid nohup nice -n 19 taskset -c "0-$((${4:-8} - 1))" python3 lab/scripts/scratch_gpu.py --corpus-only \
        --corpora corpora --more ./*.jsonl.xz --characters "$3" --state state --out scratch.jsonl --seconds 999 \
        >log-corpus.txt 2>&1 </dev/null &
    ;;
start)
    folder=$2 seconds=$3
    shift 3
    set_up "$folder"
    setsid nohup python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --state state \
        --out scratch.jsonl --seconds "$seconds" "$@" >"${SCRATCH_LOG:-log-scratch.txt}" 2>&1 </dev/null &
    ;;
collect)
    cp "$W/scratch.jsonl" "$W/log-scratch.txt" "$OUT/"
    tail -n 30 "$W/log-scratch.txt"
    ;;
esac
