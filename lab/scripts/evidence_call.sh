#!/usr/bin/env bash
# Recall, needles, long reading and a recurrent model on one lent GPU, in the background, over several calls:
#
#   evidence_call.sh start FOLDER SECONDS   # FOLDER: tables of documents, .jsonl.xz, and wheels of fla
#   evidence_call.sh collect                # copies lines and log to $OUT
#
# The corpus `local` is that of `scratch_call.sh start`, which is waited for, or made here.
set -u
W=${EVIDENCE_WORK:-/tmp/evidence} S=${SCRATCH_WORK:-/tmp/scratch}
case $1 in
start)
    folder=$2 seconds=$3
    mkdir -p "$W/site" && cp -r dynamask lab pyproject.toml "$W/" && cp "$folder"/*.jsonl.xz "$W/"
    for wheel in "$folder"/*.whl; do python3 -m zipfile -e "$wheel" "$W/site"; done
    cd "$W" || exit 1
    export PYTHONPATH=$W:$W/lab:$W/site TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor
    export PYTHONUNBUFFERED=1 DYNAMASK_CORPORA=$W/corpora DYNAMASK_STATE=$W/state
    run() { # name, sweep, workers [, further arguments]
        setsid nohup python3 lab/scripts/sweep_gpu.py "$1" "$2" --out "evidence-$1.jsonl" --seconds "$seconds" \
            --workers "${@:3}" >"log-$1.txt" 2>&1 </dev/null &
    }
    run needle seeds 5
    run mqar published 5
    setsid nohup python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --characters 150e6 \
        --state state --out evidence-scratch.jsonl --seconds "$seconds" --size reading --workers 4 \
        >log-reading.txt 2>&1 </dev/null &
    (
        for _ in $(seq 60); do
            [ -f "$S/corpora/local/index.json" ] && break
            sleep 2
        done
        [ -f "$S/corpora/local/index.json" ] || python3 lab/scripts/local_corpus.py "$S/corpora" --more ./*.jsonl.xz
        export DYNAMASK_CORPORA=$S/corpora
        seconds=$((seconds - SECONDS))
        run recurrent probe 4
    ) >log-wait.txt 2>&1 </dev/null &
    ;;
collect)
    cat "$W"/log-*.txt | grep -v -e it/s -e UserWarning -e warnings.warn >"$OUT/log-evidence.txt"
    cp "$W"/evidence-*.jsonl "$OUT/"
    for log in "$W"/log-*.txt; do echo "== $log" && tail -n 4 "$log"; done
    ;;
esac
