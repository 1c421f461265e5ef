#!/usr/bin/env bash
# Twenty faults in the code that computes what is printed and what the robot is given, put in one at a time: for each a
# fast test must fail. Slow (it builds five test programs anew), so not part of CI.
#
#   tests/faults/run.sh            all of them
#   tests/faults/run.sh NAME...    some
#
# Every fault is put in beside the right code, behind the environment variable MINDSEYE_FAULT, so that one build serves
# all: first all tests must pass without it, then each must fail with its own. A fault whose place has changed stops the
# script before anything is built. The sources are put back as they were in any case.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

names=() packages=() targets=() tests=() files=()
declare -A old new
chosen=("$@")

# fault NAME PACKAGE TARGET TEST FILE OLD NEW: in FILE, OLD (which stands there once) becomes NEW; IF in NEW is the
# condition under which the fault shows.
fault() {
    if [ ${#chosen[@]} -gt 0 ] && [[ ! " ${chosen[*]} " == *" $1 "* ]]; then return; fi
    names+=("$1") packages+=("$2") targets+=("$3") tests+=("$4") files+=("$5")
    old[$1]=$6
    new[$1]=${7//IF/"std::env::var_os(\"MINDSEYE_FAULT\").is_some_and(|f| f == \"$1\")"}
}

source tests/faults/faults.sh

[ ${#names[@]} -gt 0 ] || { echo "no such fault: ${chosen[*]}"; exit 1; }

kept=$(mktemp -d)
restore() {
    for file in $(printf '%s\n' "${files[@]}" | sort -u); do
        if [ -e "$kept/$file" ]; then cp -p "$kept/$file" "$file"; fi
    done
    rm -rf "$kept"
}
trap restore EXIT

text_of() { local text; text=$(cat "$1"; printf x); printf '%s' "${text%x}"; }

missing=0
for i in "${!names[@]}"; do
    name=${names[$i]} file=${files[$i]}
    if [ ! -e "$kept/$file" ]; then
        mkdir -p "$kept/$(dirname "$file")"
        cp -p "$file" "$kept/$file"
    fi
    text=$(cat "$file"; printf x)
    rest=${text//"${old[$name]}"/}
    times=$(((${#text} - ${#rest}) / ${#old[$name]}))
    if [ "$times" -ne 1 ]; then
        echo "fault $name no longer applies: its place stands $times times in $file, wanted once:"
        echo "  ${old[$name]}"
        missing=1
        continue
    fi
    text=${text/"${old[$name]}"/"${new[$name]}"}
    printf '%s' "${text%x}" > "$file"
done
[ $missing -eq 0 ] || exit 1

# The test programs, one for each package and target, built with all faults in place.
declare -A program
for i in "${!names[@]}"; do
    key="${packages[$i]} ${targets[$i]}"
    [ -z "${program[$key]:-}" ] || continue
    if [ "${targets[$i]}" = lib ]; then target=(--lib); else target=(--test "${targets[$i]}"); fi
    out=$(${CARGO:-cargo} test --release --color never --no-run -p "${packages[$i]}" "${target[@]}" 2>&1) || {
        printf '%s\n' "$out" | tail -60
        exit 1
    }
    program[$key]=$(sed -n 's/^ *Executable.*(\(.*\))$/\1/p' <<< "$out")
    [ -x "${program[$key]}" ] || { printf '%s\n' "$out" | tail -5; echo "no test program of $key"; exit 1; }
done

survivors=0
for i in "${!names[@]}"; do
    name=${names[$i]} test=${tests[$i]} of="${program["${packages[$i]} ${targets[$i]}"]}"
    # Without any fault it passes, and it is there; with this one it fails.
    out=$("$of" --exact "$test" 2>&1) && grep -q '1 passed' <<< "$out" || {
        printf '%s\n' "$out" | tail -40
        echo "BROKEN    $name: $test is not there, or fails without any fault"
        survivors=$((survivors + 1))
        continue
    }
    out=$(MINDSEYE_FAULT=$name "$of" --exact "$test" 2>&1) && {
        echo "SURVIVED  $name: $test still passes"
        survivors=$((survivors + 1))
        continue
    }
    if grep -q '1 failed' <<< "$out"; then
        echo "caught    $name: $test"
    else
        printf '%s\n' "$out" | tail -40
        echo "BROKEN    $name: $test did not run"
        survivors=$((survivors + 1))
    fi
done
echo "${#names[@]} faults, $survivors not caught"
[ $survivors -eq 0 ]
