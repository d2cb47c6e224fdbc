#!/usr/bin/env bash
# Controls of sizes `10M-tables` and `4M-tables` of study `scratch` on a GPU that is lent for minutes:
#
#   scratch_controls.sh begin FOLDER SECONDS OUT [SEEDS [CARD]]   # FOLDER: the tables of 4M; starts all that waits
#   scratch_controls.sh add FOLDER NAME                           # further tables, of 10M
#
# Processes start and compile while the corpora are made. The control of 10M (`scored, no choice`, of so many SEEDS) and
# what 4M lacks share the card; where the control would be late, the rows of 4M give it up.
set -u
W=${SCRATCH_WORK:-/tmp/scratch-controls}
NAMES="h i"
KNOWN=lab/results/scratch-tables.jsonl
export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
half="half rate," wide="one wide layer, w = N/16="

sweep() { # JOB CORPORA SIZE SEEDS WORKERS SIGNAL FILE FORMS...: rows that KNOWN has are not run again
    job=$1 corpora=$2 size=$3 seeds=$4 workers=$5 signal=$6 file=$7
    shift 7
    [ "$size" = 4M-tables ] && cp "$KNOWN" "$job.jsonl"
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$CARD python3 lab/scripts/scratch_gpu.py --wait --corpora "$corpora" --size "$size" \
        --state "state-$job" --out "$job.jsonl" --copy "$OUT_FOLDER/$size-$job.jsonl" --workers "$workers" \
        --first 1 --seeds $seeds --seconds "$(left)" "$signal" "$file" --only "$@" >"$OUT_FOLDER/log-$job.txt" 2>&1
}

corpus() { # CORES CORPORA SIZE FURTHER ARGUMENTS
    cores=$1 corpora=$2 size=$3
    shift 3
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=16 taskset -c "$cores" python3 lab/scripts/scratch_gpu.py \
        --corpora "$corpora" --size "$size" --state state --out none.jsonl --seconds 300 --corpus-only "$@"
    echo "$(date +%X) $corpora is there, $(left) s left: $(grep content "$corpora/tables/index.json")"
}

plan() { # SECONDS OUT SEEDS CARD: what `begin` leaves running; forms in the order of their worth
    end=$(($(date +%s) + $1)) OUT_FOLDER=$2 seeds=$3 CARD=$4
    left() { echo $((end - $(date +%s))); }
    corpus 40-57 corpora-4M 4M-tables --more in-4M/*.jsonl.xz &
    sweep no-choice corpora 10M-tables "$seeds" 3 --late late "=scored, no choice, $half $wide" &
    sweep rows corpora-4M 4M-tables "0 1 2" 3 --until late "late head windows" "=sliding + sinks, $half w = N/4=" \
        "=learned, $half slopes, even, w = N/16=" "=learned, $half slopes, even, w = N/4=" \
        "=learned, $half slopes, even, w = N/8=" "=paper, w = N/16=" "=paper, w = N=" "=dense, slopes, half rate=" &
    for name in $NAMES; do while [ ! -e "filled-$name" ]; do sleep 0.5; done; done
    echo "$(date +%X) tables are there"
    corpus 0-39 corpora 10M-tables --more in-4M/*.jsonl.xz ./*.jsonl.xz --characters 700e6 --parts 56 --held-out 0.02
    wait
}

case $1 in
begin)
    mkdir -p "$W/in-4M" "$4" && cp -r dynamask lab pyproject.toml "$W/" && cp "$2"/*.jsonl.xz "$W/in-4M/"
    cd "$W" || exit 1
    setsid nohup bash lab/scripts/scratch_controls.sh plan "$3" "$4" "${5:-0 1 2}" "${6:-0}" >"$4/log-plan.txt" 2>&1 </dev/null &
    ;;
add)
    mkdir -p "$W" && cp "$2"/*.jsonl.xz "$W/" && touch "$W/filled-$3"
    ;;
plan)
    cd "$W" || exit 1
    plan "$2" "$3" "$4" "$5"
    ;;
esac
