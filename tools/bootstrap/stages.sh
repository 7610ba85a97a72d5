#!/bin/sh
# Run make targets one after another, say how long each took, and end badly if one did.
# All of them run even if one fails: a lint error must not hide what the engine has to say.
set -u
make=${MAKE:-make}
failed=
table=
total=0
for stage in "$@"; do
    printf '\n=== %s\n' "$stage"
    begin=$(date +%s)
    if "$make" --no-print-directory "$stage"; then word=ok; else word=FAILED failed="$failed $stage"; fi
    took=$(($(date +%s) - begin))
    total=$((total + took))
    table="$table$(printf '%-10s %5d s  %s' "$stage" "$took" "$word")
"
    printf '=== %s: %s after %d s\n' "$stage" "$word" "$took"
done
printf '\n%s%-10s %5d s\n' "$table" total "$total"
if [ -n "$failed" ]; then
    printf 'failed:%s (each can be run alone: make STAGE)\n' "$failed" >&2
    exit 1
fi
