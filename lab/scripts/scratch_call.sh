#!/usr/bin/env bash
# Study `scratch` on a lent machine, in the background, over several calls:
#
#   scratch_call.sh start FOLDER SECONDS [arguments of scratch_gpu.py]   # FOLDER holds tables of documents, .jsonl.xz
#   scratch_call.sh corpus FOLDER CHARACTERS [CORES]                     # makes the corpus alone, on 8 cores or so many
#   scratch_call.sh beside FIRST SECONDS [arguments of scratch_gpu.py]   # waits for the corpus of the job in FIRST
#   scratch_call.sh fill FOLDER NAME                                     # more tables for a job that waits for NAME
#   scratch_call.sh tables FOLDER NAMES SECONDS [arguments]              # `start`, once the tables of "NAMES" are there
#   scratch_call.sh pilot FOLDER SECONDS OUT [arguments]                  # `start`, after a pilot of size 10M-tables
#   scratch_call.sh cards FOLDER NAMES SECONDS OUT SIZE                   # a seed per GPU, once the tables of NAMES are there
#   scratch_call.sh seeds FOLDER NAMES SECONDS LATER OUT                   # seeds 3 to 5 of 10M, and what 4M-tables lacks
#   scratch_call.sh last FOLDER SECONDS ROWS OUT                          # what 4M-tables still lacks
#   scratch_call.sh collect                                              # copies lines and log to $OUT
#
# The job outlives the call and runs from a copy of the tree, which later calls do not change.
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
fill)
    mkdir -p "$W" && cp "$2"/*.jsonl.xz "$W/" && touch "$W/filled-$3"
    ;;
tables)
    folder=$2 names=$3 seconds=$4
    shift 4
    set_up "$folder"
    # shellcheck disable=SC2016
    setsid nohup bash -c 'end=$(($(date +%s) + $2)); for name in $1; do
        while [ ! -e "filled-$name" ]; do sleep 1; done; done; shift 2
        exec python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --state state --out scratch.jsonl \
            --seconds $((end - $(date +%s))) "$@"' wait "$names" "$seconds" "$@" \
        >"${SCRATCH_LOG:-log-scratch.txt}" 2>&1 </dev/null &
    ;;
pilot)
    folder=$2 seconds=$3 out=$4
    shift 4
    set_up "$folder"
    mkdir -p "$out"
    # shellcheck disable=SC2016
    setsid nohup bash -c 'end=$(($(date +%s) + $1)) out=$2; shift 2
        CUDA_VISIBLE_DEVICES= python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --state state \
            --out scratch.jsonl --seconds 200 --corpus-only "$@" &
        OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=4 timeout 100 python3 lab/scripts/scratch_pilot.py \
            --more ./*.jsonl.xz --out "$out/pilot.jsonl" >"$out/log-pilot.txt" 2>&1
        wait
        exec python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --state state --out scratch.jsonl \
            --seconds $((end - $(date +%s))) "$@"' pilot "$seconds" "$out" "$@" \
        >"${SCRATCH_LOG:-log-scratch.txt}" 2>&1 </dev/null &
    ;;
seeds)
    # Seeds 3 to 5 of 10M-tables on GPU 1, what 4M-tables lacks on GPU 0 after LATER seconds, then on GPU 1.
    folder=$2 names=$3 seconds=$4 later=$5 out=$6
    set_up "$folder"
    mkdir -p "$out"
    export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=4
    # shellcheck disable=SC2016
    setsid nohup bash -c 'names=$0 began=$(date +%s) end=$(($(date +%s) + $1)) later=$2 out=$3
        left() { echo $((end - $(date +%s))); }
        sweep() { # CARD JOB CORPORA SIZE SEEDS WORKERS FORMS...
            card=$1 job=$2 corpora=$3 size=$4 seeds=$5 workers=$6
            shift 6
            CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --corpora "$corpora" --size "$size" \
                --state "state-$job" --out "$job.jsonl" --copy "$out/$size-$job.jsonl" --workers "$workers" --first 3 \
                --seeds $seeds --seconds "$(left)" --only "$@" >"$out/log-$job.txt" 2>&1
        }
        for name in $names; do while [ ! -e "filled-$name" ]; do sleep 0.5; done; done
        echo "$(date +%X) tables are there"
        pilot() { # NAME SIZE FORMS...
            job=$1 size=$2
            shift 2
            CUDA_VISIBLE_DEVICES=1 taskset -c 20-31 timeout 150 python3 lab/scripts/scratch_pilot.py --most 3 --size "$size" \
                --more linux-3.jsonl.xz --folder "$job" --out "$out/$job.jsonl" --only "$@" >"$out/log-$job.txt" 2>&1 &
        }
        pilot pilot-20M 20M-tables "=dense, half rate=" "=scored, half rate," "=sliding + sinks, half rate, one wide"
        pilot pilot-nsa 4M-tables "=nsa, 5 free"
        OMP_NUM_THREADS=16 CUDA_VISIBLE_DEVICES= taskset -c 0-19 python3 lab/scripts/scratch_gpu.py --corpora corpora \
            --more ./*.jsonl.xz --characters 700e6 --parts 56 --held-out 0.02 --state state --out none.jsonl \
            --seconds 300 --corpus-only --size 10M-tables
        echo "$(date +%X) the corpus is there"
        sweep 1 more corpora 10M-tables "3 4 5" 6 "" &
        more=$!
        CUDA_VISIBLE_DEVICES= nice -n 19 taskset -c 0-11 python3 lab/scripts/scratch_gpu.py --corpora corpora-4M \
            --more others-0.jsonl.xz others-1.jsonl.xz linux-0.jsonl.xz --state state --out none.jsonl --seconds 300 \
            --corpus-only --size 4M-tables
        echo "$(date +%X) the small corpus is there"
        (while [ $(($(date +%s) - began)) -lt "$later" ]; do sleep 1; done
            sweep 0 nsa corpora-4M 4M-tables "0 1 2" 3 "=nsa, 5 free" &
            sweep 0 rows corpora-4M 4M-tables "0 1 2" 2 "=paper, w = N/2=" "=random," "=dense, slopes and scores"
            wait) &
        wait $more
        [ "$(left)" -gt 70 ] && sweep 1 rates corpora-4M 4M-tables "0 1 2" 6 "=mla, quarter rate=" "=mla="
        wait' "$names" "$seconds" "$later" "$out" >"$out/log-seeds.txt" 2>&1 </dev/null &
    ;;
last)
    # What 4M-tables still lacks, on GPU 1: nsa at once, other rows after ROWS seconds.
    folder=$2 seconds=$3 rows=$4 out=$5
    set_up "$folder"
    mkdir -p "$out"
    export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
    # shellcheck disable=SC2016
    setsid nohup bash -c 'began=$(date +%s) end=$(($(date +%s) + $0)) rows=$1 out=$2
        sweep() { # JOB SEEDS WORKERS FURTHER ARGUMENTS
            job=$1 seeds=$2 workers=$3
            shift 3
            CUDA_VISIBLE_DEVICES=1 taskset -c 0-19 python3 lab/scripts/scratch_gpu.py --corpora corpora --size 4M-tables \
                --state "state-$job" --out "$job.jsonl" --copy "$out/4M-tables-$job.jsonl" --workers "$workers" \
                --first 3 --seeds $seeds --seconds $((end - $(date +%s))) "$@" >"$out/log-$job.txt" 2>&1
        }
        CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=8 taskset -c 0-19 python3 lab/scripts/scratch_gpu.py --corpora corpora \
            --more ./*.jsonl.xz --state state --out none.jsonl --seconds 200 --corpus-only --size 4M-tables >"$out/log-corpus.txt" 2>&1
        until_second() { rest=$((began + $1 - $(date +%s))); [ "$rest" -gt 0 ] && sleep "$rest"; }
        sweep nsa 0 1 --late late --only "=nsa, 5 free" &
        nsa=$!
        (until_second $((rows - 95)); sweep random "1 2" 2 --late late --only "=random,") &
        (until_second "$rows"; sweep half "1 2" 2 --late late --only "=paper, w = N/2=") &
        wait $nsa
        [ $((end - $(date +%s))) -gt 135 ] && sweep scores "0 1 2" 3 --until late --only "=dense, slopes and scores"
        wait' "$seconds" "$rows" "$out" >"$out/log-last.txt" 2>&1 </dev/null &
    ;;
cards)
    folder=$2 names=$3 seconds=$4 out=$5 size=$6
    set_up "$folder"
    mkdir -p "$out"
    export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=4
    # Forms at the end of the order give up their time where the others would be late.
    # shellcheck disable=SC2016
    setsid nohup bash -c 'names=$0 end=$(($(date +%s) + $1)) out=$2 size=$3
        for name in $names; do while [ ! -e "filled-$name" ]; do sleep 0.5; done; done
        echo "$(date +%X) tables are there"
        OMP_NUM_THREADS=16 CUDA_VISIBLE_DEVICES= python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz \
            --characters 700e6 --parts 56 --held-out 0.02 --state state --out none.jsonl --seconds 300 --corpus-only --size "$size"
        echo "$(date +%X) the corpus is there"
        sweep() { # CARD JOB LATE-OR-UNTIL... -- FORMS...
            card=$1 job=$2
            shift 2
            CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --corpora corpora --size "$size" --seeds "$card" \
                --state "state-$card-$job" --out "$card-$job.jsonl" --copy "$out/$size-$card-$job.jsonl" --workers 3 \
                --first 9 --seconds $((end - $(date +%s))) "$@" >"$out/log-$card-$job.txt" 2>&1 &
            running="$running $!"
        }
        rest() { # CARD FORMS...: what 4M-tables lacks, once the sweeps of the card have ended
            card=$1
            shift
            for each in $running; do while kill -0 "$each" 2>/dev/null; do sleep 1; done; done
            left=$((end - $(date +%s)))
            if [ "$left" -gt 60 ] && [ -e corpora-4M/tables/index.json ]; then
                CUDA_VISIBLE_DEVICES=$card python3 lab/scripts/scratch_gpu.py --corpora corpora-4M --size 4M-tables \
                    --seeds "$card" --state "state-$card-4M" --out "$card-4M.jsonl" --copy "$out/4M-tables-$card.jsonl" \
                    --workers 6 --first 99 --seconds "$left" --only "$@" >"$out/log-$card-4M.txt" 2>&1
            fi
        }
        half="half rate," wide="one wide layer, w = N/16="
        for card in 0 1 2; do
            running=
            sweep $card a --late "late-$card-1" "late-$card-2" \
                --only "=dense, half rate=" "=scored, $half $wide" "=sliding + sinks, $half $wide"
            sweep $card b --until "late-$card-2" --only "=dense, slopes, half rate="
            sweep $card c --until "late-$card-1" --only "=learned, $half slopes, $wide"
            missing=
            [ $card = 2 ] && missing="=random,|=sliding + sinks, $half one wide|=paper, w = N/8="
            IFS="|"
            set -- $missing "=learned, $half slopes, one wide" "=paper, w = N/2=" "=scored, $half one wide" "=dense, slopes"
            unset IFS
            rest $card "$@" &
        done
        sleep 60
        CUDA_VISIBLE_DEVICES= nice -n 19 taskset -c 0-11 python3 lab/scripts/scratch_gpu.py --corpora corpora-4M \
            --more others-0.jsonl.xz others-1.jsonl.xz linux-0.jsonl.xz --state state --out none.jsonl --seconds 300 \
            --corpus-only --size 4M-tables
        wait' "$names" "$seconds" "$out" "$size" >"$out/log-cards.txt" 2>&1 </dev/null &
    ;;
beside)
    first=$2 seconds=$3
    shift 3
    mkdir -p "$W" && cp -r dynamask lab pyproject.toml "$W/"
    cd "$W" && ln -sfn "$first/corpora" corpora
    setsid nohup bash -c 'while [ ! -e corpora/local/index.json ] && [ ! -e corpora/tables/index.json ]; do sleep 1; done; exec python3 "$@"' wait \
        lab/scripts/scratch_gpu.py --corpora corpora --state state --out scratch.jsonl --seconds "$seconds" "$@" \
        >"${SCRATCH_LOG:-log-scratch.txt}" 2>&1 </dev/null &
    ;;
collect)
    cp "$W/scratch.jsonl" "$W/log-scratch.txt" "$OUT/"
    tail -n 30 "$W/log-scratch.txt"
    ;;
esac
