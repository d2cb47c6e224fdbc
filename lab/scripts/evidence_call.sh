#!/usr/bin/env bash
# Sweeps of recall, needles, long reading, the leak and a recurrent model on one lent GPU, in the background:
#
#   evidence_call.sh start FOLDER SECONDS STUDY:SIZE:WORKERS[:SKIP[:COUNT[:FROM[:TO]]]]...
#                                                                 # FOLDER: tables of documents; - for none
#                                                                 # joined by commas: one after the other
#   evidence_call.sh queues FOLDER SECONDS CARD[:WAIT]...         # the jobs of EVIDENCE_JOBS in one order, see queue_gpu.py
#   evidence_call.sh collect FOLDER                               # copies lines and log to FOLDER
#
# Jobs run side by side, from EVIDENCE_WAIT (or FROM) seconds after the call to SECONDS (or TO), without the runs that
# lab/results has, and write lines and logs into EVIDENCE_OUT. `again:cells:2` repeats all cells of the exhibits,
# `again:loss:1` one, `ceiling:512:1` a part of the ceiling once the study `conversion` has set its model up, and
# `corpus:local:1` makes the corpus of the leak alone. Corpora are made of the tables and the sources of the machine.
# Queues keep EVIDENCE_WORKERS processes on each card from WAIT seconds on, and read what EVIDENCE_TABLES holds. Where
# EVIDENCE_AFTER is set, card 2 also waits for the file $EVIDENCE_AFTER-2.
set -u
# What decides first: recall, a lever for length at a time with its control, the leak, long reading, a cell again.
JOBS=${EVIDENCE_JOBS:-mqar:patient:0:2@140 mqar:patient-dense@60 needle:levers+:0:9@230 ablation:leak-decide@120
    reading:4M+:14:1@140~af6389f9 reading:4M+:21:3@190~af6389f9 mqar:patient:2:3@140 needle:levers+:9:6@230
    ablation:leak-rest@120 lab/results/scratch-tables.jsonl:cae43da43e956824@120~388a329a needle:levers+:15:3@190
    mqar:widths:0:12@100 needle:levers+:18:12@220 mqar:widths:12:6@100}
