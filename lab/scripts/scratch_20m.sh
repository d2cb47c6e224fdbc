#!/usr/bin/env bash
# Size `20M-tables` of study `scratch` on a machine of four GPUs that is lent for minutes:
#
#   scratch_20m.sh begin FOLDER NAME SECONDS OUT   # reads FOLDER, and starts what waits for the corpus
#   scratch_20m.sh add FOLDER NAME                 # reads a further FOLDER of tables and archives
#
# The corpus is made of the parts in PARTS and of the sources that the machine has (`parallel_corpus.py`), with the
# tokenizer in the first folder. Meanwhile the forms compile. Then every run is a process of its own.
set -u
W=${SCRATCH_WORK:-/tmp/scratch20}
PARTS="e f g b c" PART_PROCESSES=28
. "$(dirname "$0")/corpus_parts.sh"
export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=4
half="half rate," wide="one wide layer, w = N/16="
dense="=dense, half rate=" scored="=scored, $half $wide" newest="=sliding + sinks, $half $wide"

run() { # CARD SEED SECONDS NAME FORM [FURTHER ARGUMENTS]: one run, in the background
    card=$1 seed=$2 left=$3 name=$4 form=$5
    shift 5
    CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --corpora corpora --size 20M-tables --seeds "$seed" \
        --only "$form" --state "state-$name" --out "$name.jsonl" --copy "$OUT_FOLDER/20M-tables-$name.jsonl" \
        --workers 1 --seconds "$left" "$@" >>"$OUT_FOLDER/log-$name.txt" 2>&1 &
}

wait_for_end() { # PROCESSES
    for each in "$@"; do while kill -0 "$each" 2>/dev/null; do sleep 0.5; done; done
}

sweep() { # SECONDS OUT: what `begin` leaves running
    end=$(($(date +%s) + $1)) OUT_FOLDER=$2
    left() { echo $((end - $(date +%s))); }
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 python3 lab/scripts/parallel_corpus.py join chunks corpora/tables-400M \
        $PARTS local --tokenizer tokenizer --most 404e6 >"$OUT_FOLDER/log-corpus.txt" 2>&1 &
    corpus=$!
    # The compiler's results are kept for the runs.
    CUDA_VISIBLE_DEVICES=0 timeout 100 python3 lab/scripts/scratch_pilot.py --more "$W"/in-*/linux.jsonl.xz \
        --characters 6e6 --out "$OUT_FOLDER/pilot-20M.jsonl" --size 20M-tables \
        --only "20M-tables$dense" "20M-tables$scored" "20M-tables$newest" --most 1 >"$OUT_FOLDER/log-pilot-20M.txt" 2>&1 &
    wait $corpus
    echo "$(date +%X) the corpus is there, $(left) s left"
    plan
    wait
}

plan() { # nine runs, a seed of two forms on each of three GPUs; then what 4M-tables lacks
    for card in 0 1 2; do
        run "$card" "$card" "$(left)" "dense-$card" "$dense"
        first=$!
        run "$card" "$card" "$(left)" "scored-$card" "$scored"
        rest "$card" $first $! &
        run 3 "$card" "$(left)" "newest-$card" "$newest"
    done
    sleep 45
    CUDA_VISIBLE_DEVICES='' nice -n 19 taskset -c 0-11 python3 lab/scripts/scratch_gpu.py --corpora corpora-4M \
        --more in-b/others-0.jsonl.xz in-b/others-1.jsonl.xz in-c/linux-0.jsonl.xz --state state --out none.jsonl \
        --seconds 300 --corpus-only --size 4M-tables
}

rest() { # CARD PROCESSES: once these have ended, where time is left
    card=$1
    shift
    wait_for_end "$@"
    [ "$(left)" -gt 50 ] && [ -e corpora-4M/tables/index.json ] || return
    case $card in
    0) set -- "=mla, quarter rate=" "=mla=" ;;
    1) set -- "=dense, slopes and scores" "=dense, slopes, half" ;;
    2) set -- "=learned, $half slopes, one wide" "late head windows" ;;
    esac
    CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --corpora corpora-4M --size 4M-tables --workers 3 \
        --first 1 --state "state-4M-$card" --out "4M-$card.jsonl" --copy "$OUT_FOLDER/4M-tables-$card.jsonl" \
        --seconds "$(left)" --only "$@" >"$OUT_FOLDER/log-4M-$card.txt" 2>&1
}

case $1 in
begin)
    mkdir -p "$5"
    set_up "$2"
    read_folder "$2" "$3"
    part local --installed
    mkdir -p corpora
    setsid nohup bash lab/scripts/scratch_20m.sh sweep "$4" "$5" >"$5/log-sweep.txt" 2>&1 </dev/null &
    ;;
add)
    mkdir -p "$W"
    read_folder "$2" "$3"
    ;;
sweep)
    cd "$W" || exit 1
    sweep "$2" "$3"
    ;;
esac
