#!/usr/bin/env bash
# Sweeps of recall, needles, long reading and a recurrent model on one lent GPU, in the background, over several calls:
#
#   evidence_call.sh start FOLDER SECONDS STUDY:SIZE:WORKERS[:SKIP]...   # FOLDER: tables of documents; - for none
#   evidence_call.sh collect FOLDER                               # copies lines and log to FOLDER
#
# Jobs run side by side. `again:cells:2` repeats cells of the exhibits. `scratch:reading:4` makes its corpus of the tables and the sources of the machine; `recurrent`
# reads the corpus `local` that `scratch_call.sh` makes, and makes it where it does not come.
set -u
W=${EVIDENCE_WORK:-/tmp/evidence} S=${SCRATCH_WORK:-/tmp/scratch}
go() { # study, size, workers, runs to leave out: one sweep, in the folder of the work
    case $1 in
    scratch)
        python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --characters 150e6 --state state \
            --out "$1-$2.jsonl" --seconds "$seconds" --size "$2" --workers "$3"
        ;;
    again)
        nice -n 5 python3 lab/scripts/again_gpu.py --out "$1-$2.jsonl" --seconds "$seconds" --more ./*.jsonl.xz
        ;;
    *)
        if [ "$1" = reading ]; then
            nice -n 10 python3 lab/scripts/local_corpus.py corpora --more ./*.jsonl.xz --name long --characters 300e6
        elif [ "$1" = recurrent ]; then
            for _ in $(seq 60); do
                [ -f "$S/corpora/local/index.json" ] && break
                sleep 2
            done
            [ -f "$S/corpora/local/index.json" ] ||
                python3 lab/scripts/local_corpus.py "$S/corpora" --more ./*.jsonl.xz
            export DYNAMASK_CORPORA=$S/corpora
        fi
        python3 lab/scripts/sweep_gpu.py "$1" "$2" --out "$1-$2.jsonl" --seconds "$((seconds - SECONDS))" \
            --workers "$3" --skip "$4"
        ;;
    esac
}
case $1 in
start)
    folder=$2 seconds=$3
    mkdir -p "$W" && cp -r dynamask lab pyproject.toml "$W/"
    [ "$folder" = - ] || cp "$folder"/*.jsonl.xz "$W/"
    cd "$W" || exit 1
    export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor OMP_NUM_THREADS=1
    export PYTHONUNBUFFERED=1 DYNAMASK_CORPORA=$W/corpora DYNAMASK_STATE=$W/state
    export -f go
    export S seconds
    for job in "${@:4}"; do
        IFS=: read -r study size workers skip <<<"$job"
        setsid nohup bash -c "go $study $size $workers ${skip:-0}" >"log-$study-$size.txt" 2>&1 </dev/null &
    done
    ;;
collect)
    mkdir -p "$2"
    cp "$W"/*-*.jsonl "$2/"
    for log in "$W"/log-*.txt; do
        grep -v -e it/s -e UserWarning -e warnings.warn "$log" | tail -n 200 >"$2/$(basename "$log")"
        echo "== $log" && tail -n 4 "$log"
    done
    ;;
esac
