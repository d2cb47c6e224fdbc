#!/usr/bin/env bash
# Controls of sizes `10M-tables` and `4M-tables` of study `scratch` on two GPUs that are lent for minutes:
#
#   scratch_controls.sh begin FOLDER SECONDS OUT [SEEDS]   # FOLDER: the tables of 4M; starts all that waits for corpora
#   scratch_controls.sh add FOLDER NAME                    # further tables, of 10M
#
# GPU 0 trains the control of 10M, and both GPUs what 4M lacks. Processes start and compile while the corpora are made.
# SEEDS: of `scored, no choice` at 10M.
set -u
W=${SCRATCH_WORK:-/tmp/scratch-controls}
NAMES="h i"
KNOWN=lab/results/scratch-tables.jsonl
export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
half="half rate," wide="one wide layer, w = N/16="

sweep() { # CARD JOB CORPORA SIZE SEEDS WORKERS FORMS...: rows that KNOWN has are not run again
    card=$1 job=$2 corpora=$3 size=$4 seeds=$5 workers=$6
    shift 6
    [ "$size" = 4M-tables ] && cp "$KNOWN" "$job.jsonl"
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --wait --corpora "$corpora" --size "$size" \
        --state "state-$job" --out "$job.jsonl" --copy "$OUT_FOLDER/$size-$job.jsonl" --workers "$workers" \
        --first 1 --seeds $seeds --seconds "$(left)" --only "$@" >"$OUT_FOLDER/log-$job.txt" 2>&1
}

corpus() { # CORES CORPORA SIZE FURTHER ARGUMENTS
    cores=$1 corpora=$2 size=$3
    shift 3
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=16 taskset -c "$cores" python3 lab/scripts/scratch_gpu.py \
        --corpora "$corpora" --size "$size" --state state --out none.jsonl --seconds 300 --corpus-only "$@"
    echo "$(date +%X) $corpora is there, $(left) s left: $(grep content "$corpora/tables/index.json")"
}

plan() { # SECONDS OUT SEEDS: what `begin` leaves running; forms in the order of their worth
    end=$(($(date +%s) + $1)) OUT_FOLDER=$2 seeds=$3
    left() { echo $((end - $(date +%s))); }
    corpus 40-57 corpora-4M 4M-tables --more in-4M/*.jsonl.xz &
    sweep 0 no-choice corpora 10M-tables "$seeds" 3 "=scored, no choice, $half $wide" &
    sweep 1 nsa corpora-4M 4M-tables "0 1 2" 3 "=nsa, 5 free" &
    sweep 1 rows-1 corpora-4M 4M-tables "0 1 2" 3 "=learned, $half slopes, $wide" "=sliding + sinks, $half $wide" \
        "=scored, $half $wide" "=scored, no choice, $half $wide" "=sliding + sinks, $half w = N/16=" "=paper, w = N/8=" \
        "=sliding + sinks, $half w = N/4=" "=learned, $half slopes, even, w = N/4=" "late head windows" \
        "=dense, slopes, half rate=" &
    sweep 0 rows-0 corpora-4M 4M-tables "0 1 2" 2 "=sliding + sinks, $half w = N/2=" \
        "=learned, $half slopes, even, w = N/2=" "=sliding + sinks, $half w = N/8=" \
        "=learned, $half slopes, even, w = N/8=" "=learned, $half slopes, even, w = N/16=" "=paper, w = N/16=" \
        "=paper, w = N=" &
    for name in $NAMES; do while [ ! -e "filled-$name" ]; do sleep 0.5; done; done
    echo "$(date +%X) tables are there"
    corpus 0-39 corpora 10M-tables --more in-4M/*.jsonl.xz ./*.jsonl.xz --characters 700e6 --parts 56 --held-out 0.02
    wait
}

case $1 in
begin)
    mkdir -p "$W/in-4M" "$4" && cp -r dynamask lab pyproject.toml "$W/" && cp "$2"/*.jsonl.xz "$W/in-4M/"
    cd "$W" || exit 1
    setsid nohup bash lab/scripts/scratch_controls.sh plan "$3" "$4" "${5:-0 1 2}" >"$4/log-plan.txt" 2>&1 </dev/null &
    ;;
add)
    mkdir -p "$W" && cp "$2"/*.jsonl.xz "$W/" && touch "$W/filled-$3"
    ;;
plan)
    cd "$W" || exit 1
    plan "$2" "$3" "$4"
    ;;
esac
