#!/usr/bin/env bash
# Counts the instructions of a look-up and of a whole read, from the virtqueue and back, on an engine that does nothing.
# valgrind counts two runs with different numbers of requests. The difference of the two counts is the cost of the
# additional requests, which does not depend on the speed or the load of the machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

few=2000 many=12000

program=$(cargo bench --bench resolve --no-run --message-format=json 2>/dev/null |
    sed -n 's/.*"name":"resolve".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -x "$program" ] || { echo "instructions: the benchmark was not built" >&2; exit 1; }

count() {
    # For requests, only the instructions of `Queue::serve` are counted, without the code that creates the requests.
    local only=()
    [[ $1 != request* ]] || only=(--toggle-collect='diffdisk::device::queue::Queue::serve')
    valgrind --tool=callgrind "${only[@]}" --callgrind-out-file="$3" "$program" --instructions "$1" "$2" 2>&1 |
        sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
printf '%-44s%14s\n' 'instructions of' 'each'
for what in plan-3 plan-64 request request-single request-copied; do
    less=$(count "$what" "$few" "$out/less")
    more=$(count "$what" "$many" "$out/$what")
    case $what in
    plan-*) name="a look-up in a chain of ${what#plan-} files" ;;
    request) name='a read of 4 KiB, ring to ring' ;;
    request-copied) name='the same read, copied from the page cache' ;;
    request-single) name='the same copied read, one at a time' ;;
    esac
    printf '%-44s%14s\n' "$name" $(((more - less) / (many - few)))
done
echo
echo 'instructions of the last row, by function:'
callgrind_annotate "$out/request-copied" 2>/dev/null | grep -E '^ *[0-9,]+ \(' | grep -v 'PROGRAM TOTALS' | sed -n 1,20p | cut -c1-150
