#!/usr/bin/env bash
# Size `60M-tables` of study `scratch` on a machine of four GPUs that is lent for minutes:
#
#   scratch_60m.sh begin FOLDER NAME SECONDS OUT "NAMES"   # reads FOLDER; starts what waits for the parts NAMES
#   scratch_60m.sh add FOLDER NAME                         # reads a further FOLDER of tables and archives
#   scratch_60m.sh pilot FOLDER CARDS OUT                  # speeds on two cards, "0,1", on the small corpus of FOLDER
#
# The first folder holds the tokenizer and `warm.jsonl.xz`, a small corpus on which every form compiles and records while
# the large one is made of the parts and of the sources that the machine has (`parallel_corpus.py`). Training starts when
# the corpus is whole: its order is one permutation of all blocks. `dense` and `scored` share two cards each. Then size
# `10M-choice` takes a card per form, and files, such as free-2, give cards to whoever waits for them; with
# SCRATCH_NEXT=newest the newest keys at 60M take all four. Where cards cannot share a run, three forms of `45M-tables`
# train on a card each; that size is also taken where the corpus holds too few tokens. With SCRATCH_CARDS=2 the machine has
# two cards: `dense` and `scored` of `45M-tables` train on one each, then the two forms of `10M-choice`.
set -u
W=${SCRATCH_WORK:-/tmp/scratch60}
export PYTHONPATH=$W:$W/lab TRITON_CACHE_DIR=$W/triton TORCHINDUCTOR_CACHE_DIR=$W/inductor PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=4 TORCHINDUCTOR_COMPILE_THREADS=8 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
dense="=dense, half rate=" scored="=scored, half rate, one wide" newest="=sliding + sinks, half rate, one wide"
without="=scored, no choice, half rate, one wide"
size=60M-tables next=${SCRATCH_NEXT:-choice} most=1.1985e9 PART_PROCESSES=24
[ "${SCRATCH_CARDS:-4}" = 2 ] && size=45M-tables most=0.886e9
. "$(dirname "$0")/corpus_parts.sh"

warm_corpus() { # TABLE: of some million tokens, under the name of the large one
    for step in "part chunks-warm w --processes 8 --tables $1" "join chunks-warm corpora-warm/tables-1200M w --held-out 0.05"; do
        # shellcheck disable=SC2086
        CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 python3 lab/scripts/parallel_corpus.py $step --tokenizer tokenizer
    done
}

run() { # CARDS SECONDS NAME FORM CORPORA OUT [FURTHER ARGUMENTS]: one run that the cards share
    cards=$1 seconds=$2 name=$3 form=$4 corpora=$5 out=$6
    shift 6
    [ "$seconds" -gt 40 ] || return
    count=$(($(tr -cd , <<<"$cards" | wc -c) + 1))
    CUDA_VISIBLE_DEVICES=$cards DYNAMASK_PROCESSES=$count timeout -k 5 $((seconds + 30)) \
        python3 lab/scripts/scratch_gpu.py --corpora "$corpora" --size "$size" --only "$form" --state "state-$name" \
        --out "$name.jsonl" --copy "$out/$size-$name.jsonl" --workers 1 --seconds "$seconds" "$@" \
        >>"$out/log-$name.txt" 2>&1
}