W=${EVIDENCE_WORK:-/tmp/evidence} O=${EVIDENCE_OUT:-${EVIDENCE_WORK:-/tmp/evidence}}
local_corpus() { # the corpus `local` of size `4M-rates` and of the leak's first runs, of whoever makes it first
    (
        flock 9
        [ -f corpora/local/index.json ] ||
            nice -n 10 python3 lab/scripts/local_corpus.py corpora --more ./*.jsonl.xz --characters 155e6
    ) 9>local.lock
}
long_corpus() { # whole folders as documents
    nice -n 10 python3 lab/scripts/local_corpus.py corpora --more ./*.jsonl.xz --name long --characters 300e6
}
larger_corpus() { # the corpus `local` of the first sweep from scratch, in a folder of its own
    nice -n 10 python3 lab/scripts/local_corpus.py every --more ./*.jsonl.xz --characters 300e6
    export DYNAMASK_CORPORA=$W/every
}
go() { # study, size, workers, runs to leave out, runs, from, to: one sweep, in the folder of the work
    shopt -s nullglob
    local from=${6:-$wait} to=${7:-$seconds}
    while ((SECONDS < from - 90)); do sleep 1; done
    case $1 in
    reading)
        long_corpus
        content=$(python3 -c "from dynamask_lab.language.data import token_streams; print(token_streams('long', 0.5).content)")
        # Another build than that of the lines there are: dense attention again, to compare with.
        grep -q "$content" lab/results/reading.jsonl || set -- reading 4M-equal "$3" 0 1000
        echo "$content: $*"
        ;;
    corpus) local_corpus && return 0 ;;
    recurrent | ablation) [[ $2 == *smoke ]] || local_corpus ;;
    again) if [ "$2" = leak ]; then local_corpus; else larger_corpus; fi ;;
    esac
    # Whatever was prepared meanwhile: the GPU belongs to others until then.
    while ((SECONDS < from)); do sleep 1; done
    ((to - SECONDS > 20)) || return 0
    case $1 in
    scratch)
        python3 lab/scripts/scratch_gpu.py --corpora corpora --more ./*.jsonl.xz --characters 150e6 --state state \
            --out "$O/$1-$2.jsonl" --seconds "$((to - SECONDS))" --size "$2" --workers "$3"
        ;;
    again)
        cells=$2
        [ "$2" = cells ] && cells=
        # shellcheck disable=SC2086  # no name where all cells are meant
        nice -n 5 python3 lab/scripts/again_gpu.py $cells --out "$O/$1-$2.jsonl" --seconds "$((to - SECONDS))" \
            --more ./*.jsonl.xz
        ;;
    ceiling)
        while ((SECONDS < to)); do
            for C in /tmp/conversion*/; do [ -f "$C/ready" ] && [ -f "$C/models/smollm2-135m-instruct/config.json" ] && break 2; done
            sleep 3
        done
        python3 -m dynamask_lab.studies.ceiling.study --model "$C/models/smollm2-135m-instruct" --data "$C/data" \
            --out "$O/$1-$2.jsonl" --seconds 60 --rules dense newest query
        ;;
    *)
        known=(lab/results/"$1"*.jsonl)
        [ "$1" = reading ] && known=() # lines of another build do not stand for those of this one
        timeout $((to - SECONDS + 20)) python3 lab/scripts/sweep_gpu.py "$1" "$2" --out "$O/$1-$2.jsonl" --seconds "$((to - SECONDS))" \
            --workers "$3" --skip "$4" --count "$5" --known "${known[@]}"
        ;;
    esac
}
set_up() { # FOLDER: a copy of the tree, and where things lie
    mkdir -p "$W" "$O" && cp -r dynamask lab pyproject.toml "$W/"
    [ "$1" = - ] || cp "$1"/*.jsonl.xz "$W/"
    cd "$W" || exit 1
    export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor OMP_NUM_THREADS=1
    export PYTHONUNBUFFERED=1 DYNAMASK_CORPORA=$W/corpora DYNAMASK_STATE=$W/state HF_HUB_OFFLINE=1
}
case $1 in
queues)
    folder=$2 seconds=$3
    shift 3
    set_up "$folder"
    mkdir -p corpora
    export -f local_corpus long_corpus
    export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-3}
    if [ "$folder" != - ]; then
        for corpus in local_corpus long_corpus; do
            setsid nohup bash -c "CUDA_VISIBLE_DEVICES= timeout $seconds bash -c $corpus" >"$O/log-$corpus.txt" 2>&1 </dev/null &
        done
    fi
    # Tables that another engineer's call makes, once they are whole.
    # shellcheck disable=SC2016
    [ -z "${EVIDENCE_TABLES:-}" ] || setsid nohup bash -c 'while ((SECONDS < $0)); do
        [ -e "$1/index.json" ] && ln -sfn "$1" corpora/tables && break; sleep 2; done' "$seconds" "$EVIDENCE_TABLES" \
        >/dev/null 2>&1 </dev/null &
    prepare=${EVIDENCE_PREPARE:-6}
    for card in "$@"; do
        IFS=: read -r name wait <<<"$card"
        # shellcheck disable=SC2086  # several jobs
        CUDA_VISIBLE_DEVICES=$name setsid nohup python3 lab/scripts/queue_gpu.py --out "$O" --name "$name" \
            --claims "$W/claims" --seconds "$seconds" --wait "${wait:-0}" \
            ${EVIDENCE_AFTER:+--after "$EVIDENCE_AFTER-$name"} --workers "${EVIDENCE_WORKERS:-7}" \
            --known lab/results/*.jsonl --prepare "$prepare" -- $JOBS >"$O/log-queue-$name.txt" 2>&1 </dev/null &
        prepare=0
    done
    ;;
start)
    folder=$2 seconds=$3 wait=${EVIDENCE_WAIT:-0}
    set_up "$folder"
    export -f go local_corpus long_corpus larger_corpus
    export W O seconds wait
    for job in "${@:4}"; do
        first=${job%%,*}
        # shellcheck disable=SC2016  # expanded by the job
        setsid nohup bash -c 'for part in ${1//,/ }; do
            IFS=: read -r study size workers skip count from to <<<"$part"
            go "$study" "$size" "$workers" "${skip:-0}" "${count:-1000}" "$from" "$to"
        done' job "$job" >"$O/log-$(cut -d: -f1,2 --output-delimiter=- <<<"$first").txt" 2>&1 </dev/null &
    done
    ;;
collect)
    mkdir -p "$2"
    cp "$O"/*-*.jsonl "$2/"  # queue-CARD-WORKER.jsonl, or STUDY-SIZE.jsonl
    for log in "$O"/log-*.txt; do
        grep -v -e it/s -e UserWarning -e warnings.warn "$log" | tail -n 200 >"$2/$(basename "$log")"
        echo "== $log" && tail -n 4 "$log"
    done
    ;;
esac