sweep() { # SECONDS OUT NAMES: what `begin` leaves running
    end=$(($(date +%s) + $1)) out=$2 names=$3
    left() { echo $((end - $(date +%s))); }
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 python3 lab/scripts/parallel_corpus.py join chunks corpora/tables-1200M \
        $names local --tokenizer tokenizer --most $most >"$out/log-corpus.txt" 2>&1 &
    corpus=$!
    warm_corpus in-*/warm.jsonl.xz >"$out/log-warm-corpus.txt" 2>&1
    # The compiler's results are kept for the runs.
    if [ "$size" = 60M-tables ]; then
        warm 0,1 dense "$dense" &
        warm 2,3 scored "$scored" &
    else
        warm 0 dense "$dense" &
        warm 1 scored "$scored" &
    fi
    if [ "$next" = newest ]; then
        warm 0,1,2,3 newest "$newest" &
    else
        choice 0 scored "$scored" 200 corpora-warm --steps 14 &
        choice 1 no-choice "$without" 200 corpora-warm --steps 14 &
    fi
    wait $corpus
    echo "$(date +%X) the corpus is there, $(left) s left"
    wait
    echo "$(date +%X) $(cat warm-*.jsonl | wc -l) warm runs have ended, $(left) s left"
    if [ "${SCRATCH_CARDS:-4}" = 2 ]; then
        (
            run 0 "$(left)" dense "$dense" corpora "$out"
            choose 0 scored "$scored"
        ) &
        run 1 "$(left)" scored "$scored" corpora "$out"
        choose 1 no-choice "$without"
        wait
        echo "$(date +%X) end"
        return
    fi
    tokens=$(python3 -c "import json; print(json.load(open('corpora/tables-1200M/index.json'))['splits']['train']['tokens'])")
    [ "$tokens" -gt 1197342720 ] || size=45M-tables # no token is read twice
    if [ -s warm-dense.jsonl ] && [ -s warm-scored.jsonl ]; then
        (
            run 0,1 "$(left)" dense "$dense" corpora "$out"
            echo "$(date +%X) dense has ended, $(left) s left"
            [ "$next" = newest ] || choices
        ) &
        dense_run=$!
        run 2,3 "$(left)" scored "$scored" corpora "$out"
        echo "$(date +%X) scored has ended, $(left) s left"
        [ "$next" = newest ] || touch free-2 free-3
        wait $dense_run
        [ "$next" = newest ] && run 0,1,2,3 "$(left)" newest "$newest" corpora "$out"
    else
        size=45M-tables
        touch free-3
        run 0 "$(left)" dense "$dense" corpora "$out" &
        run 1 "$(left)" scored "$scored" corpora "$out" &
        run 2 "$(left)" newest "$newest" corpora "$out" &
        wait
        touch free-2
    fi
    wait
    echo "$(date +%X) end"
}

choices() { # 10M-choice: a card per form, three seeds share it
    choose 0 scored "$scored" &
    choose 1 no-choice "$without" &
    wait
}

choose() { # CARD NAME FORM: a form of 10M-choice, then the card is free
    choice "$@" "$(left)" corpora && touch "free-$1"
}

choice() { # CARD NAME FORM SECONDS CORPORA [FURTHER ARGUMENTS]
    card=$1 name=choice-$2 form=$3 seconds=$4 corpora=$5
    shift 5
    [ "$seconds" -gt 40 ] || return
    [ "$corpora" = corpora ] || name=warm-$name
    CUDA_VISIBLE_DEVICES=$card timeout -k 5 $((seconds + 30)) python3 lab/scripts/scratch_gpu.py \
        --corpora "$corpora" --size 10M-choice --only "$form" --state "state-$name" --out "$name.jsonl" \
        --copy "$out/10M-$name.jsonl" --workers 3 --seconds "$seconds" "$@" >>"$out/log-$name.txt" 2>&1
}

warm() { # CARDS NAME FORM
    run "$1" 200 "warm-$2" "$3" corpora-warm "$out" --steps 14
}

pilot() { # CARDS OUT
    out=$2
    warm_corpus in-pilot/warm.jsonl.xz >"$out/log-warm-corpus.txt" 2>&1
    export DYNAMASK_CORPORA=$W/corpora-warm CUDA_VISIBLE_DEVICES=$1
    measure() { # PROCESSES FORM [ARGUMENTS]
        processes=$1 form=$2
        shift 2
        DYNAMASK_PROCESSES=$processes DYNAMASK_STATE=$W/state-$processes timeout 200 python3 lab/scripts/shared_pilot.py \
            --form "$form" --turns turns --out "$out/pilot-60M.jsonl" "$@" >>"$out/log-pilot-60M-$processes.txt" 2>&1 &
    }
    measure 2 "$dense" --all 3
    measure 2 "$scored" --all 3
    measure 2 "$newest" --all 3
    measure 1 "$dense" --steps 50
    wait
    echo "$(date +%X) end of the pilot" >>"$out/log-pilot-60M-2.txt"
}

case $1 in
begin)
    mkdir -p "$5"
    set_up "$2"
    read_folder "$2" "$3"
    part local --installed
    mkdir -p corpora
    setsid nohup bash lab/scripts/scratch_60m.sh sweep "$4" "$5" "$6" >"$5/log-sweep.txt" 2>&1 </dev/null &
    ;;
add)
    mkdir -p "$W"
    read_folder "$2" "$3"
    ;;
pilot)
    mkdir -p "$W/in-pilot" "$4"
    set_up "$2"
    cp "$2"/warm.jsonl.xz "$W/in-pilot/"
    cd "$W" || exit 1
    setsid nohup bash lab/scripts/scratch_60m.sh measure "$3" "$4" >"$4/log-pilot.txt" 2>&1 </dev/null &
    ;;
sweep)
    cd "$W" || exit 1
    sweep "$2" "$3" "$4"
    ;;
measure)
    cd "$W" || exit 1
    pilot "$2" "$3"
    ;;
esac
